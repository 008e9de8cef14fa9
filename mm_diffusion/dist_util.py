"""Who else runs: ranks, devices, the process group. mpiexec, torchrun, srun or nothing at all may start us."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch as th
import torch.distributed as dist

MPIEXEC_VARIABLES = (
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_RANK",
)  # of mpiexec: MPICH and Intel MPI, Open MPI
PMI_VARIABLES = ("PMI_RANK", "PMIX_RANK")  # of other MPI launchers; srun may set them too
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
Result = TypeVar("Result")

JOINING = datetime.timedelta(
    minutes=10
)  # ranks may start minutes apart where many hosts read the same disks
TIMEOUT = datetime.timedelta(
    hours=2
)  # rank 0 may index a large folder, or draw previews, while the others wait
PROBE_SECONDS, GRACE_SECONDS = 2.0, 10.0
LOOPBACK, LOOPBACKS = "127.0.0.1", "127."
OTHER_RANK_GONE = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|recvvalue failed|communicator was aborted"
    r"|remote process exit",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, `local_rank` on its host, and the device it computes on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: th.device = th.device("cpu")  # noqa: RUF009 (immutable)


ALONE = World()


def setup_dist(devices: str = "") -> World:
    """Join the ranks that were started together; a lone process forms no group.

    `devices`: "" (what is visible), "G8" (8 GPUs a host) or a list of GPU numbers such as "0,1". Reads RANK,
    WORLD_SIZE and LOCAL_RANK, else asks MPI where mpiexec started us, else reads SLURM_*. NCCL between GPUs, gloo else.
    MASTER_ADDR and MASTER_PORT, where the ranks meet, are found out unless they are set.
    """
    rank, size, local_rank = _who_am_i()
    device = _device(devices, local_rank)
    if device.type == "cuda":
        th.cuda.set_device(device)
        tune_gpus()
    if size > 1 and not dist.is_initialized():
        _meet()
        _join(rank, size, device)
    return World(rank, size, local_rank, device)


def tune_gpus() -> None:
    """Convolutions by the kernel that is fastest for their sizes, which do not change; float32 is float32."""
    th.backends.cudnn.benchmark = True
    th.backends.cudnn.allow_tf32 = False


# ------------------------------------------------------------ who started us


def _launcher() -> str:
    """Who started this process: "torchrun" (or someone who sets its variables), "mpi", "srun" or "" (nobody)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return "torchrun"
    if any(
        name in env for name in MPIEXEC_VARIABLES
    ):  # before srun, through which mpiexec may reach other hosts
        return "mpi"
    if (
        int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    ):  # not SLURM_NTASKS: a batch script has that, yet is one process
        return "srun"
    return "mpi" if any(name in env for name in PMI_VARIABLES) else ""


def _who_am_i() -> tuple[int, int, int]:
    """Rank, number of ranks, rank on this host; where MPI tells, all ranks must ask."""
    env, launcher = os.environ, _launcher()
    if launcher == "torchrun":
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if launcher == "srun":
        return (
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env.get("SLURM_LOCALID", 0)),
        )
    if launcher == "mpi":
        world = _mpi().COMM_WORLD
        _check_mpi(world.Get_size())
        return world.Get_rank(), world.Get_size(), _on_this_host(_mpi()).Get_rank()
    return 0, 1, 0


def _mpi() -> Any:
    """The MPI module; importing it starts MPI. ValueError where there is no MPI library for it."""
    if (
        "OMPI_COMM_WORLD_RANK" in os.environ
    ):  # else mpi4py takes the MPICH that is installed beside it
        os.environ.setdefault("MPI4PY_LIBMPI", "libmpi.so.40")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"mpiexec started this process, but there is no MPI to ask ({_one_line(error)}); use the mpiexec that came"
            " with this Python environment, or torchrun"
        ) from error
    return MPI


def _on_this_host(mpi: Any) -> Any:
    return mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)


def _check_mpi(size: int) -> None:
    """ValueError where the launcher's MPI is not the one that mpi4py found, and every rank believes to be alone."""
    started = next((int(os.environ[name]) for name in SIZE_VARIABLES if name in os.environ), size)
    if size != started:
        raise ValueError(
            f"mpiexec started {started} ranks, but the MPI library that mpi4py found sees {size}: they are of different"
            " MPIs; use the mpiexec that came with this Python environment, or torchrun"
        )


# ------------------------------------------------------------ where the ranks meet


