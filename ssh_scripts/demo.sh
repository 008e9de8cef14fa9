#!/usr/bin/env bash
# From a fresh clone to new clips with stereo audio: environment, toy data, a small joint model, a
# small upsampler, 16 clips, audio for 16 videos, videos for their audio, a few metrics.
# bash ssh_scripts/demo.sh [--minutes N]      train the joint model for about N minutes, not a fixed
# number of steps
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

DEMO_DIR=${DEMO_DIR:-$REPO/demo_output}
NUM_CLIPS=${NUM_CLIPS:-256}
STEPS=${STEPS:-600}
SR_STEPS=${SR_STEPS:-300}
BATCH=16
MINUTES=
while [ $# -gt 0 ]; do
    case $1 in
    --minutes)
        MINUTES=${2:-}
        [[ $MINUTES =~ ^[1-9][0-9]*$ ]] || die "--minutes ${MINUTES:-(nothing)}: need a whole number of minutes, 1 or more"
        shift 2
        ;;
    *) die "$1: the only flag is --minutes N" ;;
    esac
done

SIZES=(--video_size 8,3,8,8 --audio_size 2,1024 --video_fps 4 --audio_fps 512)
MODEL=(--num_channels 32 --channel_mult 1,2,2 --num_res_blocks 1 --num_head_channels 32
    --cross_attention_shift False --predict_xstart True)
TASKS=(--task_mix joint:0.5,video2audio:0.25,audio2video:0.25)
UPSAMPLER=(--small_size 8 --large_size 32 --sr_num_channels 32 --sr_channel_mult 1,2,2 --sr_num_res_blocks 1
    --sr_attention_resolutions -1 --sr_learn_sigma False --sr_predict_xstart True)
TRAINING=(--lr 1e-3 --lr_warmup_steps 100 --grad_clip 1 --ema_rate 0.995 --num_workers 1
    --save_interval 1000000 --log_interval 100)
SR_TRAINING=(--lr 1e-3 --lr_warmup_steps 50 --grad_clip 1 --ema_rate 0.99 --num_workers 1
    --save_interval 1000000 --log_interval 100)

make_environment requirements_training_joint.txt
start=$SECONDS
mkdir -p "$DEMO_DIR"
run=1
while [ -e "$DEMO_DIR/run_$run" ]; do run=$((run + 1)); done
RUN=$DEMO_DIR/run_$run

# On a CPU several ranks of one thread each are faster than one rank of several threads at these
# sizes.
RANKS=1
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    for n in 2 4 8; do [ "$(nproc)" -lt $n ] || RANKS=$n; done
    export OMP_NUM_THREADS=1
fi
run_ranks() { (NUM_GPUS=$RANKS launch "$@"); }

train() { # train FOLDER STEPS FLAG...
    run_ranks multimodal_train.py --data_dir "$DEMO_DIR/data" --val_dir "$DEMO_DIR/held_out" \
        --cache_dir "$DEMO_DIR/cache" --output_dir "$1" --lr_anneal_steps "$2" \
        --batch_size $((BATCH / RANKS)) "${SIZES[@]}" "${MODEL[@]}" "${TASKS[@]}" "${TRAINING[@]}" "${@:3}"
}

generate_from_held_out() { # generate_from_held_out SCRIPT FOLDER
    run_ranks "$1" --multimodal_model_path "$RUN" --data_dir "$DEMO_DIR/held_out" --output_dir "$2" \
        --sample_fn dpm_solver++ --all_save_num 16 --batch_size 8 --gallery False
}

judge() { # judge CLIPS FLAG...: print the spatial alignment
    python "$REPO/py_scripts/spatial_alignment.py" "$1" "${SIZES[@]}" "${@:2}"
}

echo "1/6 toy data: $NUM_CLIPS clips in $DEMO_DIR/data, 16 in $DEMO_DIR/held_out"
python "$REPO/py_scripts/make_toy_dataset.py" "$DEMO_DIR/data" --num_clips "$NUM_CLIPS" --size 64 --seconds 2
python "$REPO/py_scripts/make_toy_dataset.py" "$DEMO_DIR/held_out" --num_clips 16 --size 64 --seconds 2 --seed 1

if [ -n "$MINUTES" ]; then
    trial=$(mktemp -d)
    trap 'rm -rf "$trial"' EXIT
    echo "timing a few steps"
    train "$trial" 20 --preview_clips 0 --log_interval 20 >/dev/null
    rate=$(awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == "samples_per_second") c = i } END { print $c }' \
        "$trial/progress.csv")
    STEPS=$(awk -v m="$MINUTES" -v r="$rate" -v b="$BATCH" 'BEGIN { n = int(60 * m * r / b); print n > 1 ? n : 1 }')
fi

echo "2/6 training the joint model for $STEPS steps; log and previews in $RUN"
train "$RUN" "$STEPS"

echo "3/6 training the upsampler for $SR_STEPS steps; log and previews in $RUN/upsampler"
run_ranks image_sr_train.py --data_dir "$DEMO_DIR/data" --output_dir "$RUN/upsampler" --lr_anneal_steps "$SR_STEPS" \
    "${UPSAMPLER[@]}" --batch_size $((BATCH / RANKS)) "${SR_TRAINING[@]}"

echo "4/6 sampling 16 clips from the moving averages of the weights, and upsampling them"
run_ranks multimodal_sample_sr.py --multimodal_model_path "$RUN" --sr_model_path "$RUN/upsampler" \
    --sr_timestep_respacing ddim25 --output_dir "$RUN/generated" --all_save_num 16 --batch_size 8 \
    --gallery False

echo "5/6 generating audio for 16 held-out videos, and videos for their audio"
generate_from_held_out video2audio_sample.py "$RUN/video2audio"
generate_from_held_out audio2video_sample_sr.py "$RUN/audio2video"

echo "6/6 evaluating"
CROSS_MODAL=$RUN/watch_cross_modal
judge "$RUN/generated/original" --data_dir "$DEMO_DIR/data"
judge "$RUN/generated/sr_mp4" --video_size 8,3,32,32 --contact_sheet "$RUN/contact_sheet.png" --watch_dir "$RUN/watch"
judge "$RUN/video2audio/ground_truth" --watch_dir "$CROSS_MODAL/ground_truth"
judge "$RUN/video2audio/original" --watch_dir "$CROSS_MODAL/video2audio"
judge "$RUN/audio2video/original" --watch_dir "$CROSS_MODAL/audio2video"
for folder in "$RUN/watch" "$CROSS_MODAL"; do
    python "$REPO/py_scripts/gallery.py" "$folder" >/dev/null
done
cat <<EOF

clips            $RUN/generated: sr_mp4 (upsampled) and original (mp4), audios (wav)
to watch         $RUN/watch (the upsampled ones, 256 pixels and 16 kHz, for any player)
gallery          $RUN/watch/index.html (open it in a browser: frames, spectrograms, detected positions, scores)
cross-modal      $CROSS_MODAL/index.html (audio generated for held-out videos, and videos for their audio)
contact sheet    $RUN/contact_sheet.png (a row per clip; the bar below shows the horizontal position of the audio)
checkpoints      $RUN and $RUN/upsampler
$(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s after installation
EOF
