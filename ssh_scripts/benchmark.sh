#!/usr/bin/env bash
# Measures the networks at their published sizes, with the settings of the launchers; or one of them, with flags:
#   bash ssh_scripts/benchmark.sh upsampler --precisions fp32
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_environment
if [ $# -gt 0 ]; then
    exec python "$REPO/benchmarks/$1.py" "${@:2}"
fi
for name in network upsampler; do
    echo "$name"
    python "$REPO/benchmarks/$name.py"
done