def _meet() -> None:
    """Put into the environment where the ranks meet: MASTER_ADDR and MASTER_PORT. What is set already stays."""
    env, launcher = os.environ, _launcher()
    if launcher == "srun":
        env.setdefault("MASTER_ADDR", _slurm_address())
        number = int(env.get("SLURM_JOB_ID", 0)) + 1009 * int(env.get("SLURM_STEP_ID", 0))
        env.setdefault("MASTER_PORT", str(20000 + number % 10000))
    elif launcher == "mpi":
        address, port = _mpi_address(_mpi())
        env.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def _slurm_address() -> str:
    """The host of rank 0, which need not be the one where srun was called."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    if int(os.environ.get("SLURM_STEP_NUM_NODES", 0)) == 1:
        return LOOPBACK
    host = first_host(nodes)
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ValueError(
            f"the host {host!r} of SLURM_STEP_NODELIST={nodes} has no address here ({error.strerror});"
            " set MASTER_ADDR to an address of the host of rank 0"
        ) from None
    return host


def first_host(nodes: str) -> str:
    """The first host of a Slurm list of nodes: "node[03-05,7],gpu1" -> "node03"."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0]) if found else ""


def _mpi_address(mpi: Any) -> tuple[str, int]:
    """Agree over MPI on an address of rank 0's host that the other hosts reach, and on a free port there."""
    world, here = mpi.COMM_WORLD, _on_this_host(mpi)
    with_rank_0 = here.bcast(world.Get_rank()) == 0
    with socket.create_server(("", 0), backlog=world.Get_size()) as probed:
        offer = _offered_addresses(here.Get_size() == world.Get_size()), probed.getsockname()[1]
        addresses, port = world.bcast(offer)
        reached = world.gather([a for a in addresses if with_rank_0 or _reaches(a, port)])
    chosen = next((a for a in addresses if all(a in those for those in reached or [])), "")
    chosen, port = world.bcast((chosen, int(os.environ.get("MASTER_PORT") or _free_port())))
    if not chosen:
        found = ", ".join(addresses) or "none found"
        raise ValueError(
            f"the other hosts reach the host of rank 0 at none of its addresses ({found}); set MASTER_ADDR to one that"
            " they reach"
        )
    return chosen, port


def _offered_addresses(one_host: bool) -> list[str]:
    """Addresses at which the ranks may meet on this host, the likeliest first. Its name need not mean anything."""
    if "MASTER_ADDR" in os.environ:
        return [os.environ["MASTER_ADDR"]]
    if one_host:
        return [LOOPBACK]
    found = [address for address in _interfaces() if not address.startswith(LOOPBACKS)]
    return sorted(
        found, key=lambda address: address != _address_towards("192.0.2.1")
    )  # first what leads outside


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def _reaches(address: str, port: int) -> bool:
    """Whether the host of rank 0 answers at this address of its; bridges of containers have the same on every host."""
    if address in _interfaces():
        return False
    with (
        contextlib.suppress(OSError),
        socket.create_connection((address, port), timeout=PROBE_SECONDS),
    ):
        return True
    return False


def _interfaces() -> dict[str, str]:
    """IPv4 address -> network interface, of this host; empty where the system does not tell."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(
                    probe, 0x8915, struct.pack("256s", name.encode()[:15])
                )  # SIOCGIFADDR
                found[socket.inet_ntoa(answer[20:24])] = name
    return found


def _address_towards(host: str) -> str:
    """Which address of ours leads to this host; "" if none does. Sends nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]
    return ""


# ------------------------------------------------------------ the process group


