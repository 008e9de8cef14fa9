#!/usr/bin/env bash
# Generates audio for the video of given clips. Set variables and flags as in:
#   DATA_DIR=clips MODEL_PATH=output/multimodal_train NUM_GPUS=1 \
#       bash ssh_scripts/video2audio_sample.sh --seed 7
# Model sizes are not set here: a checkpoint stores its flags, else the published sizes hold.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

: "${DATA_DIR:=}"  # folder of clips, with its subfolders; needed
: "${MODEL_PATH:=}"  # checkpoint, several with commas, or a folder (its newest EMA); needed
: "${OUTPUT_DIR:=output/video2audio}"
: "${NUM_GPUS:=8}"  # ranks; where there is no GPU they run on the CPU
: "${ALL_SAVE_NUM:=96}"  # clips, over all ranks; at most as many as there are
: "${BATCH_SIZE:=4}"  # clips per rank at a time
: "${SAMPLE_FN:=ddpm}"  # or ddim, dpm_solver, dpm_solver++
: "${TIMESTEP_RESPACING:=}"  # steps of ddpm and ddim, such as ddim100; empty: all
: "${CLASSIFIER_SCALE:=0}"  # guidance by the conditioning modality (ddpm, ddim)
: "${SEED:=42}"
: "${USE_FP16:=True}"

need_path DATA_DIR /path/to/clips
need_path MODEL_PATH /path/to/checkpoint.pt
use_environment
set_flags DATA_DIR TIMESTEP_RESPACING CLASSIFIER_SCALE OUTPUT_DIR ALL_SAVE_NUM BATCH_SIZE \
    SAMPLE_FN SEED USE_FP16
launch video2audio_sample.py --multimodal_model_path "$MODEL_PATH" "${FLAGS[@]}" "$@"
