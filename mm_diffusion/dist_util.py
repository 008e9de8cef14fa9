"""Ranks, devices and the process group of jobs started by mpiexec, torchrun, srun or nothing."""

from __future__ import annotations

import fcntl
import io
import os
import re
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch as th
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from . import logger
from .devices.gpus import check_gpu, tune_gpus, unused_gpus

# Of mpiexec: MPICH and Intel MPI, Open MPI
MPIEXEC_VARIABLES = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_RANK")
# Of other MPI launchers; srun may set them, too
PMI_VARIABLES = ("PMI_RANK", "PMIX_RANK")
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Launcher -> the variables of the rank, the number of ranks and the rank on this host
RANK_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
OTHER_LAUNCHERS = "the mpiexec of this Python environment, or torchrun"
# Ranks may start minutes apart where many hosts read the same disks
JOINING = timedelta(minutes=10)
# Rank 0 may search a large folder, or sample previews, while the others wait
TIMEOUT = timedelta(hours=2)
PROBE_SECONDS, GRACE_SECONDS = 2.0, 10.0
LOOPBACK, LOOPBACKS = "127.0.0.1", "127."
SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of an interface
OTHER_RANK_GONE = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|recvvalue failed"
    r"|communicator was aborted|remote process exit",
    re.IGNORECASE,
)
USER_ERRORS = (ValueError, OSError, FloatingPointError)
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process: `rank` of `size`, `local_rank` on its host, and the device it computes on."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: th.device = th.device("cpu")  # noqa: RUF009 (immutable)


SINGLE_PROCESS = World()


def setup_dist(devices: str = "", deterministic: bool = False) -> World:
    """Join the process group of all ranks (NCCL for GPUs, gloo); a single process forms none.

    `devices`: "" (all visible), "G8" (up to 8 GPUs a host) or a list of GPU numbers such as "0,1".
    MASTER_ADDR and MASTER_PORT are chosen where they are not set.
    """
    rank, size, local_rank = read_rank()
    device = _device(devices, local_rank)
    if device.type == "cuda":
        check_gpu(device)
        th.cuda.set_device(device)
        tune_gpus(deterministic)
    elif rank == 0 and (reason := unused_gpus(size)):
        logger.warn(reason)
    if size > 1 and not dist.is_initialized():
        set_rendezvous()
        _join(rank, size, device)
    return World(rank, size, local_rank, device)


def dev() -> th.device:
    """The device of this process, as `setup_dist` chose it."""
    if th.cuda.is_available():
        return th.device("cuda", th.cuda.current_device())
    return th.device("cpu")


def _device(devices: str, local_rank: int) -> th.device:
    """The device of a rank: GPUs by rank modulo their number, or the CPU where there are none."""
    if not re.fullmatch(r"G[1-9]\d*|[\d, ]*", devices):
        raise ValueError(f"--devices {devices!r}: need '', 'G8' or a list such as '0,1'")
    count = th.cuda.device_count()
    numbers = [int(number) for number in re.findall(r"\d+", devices)]
    if devices.startswith("G"):  # as published, whatever the host has
        numbers = list(range(min(count, *numbers)))
    elif not numbers:
        numbers = list(range(count))
    if not numbers:
        return th.device("cpu")
    if max(numbers) >= count:
        raise ValueError(f"--devices {devices!r}: this host has {count} GPUs (empty: all, or CPU)")
    return th.device("cuda", numbers[local_rank % len(numbers)])


# ------------------------------------------------------------ ranks


