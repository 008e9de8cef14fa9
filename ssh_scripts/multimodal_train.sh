#!/usr/bin/env bash
# Trains the joint model with the published settings. Each variable can be set from outside, and further flags follow:
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

need_path DATA_DIR "$DATA_DIR" /path/to/clips
use_environment
launch multimodal_train.py \
    --data_dir "$DATA_DIR" --output_dir "$OUTPUT_DIR" --num_workers "$NUM_WORKERS" \
    --log_interval "$LOG_INTERVAL" --save_interval "$SAVE_INTERVAL" --sample_fn "$SAMPLE_FN" \
    --video_size "$VIDEO_SIZE" --audio_size "$AUDIO_SIZE" --video_fps "$VIDEO_FPS" --audio_fps "$AUDIO_FPS" \
    --num_channels "$NUM_CHANNELS" --num_head_channels "$NUM_HEAD_CHANNELS" --num_res_blocks "$NUM_RES_BLOCKS" \
    --cross_attention_resolutions "$CROSS_ATTENTION_RESOLUTIONS" \
    --cross_attention_windows "$CROSS_ATTENTION_WINDOWS" --cross_attention_shift "$CROSS_ATTENTION_SHIFT" \
    --video_attention_resolutions "$VIDEO_ATTENTION_RESOLUTIONS" \
    --audio_attention_resolutions "$AUDIO_ATTENTION_RESOLUTIONS" \
    --dropout "$DROPOUT" --use_scale_shift_norm "$USE_SCALE_SHIFT_NORM" --resblock_updown "$RESBLOCK_UPDOWN" \
    --diffusion_steps "$DIFFUSION_STEPS" --noise_schedule "$NOISE_SCHEDULE" --learn_sigma "$LEARN_SIGMA" \
    --lr "$LR" --batch_size "$BATCH_SIZE" --ema_rate "$EMA_RATE" --use_fp16 "$USE_FP16" \
    "$@"
