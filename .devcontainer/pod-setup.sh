#!/usr/bin/env bash
# make pod-setup: an environment on a rented GPU machine that outlives its container. Again after a restart: it is quick.
#
# Only the volume survives a stop of the pod, so the repository must be cloned there: its runs/ and .venv then last
# too. What would go to the home folder (assets, Hugging Face's, pip's and W&B's caches) is sent to the volume by
# .venv/pod.env, which every make target reads. If the code runs on the image's CUDA build of torch, that is kept: the
# environment then sees the image's own packages, and everything else comes from environment.yml. Otherwise it sees none
# of them: a torchvision built for another torch would break transformers and peft.
#
# VOLUME: the persistent folder. Default: /workspace on a RunPod pod, else this repository's parent folder.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "FAILED $1" >&2; exit 1; }

python=${PYTHON:-python3}
volume=${VOLUME:-$([[ -n ${RUNPOD_POD_ID:-} ]] && echo /workspace || dirname "$PWD")}
[[ -d $volume && -w $volume ]] || fail "VOLUME=$volume is not a folder that can be written to; name one: make pod-setup VOLUME=..."
volume=$(cd "$volume" && pwd -P)
case $(pwd -P)/ in
  "$volume"/*) ;;
  *) fail "this repository is not below $volume, so its runs would be lost with the container; clone it there" ;;
esac
[[ $volume != *[[:space:]\$\#]* ]] || fail "VOLUME=$volume: a path without blanks, \$ and # is needed"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed; name one: make pod-setup PYTHON=python3.12"
[[ ! $("$python" -c 'import sys; print(sys.prefix)') -ef .venv ]] ||
  fail "$python is that of .venv, which may be built anew here; deactivate it, or name the image's: make pod-setup PYTHON=/usr/bin/python3"

home=$volume/.shielded-recrl
mkdir -p "$home"
before=$(cat .venv/pod.env 2> /dev/null || true)
torch=$("$python" -c 'import torch; print(torch.__version__)' 2> /dev/null || true)
case $torch in
  2.11.* | 2.12.* | 2.13.*) echo "keeping torch $torch of the image" ;;
  "") echo "the image has no torch: installing the one of environment.yml" ;;
  *) echo "the image's torch $torch is not 2.11 to 2.13: installing the one of environment.yml"; torch= ;;
esac
sees=$([[ -n $torch ]] && echo true || echo false)
made=$(sed -n 's/^include-system-site-packages *= *//p' .venv/pyvenv.cfg 2> /dev/null || true)
if [[ $made != "$sees" ]] || ! .venv/bin/python -c '' 2> /dev/null; then
  "$python" -m venv --clear ${torch:+--system-site-packages} .venv
fi
{
  echo "# Written by make pod-setup; read by make, and by bash with: source .venv/pod.env"
  echo "export RECRL_HOME=$home"
  echo "export HF_HOME=$home/huggingface"
  echo "export PIP_CACHE_DIR=$home/pip"
  echo "export TORCHINDUCTOR_CACHE_DIR=$home/inductor"
  echo "export WANDB_CACHE_DIR=$home/wandb"
  echo "export WANDB_DATA_DIR=$home/wandb"
  [[ -z $torch ]] || echo "export RECRL_TORCH=$torch"
} > .venv/pod.env
[[ $(cat .venv/pod.env) == "$before" ]] || rm -f .venv/.installed  # another image than last time
make env PYTHON="$python" PIP_ARGS="${PIP_ARGS:-}"
if ! errors=$(.venv/bin/python -c 'import torch, transformers, peft' 2>&1); then
  remedy="remove .venv, then make pod-setup again"
  [[ -z $torch ]] || remedy="the image's packages do not fit its torch $torch; take another image, or a Python without them: make pod-setup PYTHON=..."
  fail "torch, transformers and peft do not import together (${errors##*$'\n'}): $remedy"
fi
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -1 || true)
echo "ready: ${gpu:-no GPU}; caches in $home, runs in $PWD/runs"
echo "next: make pod-run    (make all, and it goes on when the terminal is closed)"
