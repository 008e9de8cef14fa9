#!/usr/bin/env bash
# Trains the joint model on several hosts that see the same files; start it on one of them. The
# variables of multimodal_train.sh apply; further flags follow. Any other launcher runs on
# several hosts in the same way.
#   HOSTFILE=hosts.txt DATA_DIR=/shared/clips bash ssh_scripts/multimodal_train_hosts.sh --use_checkpoint True
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

: "${HOSTFILE:=}"        # one host a line, each of which ssh reaches without a password; needed
: "${GPUS_PER_NODE:=8}"  # ranks on each host

need_path HOSTFILE hosts.txt
export HOSTFILE NUM_GPUS=$GPUS_PER_NODE
exec bash "$REPO/ssh_scripts/multimodal_train.sh" "$@"