def _launcher() -> str:
    """ "torchrun" (or whoever sets its variables), "mpi", "srun", or "" for a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return "torchrun"
    # Before srun, through which mpiexec may reach other hosts
    if any(name in env for name in MPIEXEC_VARIABLES):
        return "mpi"
    # Not SLURM_NTASKS, which is also set in a batch script, a single process
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "srun"
    return "mpi" if any(name in env for name in PMI_VARIABLES) else ""


def read_rank() -> tuple[int, int, int]:
    """Rank, number of ranks, rank on this host; with MPI a collective call."""
    launcher = _launcher()
    if launcher == "mpi":
        world = _mpi().COMM_WORLD
        _check_mpi(world.Get_size())
        return world.Get_rank(), world.Get_size(), _on_this_host().Get_rank()
    if not launcher:
        return 0, 1, 0
    rank, size, local_rank = RANK_VARIABLES[launcher]
    return int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local_rank, 0))


def _mpi() -> Any:
    """The MPI module; importing it starts MPI. ValueError where it finds no MPI library."""
    # Open MPI's library, where Open MPI launched us; mpi4py prefers an MPICH installed beside it
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        os.environ.setdefault("MPI4PY_LIBMPI", "libmpi.so.40")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"mpi4py finds no MPI library ({_one_line(error)}); use {OTHER_LAUNCHERS}"
        ) from error
    return MPI


def _on_this_host() -> Any:
    return _mpi().COMM_WORLD.Split_type(_mpi().COMM_TYPE_SHARED)


def _check_mpi(size: int) -> None:
    """ValueError if mpi4py uses another MPI than the launcher: each rank would run by itself."""
    launched = [int(os.environ[name]) for name in SIZE_VARIABLES if name in os.environ]
    if launched and launched[0] != size:
        raise ValueError(
            f"mpiexec launched {launched[0]} ranks, mpi4py's MPI sees {size}; use {OTHER_LAUNCHERS}"
        )


# ------------------------------------------------------------ rendezvous


def set_rendezvous() -> None:
    """Set MASTER_ADDR and MASTER_PORT for the launcher in use; values set by the user stay."""
    env, launcher = os.environ, _launcher()
    if launcher == "srun":
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _slurm_address()
        number = int(env.get("SLURM_JOB_ID", 0)) + 1009 * int(env.get("SLURM_STEP_ID", 0))
        env.setdefault("MASTER_PORT", str(20000 + number % 10000))
    elif launcher == "mpi":
        address, port = _mpi_address()
        env.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def _slurm_address() -> str:
    """The host of rank 0, which need not be the one where srun was called."""
    if int(os.environ.get("SLURM_STEP_NUM_NODES", 0)) == 1:
        return LOOPBACK
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    host = first_host(nodes)
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ValueError(
            f"SLURM_STEP_NODELIST={nodes}: host {host!r} has no address here ({error.strerror});"
            " set MASTER_ADDR to an address of rank 0's host"
        ) from None
    return host


def first_host(nodes: str) -> str:
    """The first host of a Slurm list of nodes: "node[03-05,7],gpu1" -> "node03"."""
    first, *_ = re.findall(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _mpi_address() -> tuple[str, int]:
    """Agree over MPI on an address of rank 0's host that all hosts reach, and a free port there."""
    world, here = _mpi().COMM_WORLD, _on_this_host()
    with_rank_0 = here.bcast(world.Get_rank()) == 0
    with socket.create_server(("", 0), backlog=world.Get_size()) as probed:
        offered = _offered_addresses(one_host=here.Get_size() == world.Get_size())
        addresses, port = world.bcast((offered, probed.getsockname()[1]))
        reached = {a for a in addresses if with_rank_0 or _reaches(a, port)}
        reached_by_all = set.intersection(*world.allgather(reached))
    if not reached_by_all:
        raise ValueError(
            f"other hosts reach no address of rank 0's ({', '.join(addresses) or 'none found'});"
            " set MASTER_ADDR to one that they reach"
        )
    chosen = next(address for address in addresses if address in reached_by_all)
    return chosen, world.bcast(int(os.environ.get("MASTER_PORT") or _free_port()))


def _offered_addresses(one_host: bool) -> list[str]:
    """Addresses of this host for the rendezvous, likeliest first; its name may not resolve."""
    if "MASTER_ADDR" in os.environ:
        return [os.environ["MASTER_ADDR"]]
    if one_host:
        return [LOOPBACK]
    outward = _address_towards("192.0.2.1")
    found = dict.fromkeys([outward, *_interfaces()])
    return [address for address in found if address and not address.startswith(LOOPBACKS)]


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def _reaches(address: str, port: int) -> bool:
    """Whether another host answers at this address; bridges of containers have the same on all."""
    if address not in _interfaces():
        with suppress(OSError):
            socket.create_connection((address, port), timeout=PROBE_SECONDS).close()
            return True
    return False


def _interfaces() -> dict[str, str]:
    """IPv4 address -> network interface of this host."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # an interface without an address
                found[socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])] = name
    return found


def _address_towards(host: str) -> str:
    """Our address on the route to a host; "" without a route. Sends nothing."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]
    return ""


# ------------------------------------------------------------ the process group


def _join(rank: int, size: int, device: th.device) -> None:
    """Form the process group; ValueError, in one line, if the ranks do not find each other."""
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=JOINING))
    except (RuntimeError, ValueError) as error:
        host, port = (os.environ.get(f"MASTER_{name}", "(not set)") for name in ("ADDR", "PORT"))
        raise ValueError(
            f"the {size} ranks did not meet at {host}:{port}: {str(error).splitlines()[0]}; check"
            " that all run, reach rank 0's host at MASTER_ADDR, and that MASTER_PORT is free there"
        ) from error
    if device.type == "cuda":
        _check_gpus(device, rank, size, store)
    # By default gloo uses what the host's name resolves to, which is often loopback, or nothing
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        address = _address_among_ranks(rank, size, store)
        if interface := _interfaces().get(address):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    store.set_timeout(TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def _check_gpus(device: th.device, rank: int, size: int, store: Any) -> None:
    """ValueError, on rank 0, if two ranks use the same physical GPU."""
    store.set(f"GPU of rank {rank}", str(th.cuda.get_device_properties(device).uuid))
    if rank != 0:
        return
    gpus = store.multi_get([f"GPU of rank {r}" for r in range(size)])
    for second, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) != second:
            raise ValueError(
                f"ranks {first} and {second} both use GPU {gpu.decode()}; start at most one rank"
                " per GPU, and let --devices name as many"
            )


