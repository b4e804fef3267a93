#!/usr/bin/env bash
# usage: scripts/setup.sh STAGE… [-- ARGUMENT…]
# Brings .venv up to the stages (dependency groups of pyproject.toml: light, heavy, test; gpu through scripts/setup-gpu.sh),
# then runs its Python with the arguments. What is up to date costs a comparison of files; harness/machine/setup.py does the rest.
#   PYTHON=path    make .venv with this interpreter
#   VENV=dir       make it there instead; VENV=0: use the interpreter and the packages that are there
#   DEVICE=cuda    install CUDA's wheels though no GPU is here; DEVICE=cpu: the CPU's though one is
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# NVIDIA's PyTorch container brings its own torch and Transformer Engine.
venv=${VENV:-${NVIDIA_PYTORCH_VERSION:+0}}
venv=${venv:-.venv}
device=cpu
if [[ -e /dev/nvidiactl || -e /dev/dxg ]]; then device=cuda; fi
device=${DEVICE:-$device}

# Prints the interpreter behind $1, or says on stderr why it will not do. requires-python in pyproject.toml says the same.
examine() {
  "$1" -c '
import os, sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 12) <= sys.version_info[:2] < (3, 14):
    sys.exit("is Python " + version)
if sys.argv[1] != "0":
    try:
        import ensurepip, venv
    except ImportError:
        sys.exit("Python %s comes without venv (Debian, Ubuntu: sudo apt install python%s-venv)" % (version, version))
print(os.path.realpath(sys._base_executable) if sys.argv[1] != "0" else sys.executable)' "$venv"
}

find_python() {
  local candidate path answer seen='' where='on the PATH, of pyenv or of uv'
  local -a candidates=(python3.12 python3.13 python3 python "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23]*/bin/python)
  if [[ -n ${PYTHON:-} ]]; then
    candidates=("$PYTHON")
    where="at PYTHON=$PYTHON"
  elif [[ $venv == 0 ]]; then
    candidates=(python3 python)
  fi
  if [[ -z ${PYTHON:-} && $venv != 0 ]] && type -P uv >/dev/null; then
    candidates+=("$(uv python find '>=3.12,<3.14' 2>/dev/null || true)")
  fi
  for candidate in "${candidates[@]}"; do
    path=$(type -P "$candidate") || continue
    if answer=$(examine "$path" 2>&1); then
      printf '%s\n' "$answer"
      return
    fi
    [[ $answer == *"Python 3"* ]] && seen+=$'\n'"  $path: ${answer##*$'\n'}"
  done
  [[ $venv == 0 ]] && fail "${PYTHON:-python3} is not a Python 3.12 or 3.13; name one: VENV=0 PYTHON=/path/to/python3.12$seen"
  fail "no Python 3.12 or 3.13 ${where}$seen
get one, for example:  uv python install 3.12   |   pyenv install 3.12   |   sudo apt install python3.12-venv
or name one:           make … PYTHON=/path/to/python3.12"
}

# Is stage $1 as pyproject.toml wants it? Its stamp lists files that must be there, then the pins it was made for.
fresh() {
  local file='' made_for=''
  {
    while IFS= read -r file && [[ -n $file ]]; do
      [[ -e $venv/$file ]] || return 1
      [[ $device == cuda && $file == *+cpu.dist-info/* ]] && return 1
    done
    IFS= read -r -d '' made_for || true
  } 2>/dev/null <"$venv/setup-$1.stamp" || return 1
  [[ $made_for == "$pins" ]]
}

# In a function, which bash reads whole: set-ups take minutes, and a git pull meanwhile may change this file.
main() {
  local python base stage current=yes pins
  local -a stages=()
  while (($#)) && [[ $1 != -- ]]; do
    stages+=("$1")
    shift
  done
  (($#)) && shift
  ((${#stages[@]})) || fail "usage: scripts/setup.sh STAGE… [-- ARGUMENT…]"

  if [[ $venv == 0 ]]; then
    python=$(find_python)
    "$python" -m harness.machine.setup check "${stages[@]}"
  else
    python=$venv/bin/python
    pins=$(<pyproject.toml)
    pins=${pins#*'[dependency-groups]'}
    pins=${pins%%$'\n['*}
    for stage in "${stages[@]}"; do
      fresh "$stage" || current=
    done
    if [[ -n ${PYTHON:-} && ! $python -ef $(type -P "$PYTHON") ]]; then current=; fi
    if [[ -z $current ]]; then
      base=$(find_python)
      "$base" -m harness.machine.setup install --venv "$venv" --device "$device" ${PYTHON:+--exact} "${stages[@]}"
    fi
    [[ $venv == /* ]] || venv=$PWD/$venv
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    unset PYTHONHOME
  fi
  (($#)) || exit 0
  exec "$python" "$@"
}

main "$@"
