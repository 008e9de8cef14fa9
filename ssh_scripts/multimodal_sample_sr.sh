#!/usr/bin/env bash
# Generates clips with the published settings. Set variables and flags as in:
#   MODEL_PATH=output/multimodal_train SR_MODEL_PATH=output/image_sr_train NUM_GPUS=1 \
#       bash ssh_scripts/multimodal_sample_sr.sh --seed 7
# The gallery of the clips is OUTPUT_DIR/index.html; its path is the last line that is printed.
# Model sizes are not set here: a checkpoint stores its flags, else the published sizes hold.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

: "${MODEL_PATH:=}"  # checkpoint, several with commas, or a folder (its newest EMA); needed
: "${SR_MODEL_PATH:=}"  # checkpoint of the upsampler, or a folder; empty: clips of 64 pixels only
: "${OUTPUT_DIR:=output/multimodal_sample}"
: "${NUM_GPUS:=8}"  # ranks; where there is no GPU they run on the CPU
: "${ALL_SAVE_NUM:=96}"  # clips, over all ranks
: "${BATCH_SIZE:=4}"  # clips per rank at a time
: "${SAMPLE_FN:=dpm_solver++}"
: "${SEED:=42}"
: "${USE_FP16:=True}"

# Upsampler
: "${SR_SAMPLE_FN:=ddim}"  # on the diffusion steps stored in the checkpoint, else on 1100
: "${SR_TIMESTEP_RESPACING:=}"  # steps of ddim and ddpm; empty: ddim25, as published, all of ddpm
: "${SR_BATCH_SIZE:=0}"  # frames per rank at a time; 0: what fits in memory
: "${SR_USE_FP16:=$USE_FP16}"
: "${LOAD_NOISE:=}"  # .npy with one noise image for all clips

# Metrics
: "${REF_PATH:=}"  # folder of reference clips for the metrics at the end; empty: no metrics

need_path MODEL_PATH /path/to/checkpoint.pt
check_paths SR_MODEL_PATH REF_PATH LOAD_NOISE
use_environment
set_flags OUTPUT_DIR ALL_SAVE_NUM BATCH_SIZE SAMPLE_FN SEED USE_FP16 SR_MODEL_PATH SR_SAMPLE_FN \
    SR_BATCH_SIZE SR_USE_FP16 LOAD_NOISE REF_PATH
[ -z "$SR_TIMESTEP_RESPACING" ] || FLAGS+=(--sr_timestep_respacing "$SR_TIMESTEP_RESPACING")
launch multimodal_sample_sr.py --multimodal_model_path "$MODEL_PATH" "${FLAGS[@]}" "$@"
