#!/usr/bin/env bash
# usage: scripts/setup.sh STAGE… [-- ARGUMENT…]
# Installs the stages into .venv, then runs its Python with the arguments. Stages are dependency groups of pyproject.toml
# (light, heavy, data, test, …; gpu through scripts/setup-gpu.sh), locked in uv.lock. A stage that is up to date costs
# milliseconds; harness/machine/setup.py installs the others with uv, which comes from PyPI where none is on the PATH.
#   PYTHON=path    make .venv with this interpreter
#   VENV=dir       make it there instead; VENV=0: use the interpreter and the packages that are there
#   DEVICE=cuda    install CUDA's wheels though this machine has no GPU; DEVICE=cpu: the CPU's though it has one
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
  elif uv python dir &>/dev/null; then
    candidates+=("$(uv python find --managed-python '>=3.12,<3.14' 2>/dev/null || true)")
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
  if [[ -z ${PYTHON:-} ]]; then
    echo "setup: no Python 3.12 or 3.13 here; uv downloads one" >&2
    if answer=$(download_python 2>&1); then
      printf '%s\n' "$answer"
      return
    fi
    seen+=$'\n'"  uv could not download one: ${answer##*$'\n'}"
  fi
  fail "no Python 3.12 or 3.13 ${where}$seen
get one, for example:  uv python install 3.12   |   pyenv install 3.12   |   sudo apt install python3.12
or name one:           make … PYTHON=/path/to/python3.12"
}

# Has uv download a Python and prints where it is, or why it could not.
download_python() {
  local uv
  uv=$(find_uv python3) || return
  "$uv" python install --quiet 3.12 && "$uv" python find --managed-python 3.12
}

# Prints the path of uv: the PATH's if pyproject.toml allows its version, else the one in $venv, which Python $1 installs.
find_uv() {
  local python=$1 fetched version
  # uv refuses to start where [tool.uv] wants another version.
  if uv python dir &>/dev/null; then
    type -P uv
    return
  fi
  if [[ ! -x $venv/uv ]]; then
    version=$(sed -n 's/.*"uv==\(.*\)".*/\1/p' pyproject.toml)
    mkdir -p "$venv"
    fetched=$(mktemp -d "$venv/uv-XXXXXX")
    if install_uv "$python" "$fetched" "$version" &>"$venv/setup-uv.log"; then mv -f "$fetched/bin/uv" "$venv/uv"; fi
    rm -rf "$fetched"
  fi
  [[ -x $venv/uv ]] || fail "no uv on the PATH, and $python could not install uv $version: $(tail -n 1 "$venv/setup-uv.log")
install it:            https://docs.astral.sh/uv   |   on Debian, Ubuntu: sudo apt install python3-venv, then again
without a network, use packages that are there: VENV=0"
  echo "$venv/uv"
}

# Some Pythons come without pip, some without venv.
install_uv() {
  local python=$1
  if ! "$python" -m pip --version; then
    "$python" -m venv "$2/venv" && python=$2/venv/bin/python
  fi
  PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --no-input --disable-pip-version-check --no-deps \
    --target "$2" "uv==$3"
}

# Is stage $1 as uv.lock wants it? Its stamp lists files that must be there, then the checksum of the lock it was made from.
fresh() {
  local file='' made_from=''
  {
    while IFS= read -r file && [[ -n $file ]]; do
      [[ -e $venv/$file ]] || return 1
      [[ $device == cuda && $file == *+cpu.dist-info/* ]] && return 1
    done
    IFS= read -r made_from || true
  } 2>/dev/null <"$venv/stage-$1.stamp" || return 1
  [[ $made_from == "$lock" ]]
}

install() {
  local base uv
  # an interrupted set-up leaves these
  local -a ours=(! -name lock ! -name uv ! -name 'uv-??????' ! -name setup.log ! -name setup-uv.log)
  if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(find "$venv" -mindepth 1 -maxdepth 1 "${ours[@]}") ]]; then
    fail "$venv holds files but is no virtual environment"$'\n'"name another place: VENV=dir"
  fi
  base=$(find_python)
  uv=$(find_uv "$base")
  "$base" -m harness.machine.setup install --uv "$uv" --venv "$venv" --device "$device" ${PYTHON:+--exact} "$@"
}

# In a function, which bash reads whole: set-ups take a while, and a git pull meanwhile may change this file.
main() {
  local python stage current=yes lock
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
    lock=$(cksum <uv.lock)
    for stage in "${stages[@]}"; do
      fresh "$stage" || current=
    done
    if [[ -n ${PYTHON:-} && ! $python -ef $(type -P "$PYTHON") ]]; then current=; fi
    [[ -n $current ]] || install "${stages[@]}"
    [[ $venv == /* ]] || venv=$PWD/$venv
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    unset PYTHONHOME
  fi
  (($#)) || exit 0
  exec "$python" "$@"
}

main "$@"
