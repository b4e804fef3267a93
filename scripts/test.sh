#!/usr/bin/env bash
# usage: test.sh [quick|full|lint]     quick: no torch, seconds; default: plus real gloo training; full: plus the long ones
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/setup.sh test)
case ${1:-default} in
  quick) exec "$python" -m pytest -m "not cpu and not gpu and not full" ;;
  default)
    scripts/setup.sh heavy
    exec "$python" -m pytest -m "not gpu and not full" ;;
  full)
    scripts/setup.sh heavy
    exec "$python" -m pytest ;;
  lint)
    "$python" -m ruff check harness tests
    if command -v shellcheck >/dev/null; then shellcheck scripts/*.sh docker/*.sh .ci/run; fi ;;
  *) echo "error: test.sh $1: expected quick, full or lint" >&2; exit 2 ;;
esac
