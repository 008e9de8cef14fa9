#!/usr/bin/env bash
# Checks that this machine's GPUs compute what they should, and how long compiling takes; it ends in
# one line of verdict. The whole report is a file to attach to an issue. Where all is right it leaves
# a record of the kind of GPU, by which --compile auto compiles. It needs requirements_dev.txt:
#   bash ssh_scripts/check_gpu.sh            # one GPU
#   bash ssh_scripts/check_gpu.sh 2          # and two of them together
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

NUM_GPUS=${1:-1}
REPORT=${REPORT:-$PWD/output/check_gpu/$(date +%Y%m%d_%H%M%S).txt}
case $NUM_GPUS in
'' | *[!0-9]* | 0*) die "NUM_GPUS=$NUM_GPUS: need a whole number, 1 or more" ;;
esac
export NUM_GPUS
use_environment
python -c 'import pytest' 2>/dev/null || die "no pytest here; pip install -r requirements_dev.txt"
mkdir -p "$(dirname "$REPORT")"

# Facts of the machine; fails, with the remedy, where torch cannot use a GPU.
describe_machine() {
    python - "$NUM_GPUS" <<'PYTHON'
import sys
import torch as th
from mm_diffusion.devices.gpus import check_gpu, unused_gpus

wanted, found = int(sys.argv[1]), th.cuda.device_count()
print(f"torch {th.__version__}, CUDA {th.version.cuda}, cuDNN {th.backends.cudnn.version()}, {found} GPUs")
if found < wanted:
    sys.exit(f"error: {found} GPUs found, {wanted} asked for. {unused_gpus(1)}".rstrip())
for number in range(wanted):
    try:
        check_gpu(th.device("cuda", number))
    except ValueError as error:
        sys.exit(f"error: {error}")
    facts = th.cuda.get_device_properties(number)
    print(f"GPU {number}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.major}.{facts.minor}")
PYTHON
}

# Time the compiler on a published training step, and keep the result as the record of this GPU.
time_compiler() {
    python benchmarks/compiling.py --model base --json "$1"
    python - "$1" <<'PYTHON'
import json, sys
from pathlib import Path
import torch as th
from mm_diffusion.devices.compile_choice import write_record

print("record:", write_record(th.device("cuda", 0), json.loads(Path(sys.argv[1]).read_text())))
PYTHON
}

verdict() {
    echo "check_gpu: $1; report: $REPORT" | tee -a "$REPORT"
}

if ! describe_machine >"$REPORT" 2>&1; then
    cat "$REPORT"
    verdict "FAILED: no usable GPU"
    exit 1
fi
cat "$REPORT"
{ nvidia-smi --query-gpu=driver_version,mig.mode.current --format=csv || true; } | tee -a "$REPORT"
nvidia-smi >>"$REPORT" 2>&1 || true
df -h /dev/shm >>"$REPORT" 2>&1 || true
cd "$REPO"
STATUS=0
python -m pytest -q -rA -p no:cacheprovider tests/test_gpu.py tests/test_norm_kernel.py >>"$REPORT" 2>&1 ||
    STATUS=$?
grep -E "of the (published|matrix) rate" "$REPORT" | sort -u || true
if [ "$STATUS" = 0 ]; then
    echo "timing the compiler, for 9 minutes at most"
    time_compiler "${REPORT%.txt}.compiling.json" 2>>"$REPORT" | tee -a "$REPORT" ||
        echo "no record: --compile auto will not compile here; see $REPORT"
    verdict "PASSED: $(grep -E "^[0-9]+ passed" "$REPORT" | tail -n 1)"
else
    grep -E "^(FAILED|ERROR)" "$REPORT" || true
    verdict "FAILED: $(grep -E "(failed|error)" "$REPORT" | tail -n 1)"
fi
exit "$STATUS"
