#!/usr/bin/env bash
# Draws sound for the pictures of given clips. Each variable can be set from outside, and further flags follow:
#   DATA_DIR=clips MODEL_PATH=output/multimodal_train NUM_GPUS=1 \
#       bash ssh_scripts/video2audio_sample.sh --seed 7
# The sizes of the models are not given here: a checkpoint carries its flags, and one without is of the published size.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

: "${DATA_DIR:=}"  # clips, searched below; needed
: "${MODEL_PATH:=}"  # checkpoint, several with commas, or a folder (its newest EMA); needed
: "${OUTPUT_DIR:=output/video2audio}"
: "${NUM_GPUS:=8}"  # ranks; where there is no GPU they run on the CPU
: "${ALL_SAVE_NUM:=96}"  # clips, over all ranks; at most as many as there are
: "${BATCH_SIZE:=4}"  # clips per rank at a time
: "${SAMPLE_FN:=ddpm}"  # or ddim, dpm_solver, dpm_solver++
: "${TIMESTEP_RESPACING:=}"  # steps of ddpm and ddim, such as ddim100; empty: all
: "${CLASSIFIER_SCALE:=0}"  # how strongly the given modality guides the other (ddpm, ddim)
: "${SEED:=42}"
: "${USE_FP16:=True}"

need_path DATA_DIR "$DATA_DIR" /path/to/clips
need_path MODEL_PATH "$MODEL_PATH" /path/to/checkpoint.pt
use_environment
launch video2audio_sample.py \
    --data_dir "$DATA_DIR" --timestep_respacing "$TIMESTEP_RESPACING" --classifier_scale "$CLASSIFIER_SCALE" \
    --multimodal_model_path "$MODEL_PATH" --output_dir "$OUTPUT_DIR" --all_save_num "$ALL_SAVE_NUM" \
    --batch_size "$BATCH_SIZE" --sample_fn "$SAMPLE_FN" --seed "$SEED" --use_fp16 "$USE_FP16" \
    "$@"
