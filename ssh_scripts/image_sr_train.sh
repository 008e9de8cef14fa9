#!/usr/bin/env bash
# Trains the upsampler with the published settings. Each variable can be set from outside, and further flags follow:
#   DATA_DIR=frames NUM_GPUS=2 bash ssh_scripts/image_sr_train.sh --use_checkpoint True
# Frames come from videos with py_scripts/extract_video.py; a folder of videos does as well.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# Run
: "${DATA_DIR:=}"  # folder of pictures or videos; needed
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

need_path DATA_DIR "$DATA_DIR" /path/to/frames
use_environment
launch image_sr_train.py \
    --data_dir "$DATA_DIR" --output_dir "$OUTPUT_DIR" --init_checkpoint "$INIT_CHECKPOINT" \
    --num_workers "$NUM_WORKERS" --log_interval "$LOG_INTERVAL" --save_interval "$SAVE_INTERVAL" \
    --large_size "$LARGE_SIZE" --small_size "$SMALL_SIZE" --sr_num_channels "$SR_NUM_CHANNELS" \
    --sr_num_res_blocks "$SR_NUM_RES_BLOCKS" --sr_num_heads "$SR_NUM_HEADS" \
    --sr_attention_resolutions "$SR_ATTENTION_RESOLUTIONS" --sr_dropout "$SR_DROPOUT" \
    --sr_use_scale_shift_norm "$SR_USE_SCALE_SHIFT_NORM" --sr_resblock_updown "$SR_RESBLOCK_UPDOWN" \
    --sr_class_cond "$SR_CLASS_COND" --sr_diffusion_steps "$SR_DIFFUSION_STEPS" \
    --sr_noise_schedule "$SR_NOISE_SCHEDULE" --sr_learn_sigma "$SR_LEARN_SIGMA" \
    --lr "$LR" --batch_size "$BATCH_SIZE" --ema_rate "$EMA_RATE" --use_fp16 "$USE_FP16" \
    "$@"
