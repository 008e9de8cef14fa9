#!/usr/bin/env bash
# Draws clips with the published settings. Each variable can be set from outside, and further flags follow:
#   MODEL_PATH=output/multimodal_train ALL_SAVE_NUM=16 NUM_GPUS=1 bash ssh_scripts/multimodal_sample_sr.sh --seed 7
# The size of the model is not given here: a checkpoint carries its flags, and one without is of the published size.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

: "${MODEL_PATH:=}"  # checkpoint, several with commas, or a folder (its newest EMA); needed
: "${OUTPUT_DIR:=output/multimodal_sample}"
: "${NUM_GPUS:=8}"  # ranks; where there is no GPU they run on the CPU
: "${ALL_SAVE_NUM:=96}"  # clips, over all ranks
: "${BATCH_SIZE:=4}"  # per rank
: "${SAMPLE_FN:=dpm_solver++}"
: "${SEED:=42}"
: "${USE_FP16:=True}"

need_path MODEL_PATH "$MODEL_PATH" /path/to/checkpoint.pt
use_environment
launch multimodal_sample_sr.py \
    --multimodal_model_path "$MODEL_PATH" --output_dir "$OUTPUT_DIR" --all_save_num "$ALL_SAVE_NUM" \
    --batch_size "$BATCH_SIZE" --sample_fn "$SAMPLE_FN" --seed "$SEED" --use_fp16 "$USE_FP16" \
    "$@"
