#!/usr/bin/env bash
# Evaluates a folder of clips against reference clips. Set variables and flags as in:
#   SAMPLES_PATH=output/multimodal_sample/original REF_PATH=SAVGBench_Dataset_Evaluation/video_eval \
#       I3D_PATH=i3d_torchscript.pt AUDIO_EMBEDDING_PATH=vggish.pt bash ssh_scripts/multimodal_eval.sh
# Nothing is downloaded: a metric without weights is left out; the report names their source.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

: "${SAMPLES_PATH:=}"  # folder of clips; needed
: "${REF_PATH:=}"  # folder of reference clips; empty: only metrics without a reference
: "${OUTPUT_DIR:=$SAMPLES_PATH}"  # where metrics.json goes
: "${NUM_GPUS:=8}"  # ranks; where there is no GPU they run on the CPU
: "${VIDEO_SIZE:=20,3,64,64}"  # what clips are read at; for upsampled ones 20,3,256,256
: "${AUDIO_SIZE:=2,80000}"

: "${I3D_PATH:=}"  # I3D, i3d_pretrained_400.pt or TorchScript: FVD and KVD
: "${AUDIO_EMBEDDING_PATH:=}"  # TorchScript audio embedding: FAD
: "${DETECTOR_PATH:=}"  # weights of torchvision's detector: Spatial AV-Align
: "${BOXES_DIR:=}"  # or the boxes of any detector: CLIP.csv with frame,category,x0,y0,x1,y1
: "${EVENTS_DIR:=}"  # audio events: CLIP.csv with frame,category,x; empty: localised in the audio

need_path SAMPLES_PATH /path/to/clips
check_paths REF_PATH I3D_PATH AUDIO_EMBEDDING_PATH DETECTOR_PATH BOXES_DIR EVENTS_DIR
use_environment
set_flags SAMPLES_PATH REF_PATH OUTPUT_DIR VIDEO_SIZE AUDIO_SIZE I3D_PATH AUDIO_EMBEDDING_PATH \
    DETECTOR_PATH BOXES_DIR EVENTS_DIR
launch eval.py "${FLAGS[@]}" "$@"
