#!/usr/bin/env bash
# Draws clips with the published settings. Each variable can be set from outside, and further flags follow:
#   MODEL_PATH=output/multimodal_train SR_MODEL_PATH=output/image_sr_train NUM_GPUS=1 \
#       bash ssh_scripts/multimodal_sample_sr.sh --seed 7
# The gallery of the clips is OUTPUT_DIR/index.html; its path is the last line that is printed.
# The sizes of the models are not given here: a checkpoint carries its flags, and one without is of the published size.
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
: "${SR_SAMPLE_FN:=ddim}"  # on the diffusion steps that the checkpoint tells, 1100 where it tells none
: "${SR_TIMESTEP_RESPACING=ddim25}"  # set it empty for dpm_solver
: "${SR_BATCH_SIZE:=0}"  # frames per rank at a time; 0: what fits in memory
: "${SR_USE_FP16:=$USE_FP16}"
: "${LOAD_NOISE:=}"  # .npy with one noise picture for all clips

# Metrics
: "${REF_PATH:=}"  # folder of true clips to compare with at the end; empty: no metrics

need_path MODEL_PATH "$MODEL_PATH" /path/to/checkpoint.pt
[ -z "$SR_MODEL_PATH" ] || need_path SR_MODEL_PATH "$SR_MODEL_PATH" /path/to/upsampler.pt
[ -z "$REF_PATH" ] || need_path REF_PATH "$REF_PATH" /path/to/video_dev
[ -z "$LOAD_NOISE" ] || need_path LOAD_NOISE "$LOAD_NOISE" /path/to/noise.npy
use_environment
launch multimodal_sample_sr.py \
    --multimodal_model_path "$MODEL_PATH" --output_dir "$OUTPUT_DIR" --all_save_num "$ALL_SAVE_NUM" \
    --batch_size "$BATCH_SIZE" --sample_fn "$SAMPLE_FN" --seed "$SEED" --use_fp16 "$USE_FP16" \
    --sr_model_path "$SR_MODEL_PATH" --sr_sample_fn "$SR_SAMPLE_FN" --sr_timestep_respacing "$SR_TIMESTEP_RESPACING" \
    --sr_batch_size "$SR_BATCH_SIZE" --sr_use_fp16 "$SR_USE_FP16" --load_noise "$LOAD_NOISE" \
    --ref_path "$REF_PATH" \
    "$@"
