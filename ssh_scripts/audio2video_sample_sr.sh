#!/usr/bin/env bash
# Generates video for the audio of given clips. Set variables and flags as in:
#   DATA_DIR=clips MODEL_PATH=output/multimodal_train SR_MODEL_PATH=output/image_sr_train NUM_GPUS=1 \
#       bash ssh_scripts/audio2video_sample_sr.sh --seed 7
# Model sizes are not set here: a checkpoint stores its flags, else the published sizes hold.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

: "${DATA_DIR:=}"  # folder of clips, with its subfolders; needed
: "${MODEL_PATH:=}"  # checkpoint, several with commas, or a folder (its newest EMA); needed
: "${SR_MODEL_PATH:=}"  # checkpoint of the upsampler, or a folder; empty: clips of 64 pixels only
: "${OUTPUT_DIR:=output/audio2video}"
: "${NUM_GPUS:=8}"  # ranks; where there is no GPU they run on the CPU
: "${ALL_SAVE_NUM:=96}"  # clips, over all ranks; at most as many as there are
: "${BATCH_SIZE:=4}"  # clips per rank at a time
: "${SAMPLE_FN:=ddpm}"  # or ddim, dpm_solver, dpm_solver++
: "${TIMESTEP_RESPACING:=}"  # steps of ddpm and ddim, such as ddim100; empty: all
: "${CLASSIFIER_SCALE:=0}"  # guidance by the conditioning modality (ddpm, ddim)
: "${SEED:=42}"
: "${USE_FP16:=True}"

# Upsampler
: "${SR_SAMPLE_FN:=ddim}"  # on the diffusion steps stored in the checkpoint, else on 1100
: "${SR_TIMESTEP_RESPACING:=}"  # steps of ddim and ddpm; empty: ddim25, as published, all of ddpm
: "${SR_BATCH_SIZE:=0}"  # frames per rank at a time; 0: what fits in memory
: "${SR_USE_FP16:=$USE_FP16}"
: "${LOAD_NOISE:=}"  # .npy with one noise image for all clips

need_path DATA_DIR /path/to/clips
need_path MODEL_PATH /path/to/checkpoint.pt
check_paths SR_MODEL_PATH LOAD_NOISE
use_environment
set_flags DATA_DIR TIMESTEP_RESPACING CLASSIFIER_SCALE OUTPUT_DIR ALL_SAVE_NUM BATCH_SIZE \
    SAMPLE_FN SEED USE_FP16 SR_MODEL_PATH SR_SAMPLE_FN SR_BATCH_SIZE SR_USE_FP16 LOAD_NOISE
[ -z "$SR_TIMESTEP_RESPACING" ] || FLAGS+=(--sr_timestep_respacing "$SR_TIMESTEP_RESPACING")
launch audio2video_sample_sr.py --multimodal_model_path "$MODEL_PATH" "${FLAGS[@]}" "$@"
