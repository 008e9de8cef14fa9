#!/usr/bin/env bash
# Trains the joint model with the published settings. Set variables and flags as in:
#   DATA_DIR=SAVGBench_Dataset_Development/video_dev NUM_GPUS=2 bash ssh_scripts/multimodal_train.sh --use_checkpoint True
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Run
: "${DATA_DIR:=}"   # folder of clips; needed
: "${OUTPUT_DIR:=output/multimodal_train}"
: "${NUM_GPUS:=8}"  # ranks; where there is no GPU they run on the CPU
: "${NUM_WORKERS:=4}"
: "${LOG_INTERVAL:=100}"
: "${SAVE_INTERVAL:=10000}"
: "${SAMPLE_FN:=dpm_solver}"  # of the previews

# Clips
: "${VIDEO_SIZE:=20,3,64,64}"  # frames, channels, height, width
: "${AUDIO_SIZE:=2,80000}"     # channels, samples
: "${VIDEO_FPS:=4}"
: "${AUDIO_FPS:=16000}"

# Model
: "${NUM_CHANNELS:=128}"
: "${NUM_HEAD_CHANNELS:=64}"
: "${NUM_RES_BLOCKS:=2}"
: "${CROSS_ATTENTION_RESOLUTIONS:=2,4,8}"
: "${CROSS_ATTENTION_WINDOWS:=1,4,8}"
: "${CROSS_ATTENTION_SHIFT:=True}"
: "${VIDEO_ATTENTION_RESOLUTIONS:=2,4,8}"
: "${AUDIO_ATTENTION_RESOLUTIONS:=-1}"
: "${DROPOUT:=0.1}"
: "${USE_SCALE_SHIFT_NORM:=True}"
: "${RESBLOCK_UPDOWN:=True}"

# Diffusion
: "${DIFFUSION_STEPS:=1000}"
: "${NOISE_SCHEDULE:=linear}"
: "${LEARN_SIGMA:=False}"

# Optimisation
: "${LR:=2e-4}"
: "${BATCH_SIZE:=4}"  # per rank
: "${EMA_RATE:=0.9999}"
: "${USE_FP16:=True}"

need_path DATA_DIR /path/to/clips
use_environment
set_flags DATA_DIR OUTPUT_DIR NUM_WORKERS LOG_INTERVAL SAVE_INTERVAL SAMPLE_FN VIDEO_SIZE \
    AUDIO_SIZE VIDEO_FPS AUDIO_FPS NUM_CHANNELS NUM_HEAD_CHANNELS NUM_RES_BLOCKS \
    CROSS_ATTENTION_RESOLUTIONS CROSS_ATTENTION_WINDOWS CROSS_ATTENTION_SHIFT \
    VIDEO_ATTENTION_RESOLUTIONS AUDIO_ATTENTION_RESOLUTIONS DROPOUT USE_SCALE_SHIFT_NORM \
    RESBLOCK_UPDOWN DIFFUSION_STEPS NOISE_SCHEDULE LEARN_SIGMA LR BATCH_SIZE EMA_RATE \
    USE_FP16
launch multimodal_train.py "${FLAGS[@]}" "$@"
