#!/usr/bin/env bash
#SBATCH --job-name=multimodal_train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains the joint model as a job of Slurm, call after call of its time limit: 300 s before the end
# the trainer saves, and the job goes back into the queue, to continue from there. The variables of
# multimodal_train.sh hold, flags of sbatch replace those above, and further flags follow:
#   DATA_DIR=/shared/clips OUTPUT_DIR=/shared/run sbatch --nodes 4 ssh_scripts/multimodal_train_slurm.sh --dropout 0
set -euo pipefail
REPO=${REPO:-${SLURM_SUBMIT_DIR:-$PWD}} # Slurm runs a copy of this file, elsewhere
[ -f "$REPO/ssh_scripts/env.sh" ] || {
    echo "error: REPO=$REPO is not the repository; call sbatch in its folder, or set REPO to it" >&2
    exit 1
}

LAUNCHER=srun bash "$REPO/ssh_scripts/multimodal_train.sh" "$@" &
trainer=$! out_of_time='' status=0
trap 'out_of_time=1; kill -USR1 "$trainer"' USR1 # srun hands it to every rank
wait "$trainer" || status=$?
if [ -n "$out_of_time" ]; then # the signal ended the wait, not the trainer
    status=0
    wait "$trainer" || status=$?
    [ "$status" != 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
