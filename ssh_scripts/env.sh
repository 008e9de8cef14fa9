# Sourced by the launchers: finds or makes the Python environment, and starts a script on one or
# more ranks.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$REPO/.venv}
case $VENV in
/*) ;;
*) VENV=$PWD/$VENV ;;
esac

# Large tensors come and go at every step; given back to the system each time, they cost a third of
# the time on CPUs.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-68719476736}
# On GPUs segments that grow waste less where sizes vary, as in adaptive sampling. Torch takes either
# name, and ours would win over the older one.
if [ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True
fi

# The scripts find the package in this checkout, installed or not.
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}

die() {
    echo "error: $*" >&2
    exit 1
}

# is_supported PYTHON: it runs, and its version is one that setup.py allows.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1
}

# Prints the Python to make an environment from: $PYTHON, else the first fitting one on PATH.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
        [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not Python 3.11 or 3.12"
    done
    die "need Python 3.11 or 3.12 on PATH (found: $(python3 --version 2>&1 || true)); install one, or name it with PYTHON=..."
}

# has_pip DIR: an environment that works.
has_pip() {
    is_supported "$1/bin/python" && "$1/bin/python" -m pip --version >/dev/null 2>&1
}

# make_environment REQUIREMENTS...: an environment in $VENV, first on PATH, with the pins of these
# files and the package in it. What is there already is reused; pip runs only where pins have
# changed.
make_environment() {
    local python file
    local stale=() wanted=()
    if ! has_pip "$VENV"; then
        if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV" 2>/dev/null || echo file)" ]; then
            die "VENV=$VENV exists and is no virtual environment; choose another place"
        fi
        python=$(find_python) || exit 1
        echo "making a virtual environment in $VENV ($("$python" --version))"
        "$python" -m venv "$VENV" >/dev/null 2>&1 ||
            die "$python cannot make an environment in $VENV; is it writable, and venv installed (Debian, Ubuntu: apt-get install python3-venv)?"
        has_pip "$VENV" || die "the environment in $VENV is broken; remove that folder and run this again"
    fi
    export PATH=$VENV/bin:$PATH
    for file in "$@"; do
        if [ "$(cat "$VENV/.installed_$file" 2>/dev/null)" != "$(pins_of "$file")" ]; then
            stale+=("$file")
            wanted+=(-r "$REPO/$file")
        fi
    done
    [ ${#stale[@]} -gt 0 ] || return 0
    echo "installing ${stale[*]} into $VENV (minutes the first time)"
    pip_install "${wanted[@]}"
    pip_install --no-deps -e "$REPO"
    for file in "${stale[@]}"; do
        pins_of "$file" >"$VENV/.installed_$file"
    done
}

# pins_of REQUIREMENTS: what the stamp in the environment must say for them to be up to date.
pins_of() {
    (cd "$REPO" && echo "$REPO" && cksum "$1" setup.py)
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet "$@" >"$VENV/pip.log" 2>&1 ||
        die "pip install $* failed: $(grep -i error "$VENV/pip.log" | tail -n 1) (all of it: $VENV/pip.log)"
}

# Puts an environment that holds the requirements first on PATH: the active one, else $VENV.
use_environment() {
    local candidate
    for candidate in python "$VENV/bin/python" python3; do
        if "$candidate" -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, ["torch", "av"]))' \
            >/dev/null 2>&1; then
            PATH=$(dirname "$("$candidate" -c 'import sys; print(sys.executable)')"):$PATH
            export PATH
            return
        fi
    done
    die "no Python environment with the requirements; activate yours, or make one with: bash ssh_scripts/install.sh"
}

# launch SCRIPT FLAG...: run py_scripts/SCRIPT on NUM_GPUS ranks of each host. LAUNCHER is
#   mpiexec   the default; HOSTFILE lists the hosts, one a line, which ssh reaches without a
#             password; MPIEXEC_FLAGS go to mpiexec, such as "-iface eth1" if host names do not resolve
#   torchrun  with NNODES=N, start the same command on N hosts, with the address of the first in
#             MASTER_ADDR and with NODE_RANK 0 to N-1
#   srun      inside a job of Slurm: its tasks are the ranks, whatever NUM_GPUS says
launch() {
    local command=("$REPO/py_scripts/$1") start=(python)
    shift
    case $NUM_GPUS in
    '' | *[!0-9]* | 0*) die "NUM_GPUS=$NUM_GPUS: need a whole number, 1 or more" ;;
    esac
    case ${LAUNCHER:-mpiexec} in
    mpiexec) [ "$NUM_GPUS${HOSTFILE:-}" = 1 ] || start_by_mpiexec ;;
    torchrun) start_by_torchrun ;;
    srun) start_by_srun ;;
    *) die "LAUNCHER=$LAUNCHER: need mpiexec, torchrun or srun" ;;
    esac
    exec "${start[@]}" "${command[@]}" "$@"
}

# start_by_...: put into launch's array `start` what starts the ranks.
start_by_mpiexec() {
    local hosts=() flags=()
    command -v mpiexec >/dev/null || die "NUM_GPUS=$NUM_GPUS needs mpiexec, which is not on PATH; install mpich, or set NUM_GPUS=1"
    if [ -n "${HOSTFILE:-}" ]; then
        mapfile -t hosts < <(sed 's/#.*//' "$HOSTFILE" | grep -o '[^[:space:]].*')
        [ ${#hosts[@]} -gt 0 ] || die "HOSTFILE=$HOSTFILE: names no host"
        flags=(-f "$HOSTFILE" -ppn "$NUM_GPUS")
    fi
    check_mpiexec_flags
    share_cores
    # shellcheck disable=SC2206 # several flags in one variable
    start=(mpiexec ${MPIEXEC_FLAGS:-} "${flags[@]}" -n $((NUM_GPUS * (${#hosts[@]} > 1 ? ${#hosts[@]} : 1))) python)
}

# Published command lines have words of Open MPI, while the environment has MPICH.
check_mpiexec_flags() {
    local word
    for word in ${MPIEXEC_FLAGS:-}; do
        case $word in
        --allow-run-as-root | --oversubscribe) ;;
        *) continue ;;
        esac
        case $(mpiexec --version 2>&1 || true) in
        *"Open MPI"* | *OpenRTE*) ;;
        *) die "MPIEXEC_FLAGS=$MPIEXEC_FLAGS: $word is a flag of Open MPI; $(command -v mpiexec) is MPICH, which needs no such flag: leave it out" ;;
        esac
    done
}

start_by_torchrun() {
    local place=(--standalone)
    if [ "${NNODES:-1}" != 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] && [ -n "${NODE_RANK:-}" ] ||
            die "NNODES=$NNODES needs MASTER_ADDR, the address of the first host, and NODE_RANK, this host's number from 0"
        place=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
            --master_port "${MASTER_PORT:-29500}")
    fi
    share_cores
    start=(python -m torch.distributed.run "${place[@]}" --nproc_per_node "$NUM_GPUS")
}

start_by_srun() {
    command -v srun >/dev/null || die "LAUNCHER=srun: srun is not on PATH; unset LAUNCHER where there is no Slurm"
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}} # which srun does not take from the job
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
    start=(srun --kill-on-bad-exit=1 python)
}

# The ranks of a host share its cores.
share_cores() {
    local threads=$(($(nproc 2>/dev/null || echo 1) / NUM_GPUS))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
}

# need_path NAME EXAMPLE: variable NAME must be set, to paths that exist.
need_path() {
    [ -n "${!1}" ] || die "$1 is not set: $1=$2 bash $0"
    check_paths "$1"
}

# check_paths NAME...: each variable is empty or holds a path, or several with commas, that exist.
# Remote paths are left to the script.
check_paths() {
    local name path
    local paths=()
    for name in "$@"; do
        IFS=, read -r -a paths <<<"${!name}"
        for path in "${paths[@]}"; do
            case $path in
            *://*) ;;
            *) [ -e "$path" ] || die "$name=$path: no such file or folder" ;;
            esac
        done
    done
}

# set_flags NAME...: FLAGS becomes --name "$NAME" for each variable.
set_flags() {
    local name
    FLAGS=()
    for name in "$@"; do
        FLAGS+=("--${name,,}" "${!name}")
    done
}
