#!/usr/bin/env bash
# Measures the machine and the models on it, with the settings of the launchers; flags go to
# benchmarks/run.py (--help):
#   bash ssh_scripts/benchmark.sh --quick
#   bash ssh_scripts/benchmark.sh --only forward training --models base --compare earlier.json
# The gradients' exchange between ranks has a benchmark of its own: python benchmarks/scaling.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_environment
exec python "$REPO/benchmarks/run.py" "$@"