def _join(rank: int, size: int, device: th.device) -> None:
    """Form the process group; ValueError, in one line, where the ranks do not find each other."""
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=JOINING))
    except (RuntimeError, ValueError) as error:
        place = ":".join(
            os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT")
        )
        raise ValueError(
            f"the {size} ranks did not meet at {place}: {str(error).splitlines()[0]}; are all of them running, is"
            " MASTER_ADDR an address of the host of rank 0 that all reach, and MASTER_PORT free there?"
        ) from error
    if device.type == "cuda":
        _check_gpus(device, rank, size, store)
    if (
        "GLOO_SOCKET_IFNAME" not in os.environ
    ):  # gloo takes what the host's name means: nothing, or loopback, often
        interface = _interfaces().get(_address_among_ranks(rank, size, store))
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    store.set_timeout(TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def _check_gpus(device: th.device, rank: int, size: int, store: Any) -> None:
    """ValueError, of rank 0, where two ranks compute on one GPU, whatever number each knows it by."""
    store.set(f"GPU of rank {rank}", str(th.cuda.get_device_properties(device).uuid))
    owners: dict[bytes, int] = {}
    for other, gpu in enumerate(
        store.multi_get([f"GPU of rank {r}" for r in range(size)]) if rank == 0 else ()
    ):
        if gpu in owners:
            raise ValueError(
                f"ranks {owners[gpu]} and {other} both got GPU {gpu.decode()}: start at most as many ranks on a host as"
                " it shows GPUs, and let --devices, if given, name as many"
            )
        owners[gpu] = other


def _address_among_ranks(rank: int, size: int, store: Any) -> str:
    """Our address towards the other ranks.

    It is the one that leads to MASTER_ADDR; on the host of rank 0 that may be loopback, and the one that leads to a
    rank elsewhere, if there is any, counts.
    """
    own = _address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address of rank {rank}", own)
    if not own.startswith(LOOPBACKS):
        return own
    everyone = (
        address.decode()
        for address in store.multi_get([f"address of rank {r}" for r in range(size)])
    )
    far = next((address for address in everyone if not address.startswith(LOOPBACKS)), "")
    return _address_towards(far) or own


def _device(devices: str, local_rank: int) -> th.device:
    count = th.cuda.device_count()
    if count == 0:
        if devices:
            raise ValueError(
                f"devices {devices!r}: this host shows no GPU; leave --devices empty to run on the CPU"
            )
        return th.device("cpu")
    try:
        numbers = (
            range(int(devices[1:]))
            if devices.startswith("G")
            else [int(n) for n in devices.split(",") if n]
        )
    except ValueError:
        raise ValueError(
            f"devices {devices!r}: use '' (what is visible), 'G8' or a list such as '0,1'"
        ) from None
    numbers = list(numbers) or list(range(count))
    if max(numbers) >= count:
        raise ValueError(f"devices {devices!r}: this host shows {count} GPUs, numbered from 0")
    return th.device("cuda", numbers[local_rank % len(numbers)])


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def from_rank_0(make: Callable[[], Result]) -> Result:
    """What `make()` gives on rank 0, on every rank."""
    if not dist.is_initialized():
        return make()
    box: list = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def all_sum(values: th.Tensor) -> th.Tensor:
    """The sum over ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_gather(values: th.Tensor) -> th.Tensor:
    """[N] of each rank -> [ranks * N] in order of rank, on every rank; N is the same for all."""
    if not dist.is_initialized():
        return values
    rows = [th.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return th.cat(rows)


def max_of_ranks(value: int) -> int:
    """The largest of the ranks' values, on every rank; between hosts, without a wait for the devices."""
    if not dist.is_initialized():
        return value
    box = th.tensor(value)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Around a script: the user's mistakes end it with one line and status 1, anything else with its traceback.

    Either way the whole job ends: a rank that fails takes the others down instead of leaving them to wait.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        end_job(f"error: {_one_line(error)}")
    except Exception as error:
        if (
            isinstance(error, RuntimeError)
            and "MASTER_ADDR" in os.environ
            and OTHER_RANK_GONE.search(str(error))
        ):
            time.sleep(
                GRACE_SECONDS
            )  # the rank that failed says why, and mostly the launcher ends us meanwhile
            end_job(f"error: another rank is gone ({_one_line(error)})", patience=0)
        end_job(traceback.format_exc())
    if dist.is_initialized():
        dist.destroy_process_group()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def end_job(message: str, status: int = 1, patience: float = 2) -> NoReturn:
    """Say why, once for all ranks, and end them all with this exit status.

    Other ranks than 0 wait for `patience` seconds: where all make the same mistake rank 0 speaks, and ends them.
    """
    rank, size, mpi = _who_fails()
    if size > 1 and rank > 0:
        time.sleep(patience)
    sys.stdout.flush()
    sys.stderr.write(f"{f'[rank {rank}] ' if rank else ''}{message.rstrip()}\n")
    sys.stderr.flush()
    _tell_torchrun(message)
    if size > 1 and mpi:
        time.sleep(0.5)  # mpiexec drops what it has not yet passed on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nothing after the message
        mpi.COMM_WORLD.Abort(status)
    if size > 1:
        os._exit(
            status
        )  # torchrun and srun end the other ranks; a clean exit would first wait for them
    sys.exit(status)


def _who_fails() -> tuple[int, int, Any]:
    """Rank, number of ranks and MPI if it started us, found out without waiting for the others, who may be anywhere."""
    if _launcher() != "mpi":
        return *_who_am_i()[:2], None
    try:
        mpi = _mpi()
    except ValueError:
        return 0, 1, None
    return mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size(), mpi


def _tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for it, so that its closing report shows it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": details}}, file)
