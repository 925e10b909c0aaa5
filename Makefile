# `make` prints what there is; `make all` and `make test` are all that a newcomer needs.

PYTHON ?= python3
PY ?= .venv/bin/python
PIP_ARGS ?=
LAB_ARGS ?=
# What make pod-setup has found out about a pod: where caches go, and the image's torch.
-include .venv/pod.env
# The environment is ours to build only if PY is the one in .venv.
STAMP := $(if $(filter .venv/bin/python,$(PY)),.venv/.installed)

OPTIONS := $(if $(PROFILE),--profile $(PROFILE)) $(if $(RUN),--run $(RUN)) $(if $(SEED),--seed $(SEED)) \
	$(if $(DATASET),--set dataset=$(DATASET)) $(if $(DATA_DIR),--set "data_dir=$(DATA_DIR)") \
	$(if $(filter 1,$(FORCE)),--force) $(if $(SET),--set $(SET)) $(if $(TO),--to $(TO)) $(if $(filter 1,$(LIST)),--list)

.DEFAULT_GOAL := help
BATCH := --grid $(GRID) $(if $(BASE),--base $(BASE)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs $(JOBS)) \
	$(if $(ENGINE),--engine $(ENGINE)) $(if $(ADDRESS),--address $(ADDRESS)) $(if $(GPUS),--gpus $(GPUS)) \
	$(if $(CPUS),--cpus $(CPUS)) $(if $(filter 1,$(LIST)),--list)

.PHONY: help env all test lint mutants lab bench notebooks batch try verify sync-reference pod-setup pod-run clean distclean

## this list
help:
	@awk '/^## /{text = substr($$0, 4); next} \
		/^[a-z-]+:/ && text {split($$0, name, ":"); printf "make %-15s %s\n", name[1], text} {text = ""}' $(MAKEFILE_LIST)
	@echo
	@echo 'make all takes PROFILE=smoke|laptop|pod|paper RUN=name SEED=n FORCE=1 SET="name=value ..." TO=stage LIST=1'
	@echo '              DATASET=ml-100k|ml-25m|ml-32m|ml-latest-small|amazon-books[-2018|-2014]|steam-200k|csv DATA_DIR=folder with its files'
	@echo 'make batch takes GRID=name or path, BASE=run SEEDS="0 1" JOBS=n LIST=1, ENGINE=ray ADDRESS=auto GPUS=.5 CPUS=n'
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
	sed -n 's/^      - \([^#]*[^# ]\) *\(#.*\)\{0,1\}$$/\1/p' environment.yml | \
		sed 's/^torch==.*/$(if $(RECRL_TORCH),torch==$(RECRL_TORCH),&)/' > .venv/requirements.txt
	.venv/bin/python -m pip install $(PIP_ARGS) -r .venv/requirements.txt
	touch $@

## run the whole study; a second call runs only what has changed
all: $(STAMP)
	@$(PY) -m recrl_lib.pipeline.tasks all $(OPTIONS)

## unit tests, every notebook against its stored outputs (from an empty runs/smoke), and the rules for notebooks
test: $(STAMP)
	$(PY) -m pytest --ignore=recrl_lib/tests/test_notebooks.py
	@ls notebooks/*.ipynb > /dev/null 2>&1 || { echo "notebooks/ holds no notebook to test" >&2; exit 1; }
	rm -rf runs/smoke
	RECRL_PROGRESS=off $(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 notebooks/
	$(PY) -m pytest recrl_lib/tests/test_notebooks.py
	$(PY) -m recrl_lib.pipeline.verify --run smoke

## format, style, layers, types of the library, and its size
lint: $(STAMP)
	$(PY) -m ruff format --check recrl_lib
	$(PY) -m ruff check recrl_lib
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(PY) -m basedpyright --level error
	$(PY) -m recrl_lib.pipeline.sizes

## plant small faults in a copy of the library: which share do the tests notice? (half an hour)
mutants: $(STAMP)
	$(PY) -m pip install -q $(PIP_ARGS) "$$(grep -om1 'cosmic-ray==[0-9.]*' environment.yml)"
	OMP_NUM_THREADS=1 RECRL_PROGRESS=off $(PY) -m recrl_lib.pipeline.mutants

## open the notebooks in JupyterLab
lab: $(STAMP)
	$(PY) -m jupyter lab --LabApp.default_url=/lab/tree/notebooks $(LAB_ARGS)

## our PPO beside TRL's PPOTrainer: episodes per CPU-second, peak memory
bench: $(STAMP)
	$(PY) -m recrl_lib.pipeline.bench

## execute notebooks/ with their own parameters and store the outputs (needed after an edit; ONLY=4: one)
notebooks: $(STAMP)
	@$(PY) -m recrl_lib.pipeline.tasks publish $(if $(ONLY),--only $(ONLY))

## many runs derived from a finished one: make batch GRID=ablations BASE=laptop JOBS=2
batch: $(STAMP)
	@$(PY) -m recrl_lib.pipeline.batch $(BATCH)

## a finished run with something changed, before and after side by side: make try FROM=laptop SET="kl_coef=0.1"
try: $(STAMP)
	@$(PY) -m recrl_lib.pipeline.batch --base "$(FROM)" --set $(SET)

## compute a finished run's numbers again from its artifacts, and compare: make verify RUN=laptop
verify: $(STAMP)
	@$(PY) -m recrl_lib.pipeline.verify --run $(RUN)

## copy a finished run's small files to runs/reference and refresh the README: make sync-reference RUN=laptop
sync-reference: $(STAMP)
	@$(PY) -m recrl_lib.pipeline.publish --run $(RUN)

## on a rented GPU machine: an environment that keeps the image's torch, caches on the volume (VOLUME=/workspace)
pod-setup:
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" VOLUME="$(VOLUME)" .devcontainer/pod-setup.sh

## run a target so that it goes on when the terminal is closed: make pod-run TARGET="all SEED=1"
pod-run:
	@TARGET="$(TARGET)" .devcontainer/pod-run.sh

## remove caches and runs, except runs/reference; downloads stay
clean:
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
	rm -rf .pytest_cache .hypothesis .ruff_cache .import_linter_cache build
	find runs -mindepth 1 -maxdepth 1 ! -name reference -exec rm -rf {} + 2> /dev/null || true

## clean, and remove the environment
distclean: clean
	rm -rf .venv *.egg-info
