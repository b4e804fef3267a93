#!/usr/bin/env bash
# Make .venv where it is missing (seconds; a run brings the rest), then `python -m harness "$@"`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/setup.sh light)
exec "$python" -m harness "$@"