def _address_among_ranks(rank: int, size: int, store: Any) -> str:
    """Our address on the route to MASTER_ADDR; instead of loopback, to a rank on another host."""
    own = _address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address of rank {rank}", own)
    if not own.startswith(LOOPBACKS):
        return own
    found = (a.decode() for a in store.multi_get([f"address of rank {r}" for r in range(size)]))
    other = next((address for address in found if not address.startswith(LOOPBACKS)), LOOPBACK)
    return _address_towards(other) or own


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def group_rank() -> tuple[int, int]:
    """This process's rank and the number of ranks in the process group; (0, 1) without one."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def to_rank_0(value: Result) -> list[Result]:
    """On rank 0 the values of all ranks, in order of rank; an empty list on the others."""
    rank, size = group_rank()
    if size == 1:
        return [value]
    box: list = [None] * size if rank == 0 else []
    dist.gather_object(value, box if rank == 0 else None)
    return box


def from_all(value: Result) -> list[Result]:
    """The values of all ranks, in order of rank, on every rank."""
    _, size = group_rank()
    box: list = [value] * size
    if size > 1:
        dist.all_gather_object(box, value)
    return box


def from_rank_0(make: Callable[[], Result]) -> Result:
    """The result of `make()` on rank 0, on every rank."""
    if not dist.is_initialized():
        return make()
    box: list = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def broadcast(tensors: Iterable[th.Tensor]) -> None:
    """Fill the tensors of all ranks, in place, with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


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


class MaxOfRanks:
    """The largest value of all ranks, without a wait: each call returns that of the call before.

    A single process gets its own value at once.
    """

    def __init__(self) -> None:
        self.box = th.zeros((), dtype=th.int64)  # on the CPU: does not wait for the devices
        self.work: dist.Work | None = None
        self.is_late = dist.is_initialized()

    def __call__(self, value: int) -> int:
        """Hand in `value` -> the largest of those handed in by the call before, 0 at the first."""
        before = self.wait()
        self.box.fill_(value)
        if not self.is_late:
            return value
        self.work = dist.all_reduce(self.box, dist.ReduceOp.MAX, async_op=True)
        return before

    def wait(self) -> int:
        """The largest value of the last call."""
        if self.work is not None:
            self.work.wait()
        return int(self.box)


# ------------------------------------------------------------ errors


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Around a script: an error of the user ends it with one line, any other with its traceback.

    Either way the exit status is 1 and the job ends: a rank that fails takes the others down.
    """
    print_any_name()
    try:
        yield
    except Exception as error:
        in_group = isinstance(error, RuntimeError) and "MASTER_ADDR" in os.environ
        lost_rank = in_group and OTHER_RANK_GONE.search(str(error))
        if lost_rank:  # that rank reports why, and the launcher usually ends us meanwhile
            time.sleep(GRACE_SECONDS)
        with suppress(OSError):
            get_error_handler().record_exception(error)  # for the report of torchrun
        if lost_rank:
            end_job(f"error: another rank is gone ({_one_line(error)})", patience=0)
        if isinstance(error, USER_ERRORS):
            end_job(f"error: {_one_line(error)}")
        end_job(traceback.format_exc())
    if dist.is_initialized():
        dist.destroy_process_group()


def print_any_name() -> None:
    """Let file names be printed that are not UTF-8, or not in the characters of the locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def end_job(message: str, status: int = 1, patience: float = 2) -> NoReturn:
    """Print the message, once for all ranks, and end them all with this exit status.

    Ranks other than 0 wait for `patience` seconds: an error that all ranks make is rank 0's.
    """
    rank, size, mpi = _rank_without_waiting()
    if rank > 0:
        time.sleep(patience)
    sys.stdout.flush()
    prefix = f"[rank {rank}] " if rank else ""
    sys.stderr.write(f"{prefix}{message.rstrip()}\n")
    sys.stderr.flush()
    if size == 1:
        sys.exit(status)
    if mpi:
        time.sleep(0.5)  # mpiexec drops what it has not yet passed on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nothing after the message
        mpi.COMM_WORLD.Abort(status)
    os._exit(status)  # torchrun and srun end the other ranks; a clean exit would wait for them


def _rank_without_waiting() -> tuple[int, int, Any]:
    """Rank, number of ranks, and MPI if it launched us, without a collective call."""
    if _launcher() != "mpi":
        return *read_rank()[:2], None
    with suppress(ValueError):
        mpi = _mpi()
        return mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size(), mpi
    return 0, 1, None
