#!/usr/bin/env bash
# Makes its own environment, then lint, type checks and tests. Extra arguments go to pytest; SLOW=1
# runs the slow tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_environment requirements_training_joint.txt requirements_dev.txt
cd "$REPO"
ruff check .
ruff format --check .
mypy
if [ "${SLOW:-0}" != 0 ]; then
    set -- -m slow "$@"
fi
exec python -m pytest -n auto --maxprocesses 8 "$@"  # a core each: a test uses one thread
