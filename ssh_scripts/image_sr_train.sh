#!/usr/bin/env bash
# Trains the upsampler with the published settings. Set variables and flags as in:
#   DATA_DIR=frames NUM_GPUS=2 bash ssh_scripts/image_sr_train.sh --use_checkpoint True
# Frames come from videos with py_scripts/extract_video.py; a folder of videos does as well.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Run
: "${DATA_DIR:=}"  # folder of images or videos; needed
: "${OUTPUT_DIR:=output/image_sr_train}"
: "${INIT_CHECKPOINT:=}"  # weights to start from, such as guided-diffusion's 64_256_upsampler.pt
: "${NUM_GPUS:=8}"  # ranks; where there is no GPU they run on the CPU
: "${NUM_WORKERS:=4}"
: "${LOG_INTERVAL:=100}"
: "${SAVE_INTERVAL:=10000}"

# Model
: "${LARGE_SIZE:=256}"
: "${SMALL_SIZE:=64}"
: "${SR_NUM_CHANNELS:=192}"
: "${SR_NUM_RES_BLOCKS:=2}"
: "${SR_NUM_HEADS:=4}"
: "${SR_ATTENTION_RESOLUTIONS:=8,16,32}"
: "${SR_DROPOUT:=0.0}"
: "${SR_USE_SCALE_SHIFT_NORM:=True}"
: "${SR_RESBLOCK_UPDOWN:=True}"
: "${SR_CLASS_COND:=False}"

# Diffusion
: "${SR_DIFFUSION_STEPS:=1100}"  # as the published upsampler is sampled
: "${SR_NOISE_SCHEDULE:=linear}"
: "${SR_LEARN_SIGMA:=True}"

# Optimisation
: "${LR:=1e-4}"
: "${BATCH_SIZE:=6}"  # per rank
: "${EMA_RATE:=0.9999}"
: "${USE_FP16:=True}"

need_path DATA_DIR /path/to/frames
use_environment
set_flags DATA_DIR OUTPUT_DIR INIT_CHECKPOINT NUM_WORKERS LOG_INTERVAL SAVE_INTERVAL LARGE_SIZE \
    SMALL_SIZE SR_NUM_CHANNELS SR_NUM_RES_BLOCKS SR_NUM_HEADS SR_ATTENTION_RESOLUTIONS \
    SR_DROPOUT SR_USE_SCALE_SHIFT_NORM SR_RESBLOCK_UPDOWN SR_CLASS_COND SR_DIFFUSION_STEPS \
    SR_NOISE_SCHEDULE SR_LEARN_SIGMA LR BATCH_SIZE EMA_RATE USE_FP16
launch image_sr_train.py "${FLAGS[@]}" "$@"
