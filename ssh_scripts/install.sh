#!/usr/bin/env bash
# Makes the virtual environment $VENV (default .venv) with all requirements, or updates it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_environment requirements_training_joint.txt
echo "ready: source $VENV/bin/activate"
