#!/usr/bin/env bash
# usage: scripts/setup-gpu.sh
# Installs CUDA's PyTorch and Transformer Engine into .venv. It needs no container, no root, and of CUDA only the driver.
# PyPI has Transformer Engine's PyTorch extension as source only. This script compiles it once, against the headers of torch
# and of CUDA, which are pip packages too, and keeps the wheel. That takes about 10 min on 2 cores.
#   WHEELS=dir     where built wheels are kept (default: below ~/.cache); a wheel that is there is not built again
#   MAX_JOBS=n     compilers at once (default: one a core, as far as 4 GiB of memory each allow)
#   DEVICE=cuda    continue without an NVIDIA driver, as for an image or another machine
#   DRY_RUN=1      check the machine and print the commands
# PYTHON and VENV as in scripts/setup.sh.
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."
asked=${DEVICE:-}
export DEVICE=cuda

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

say() {
  printf 'setup-gpu: %s\n' "$1" >&2
}

run() {
  if [[ -n ${DRY_RUN:-} ]]; then echo "$*"; else "$@"; fi
}

venv=${VENV:-${NVIDIA_PYTORCH_VERSION:+0}}
venv=${venv:-.venv}
if [[ $venv == 0 ]]; then
  exec scripts/setup.sh gpu # says what is missing
fi
[[ $venv == /* ]] || venv=$PWD/$venv

pinned() {
  sed -n "s/^ *\"$1==\([^\"]*\)\".*/\1/p" pyproject.toml
}
torch=$(pinned torch)
engine=$(pinned transformer-engine-torch)
toolkit=$(pinned nvidia-cuda-nvcc)
toolkit=${toolkit%%.*}
wheels=${WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/megatron-harness/torch-$torch-cu$toolkit}
log=$venv/setup-gpu-build.log

check_driver() {
  local driver
  [[ $(uname -s) == Linux ]] || fail "training on NVIDIA GPUs needs Linux; this is $(uname -s)"
  if ! driver=$(nvidia-smi 2>/dev/null); then
    # Gigabytes and minutes, for nothing that runs here.
    [[ $asked == cuda || -n ${DRY_RUN:-} ]] || fail "no NVIDIA driver here, so this machine could not use what would be installed:
a download of about 2.5 GB and a build of about 10 minutes on 2 cores
to prepare another machine: make setup-gpu DEVICE=cuda; runs on this CPU need only: make setup"
    say "no NVIDIA driver here; DEVICE=cuda was given"
    return
  fi
  driver=$(sed -n 's/.*CUDA [A-Za-z ]*Version: *\([0-9]*\).*/\1/p' <<<"$driver")
  ((${driver:-$toolkit} >= toolkit)) || fail "the NVIDIA driver supports CUDA $driver, torch $torch from PyPI needs $toolkit
update the driver (580 or later), or use NVIDIA's container, which supports older drivers: make docker-run"
}

check_compiler() {
  local version
  type -P c++ >/dev/null || fail "no C++ compiler
get one, for example:  sudo apt install g++   |   sudo dnf install gcc-c++   |   module load gcc"
  version=$(c++ -dumpversion)
  [[ $(c++ --version) == *clang* ]] || ((${version%%.*} >= 9)) ||
    fail "c++ is GCC $version, torch's headers need 9 or later; put a newer one on the PATH, or: module load gcc"
}

# Is there a wheel for .venv's Python? (No .venv: no.)
have_wheel() {
  local python
  python=$(echo "$venv"/lib/python3*)
  python=${python##*/python}
  compgen -G "$wheels/transformer_engine_torch-$engine-cp${python/./}-*.whl" >/dev/null
}

compilers_at_once() {
  local jobs
  jobs=$(($(sed -n 's/MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo) / (4 << 20)))
  ((jobs < $(nproc))) || jobs=$(nproc)
  echo $((jobs > 1 ? jobs : 1))
}

build_wheel() {
  local site cuda
  local -a command
  site=$(echo "$venv"/lib/python3*/site-packages)
  cuda=$site/nvidia/cu$toolkit
  # Without NCCL's expert parallelism: its sources are not in the package, and megatron-core does not use it.
  command=(env "PATH=$venv/bin:$cuda/bin:$PATH" "CUDA_HOME=$cuda"
    "CPLUS_INCLUDE_PATH=$cuda/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include"
    NVTE_WITH_NCCL_EP=0 NVTE_PYTORCH_FORCE_BUILD=TRUE "MAX_JOBS=${MAX_JOBS:-$(compilers_at_once)}"
    "$venv/bin/python" -I -m pip wheel --verbose --no-input --no-deps --no-build-isolation --wheel-dir "$wheels"
    "transformer-engine-torch==$engine")
  run mkdir -p "$wheels"
  if [[ -n ${DRY_RUN:-} ]]; then
    run "${command[@]}"
  else
    "${command[@]}" 2>&1 | tee "$log" | show_progress || fail "the build failed. Errors in its log, $log:
$(grep -E 'error|Error|Killed' "$log" | tail -5)
\"Killed\" means that memory ran out: MAX_JOBS=1 make setup-gpu; without a build: make docker-run"
  fi
}

# Shows ninja's "[12/40] …" as one changing line on a terminal, and every tenth elsewhere.
show_progress() {
  local line
  while IFS= read -r line; do
    [[ $line =~ ^[[:space:]]*\[([0-9]+)/([0-9]+)\] ]] || continue
    line="compiled ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} files, $SECONDS s"
    if [[ -t 2 ]]; then
      printf '\r\033[Ksetup-gpu: %s' "$line" >&2
    elif ((BASH_REMATCH[1] % 10 == 0)); then
      say "$line"
    fi
  done
  if [[ -t 2 ]]; then echo >&2; fi
}

# In a function, which bash reads whole: a git pull may change this file while it runs.
main() {
  check_driver
  say "torch $torch for CUDA, and what else runs need"
  run scripts/setup.sh heavy
  if have_wheel; then
    say "using the wheel in $wheels"
  else
    check_compiler
    say "CUDA's compiler and headers, ninja"
    run scripts/setup.sh gpu-build
    say "building Transformer Engine's extension for PyTorch into $wheels: about 10 min on 2 cores (log: $log)"
    build_wheel
  fi
  say "Transformer Engine $engine, and a forward pass where a GPU is"
  run env UV_FIND_LINKS="${UV_FIND_LINKS:+$UV_FIND_LINKS,}$wheels" scripts/setup.sh gpu
}

main
