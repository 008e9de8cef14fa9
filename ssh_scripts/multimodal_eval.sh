#!/usr/bin/env bash
# Evaluates a folder of clips against true ones. Each variable can be set from outside, and further flags follow:
#   SAMPLES_PATH=output/multimodal_sample/original REF_PATH=SAVGBench_Dataset_Evaluation/video_eval \
#       I3D_PATH=i3d_torchscript.pt AUDIO_EMBEDDING_PATH=vggish.pt bash ssh_scripts/multimodal_eval.sh
# Nothing is downloaded: a metric whose weights are not given is left out, and the report says where to get them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

: "${SAMPLES_PATH:=}"  # folder of clips; needed
: "${REF_PATH:=}"  # folder of true clips; empty: only what needs no comparison
: "${OUTPUT_DIR:=$SAMPLES_PATH}"  # where metrics.json goes
: "${NUM_GPUS:=8}"  # ranks; where there is no GPU they run on the CPU
: "${VIDEO_SIZE:=20,3,64,64}"  # what clips are read at; for upsampled ones 20,3,256,256
: "${AUDIO_SIZE:=2,80000}"

: "${I3D_PATH:=}"  # TorchScript I3D: FVD and KVD
: "${AUDIO_EMBEDDING_PATH:=}"  # TorchScript audio embedding: FAD
: "${DETECTOR_PATH:=}"  # weights of torchvision's detector: Spatial AV-Align
: "${BOXES_DIR:=}"  # or the boxes of any detector: CLIP.csv with frame,category,x0,y0,x1,y1
: "${EVENTS_DIR:=}"  # sound events: CLIP.csv with frame,category,x; empty: located in the sound

need_path SAMPLES_PATH "$SAMPLES_PATH" /path/to/clips
for name in REF_PATH I3D_PATH AUDIO_EMBEDDING_PATH DETECTOR_PATH BOXES_DIR EVENTS_DIR; do
    [ -z "${!name}" ] || need_path "$name" "${!name}" /path
done
use_environment
launch eval.py \
    --samples_path "$SAMPLES_PATH" --ref_path "$REF_PATH" --output_dir "$OUTPUT_DIR" \
    --video_size "$VIDEO_SIZE" --audio_size "$AUDIO_SIZE" \
    --i3d_path "$I3D_PATH" --audio_embedding_path "$AUDIO_EMBEDDING_PATH" --detector_path "$DETECTOR_PATH" \
    --boxes_dir "$BOXES_DIR" --events_dir "$EVENTS_DIR" \
    "$@"
