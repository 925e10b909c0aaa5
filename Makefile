# `make` prints what there is; `make all` and `make test` are all that a newcomer needs.

PYTHON ?= python3
PY ?= .venv/bin/python
PIP_ARGS ?=
LAB_ARGS ?=
# The environment is ours to build only if PY is the one in .venv.
STAMP := $(if $(filter .venv/bin/python,$(PY)),.venv/.installed)

OPTIONS := $(if $(PROFILE),--profile $(PROFILE)) $(if $(RUN),--run $(RUN)) $(if $(SEED),--seed $(SEED)) \
	$(if $(DATASET),--set dataset=$(DATASET)) $(if $(DATA_DIR),--set "data_dir=$(DATA_DIR)") \
	$(if $(filter 1,$(FORCE)),--force) $(if $(SET),--set $(SET)) $(if $(TO),--to $(TO))

.DEFAULT_GOAL := help
.PHONY: help env all test lab bench notebooks sync-reference clean distclean

## this list
help:
	@awk '/^## /{text = substr($$0, 4); next} \
		/^[a-z-]+:/ && text {split($$0, name, ":"); printf "make %-15s %s\n", name[1], text} {text = ""}' $(MAKEFILE_LIST)
	@echo
	@echo 'make all takes PROFILE=smoke|laptop|pod|paper RUN=name SEED=n FORCE=1 SET="name=value ..." TO=stage'
	@echo '              DATASET=ml-100k|ml-25m|ml-32m|ml-latest-small|amazon-books|steam-200k|csv DATA_DIR=folder with its files'
	@echo 'make env takes PYTHON=python3.12 (the interpreter to build on) and PIP_ARGS="..." (options for pip install)'
	@echo 'make lab takes LAB_ARGS="..." (options for jupyter lab, e.g. --allow-root or --no-browser)'
	@echo 'Every target takes PY=python to use an environment of your own, e.g. conda env create -f environment.yml'

## build .venv from environment.yml (done by the other targets when needed)
env: $(STAMP)
	@$(PY) -c 'import sys; print("environment ready: Python", sys.version.split()[0], "at", sys.executable)'

.venv/.installed: environment.yml pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)' || \
		{ echo "Python 3.11 or newer is needed; name one: make env PYTHON=python3.11" >&2; exit 1; }
	.venv/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	sed -n 's/^      - \([^#]*[^# ]\) *\(#.*\)\{0,1\}$$/\1/p' environment.yml > .venv/requirements.txt
	.venv/bin/python -m pip install $(PIP_ARGS) -r .venv/requirements.txt
	touch $@

## run the whole study; a second call runs only what has changed
all: $(STAMP)
	@$(PY) -m recrl_lib.runner all $(OPTIONS)

## unit tests, every notebook against its stored outputs (from an empty runs/smoke), and the rules for notebooks
test: $(STAMP)
	$(PY) -m pytest --ignore=recrl_lib/tests/test_notebooks.py
	@ls notebooks/*.ipynb > /dev/null 2>&1 || { echo "notebooks/ holds no notebook to test" >&2; exit 1; }
	rm -rf runs/smoke
	RECRL_PROGRESS=off $(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 notebooks/
	$(PY) -m pytest recrl_lib/tests/test_notebooks.py

## open the notebooks in JupyterLab
lab: $(STAMP)
	$(PY) -m jupyter lab --LabApp.default_url=/lab/tree/notebooks $(LAB_ARGS)

## time the parts that cost the most
bench: $(STAMP)
	$(PY) -m recrl_lib.bench

## execute notebooks/ with their own parameters and store the outputs (needed after an edit)
notebooks: $(STAMP)
	@$(PY) -m recrl_lib.runner publish

## copy a finished run's small files to runs/reference and refresh the README: make sync-reference RUN=laptop
sync-reference: $(STAMP)
	@$(PY) -m recrl_lib.reference --run $(RUN)

## remove caches and runs, except runs/reference; downloads stay
clean:
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
	rm -rf .pytest_cache .hypothesis build
	find runs -mindepth 1 -maxdepth 1 ! -name reference -exec rm -rf {} + 2> /dev/null || true

## clean, and remove the environment
distclean: clean
	rm -rf .venv *.egg-info
