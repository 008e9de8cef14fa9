"""Who else runs: ranks, devices, the process group. mpiexec, torchrun, srun or nothing at all may start us."""

from __future__ import annotations

import datetime
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch as th
import torch.distributed as dist

MPI_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")
Result = TypeVar("Result")

TIMEOUT = datetime.timedelta(hours=2)  # rank 0 may index a large folder, or draw previews, while the others wait


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
    WORLD_SIZE and LOCAL_RANK, else SLURM_*, else asks MPI where an MPI launcher started us. NCCL on GPUs, gloo else.
    """
    rank, size, local_rank = _who_am_i()
    device = _device(devices, local_rank)
    if device.type == "cuda":
        th.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size, timeout=TIMEOUT
        )
    return World(rank, size, local_rank, device)


def _who_am_i() -> tuple[int, int, int]:
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
    mpi = _mpi()
    return _ask(mpi) if mpi else (0, 1, 0)


def _mpi() -> Any:
    """The MPI module where an MPI launcher started us, else None; importing it starts MPI."""
    if not any(name in os.environ for name in MPI_VARIABLES):
        return None
    from mpi4py import MPI

    return MPI


def _ask(mpi: Any) -> tuple[int, int, int]:
    """What the ranks tell each other; all must call it."""
    world = mpi.COMM_WORLD
    here = world.Split_type(mpi.COMM_TYPE_SHARED)
    one_host = here.Get_size() == world.Get_size()
    address = (_own_address(one_host), _free_port()) if world.Get_rank() == 0 else None
    address, port = world.bcast(address)
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))
    return world.Get_rank(), world.Get_size(), here.Get_rank()


def _own_address(one_host: bool) -> str:
    """An address at which the other ranks reach this host; names of containers often resolve to nothing or loopback."""
    if one_host:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; asks which of our addresses leads outside
        return probe.getsockname()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _device(devices: str, local_rank: int) -> th.device:
    count = th.cuda.device_count()
    if count == 0:
        if devices:
            raise ValueError(f"devices {devices!r}: this host shows no GPU; leave --devices empty to run on the CPU")
        return th.device("cpu")
    try:
        numbers = range(int(devices[1:])) if devices.startswith("G") else [int(n) for n in devices.split(",") if n]
    except ValueError:
        raise ValueError(f"devices {devices!r}: use '' (what is visible), 'G8' or a list such as '0,1'") from None
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


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Around a script: the user's mistakes end it with one line and status 1, anything else with its traceback.

    Either way the whole job ends: a rank that fails takes the others down instead of leaving them to wait.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        end_job(f"error: {' '.join(str(error).split())}")
    except Exception:
        end_job(traceback.format_exc())


def end_job(message: str, status: int = 1) -> NoReturn:
    """Say why, once for all ranks, and end them all with this exit status."""
    mpi = _mpi()
    if mpi:  # asked without waiting for the others, who may be anywhere
        rank, size = mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size()
    else:
        rank, size, _ = _who_am_i()
    if size > 1 and rank > 0:
        time.sleep(2)  # where every rank makes the same mistake rank 0 speaks, and ends the job before the others do
    sys.stderr.write(f"{f'[rank {rank}] ' if rank else ''}{message}\n")
    sys.stderr.flush()
    if size > 1 and mpi:
        mpi.COMM_WORLD.Abort(status)
    if size > 1:
        os._exit(status)  # torchrun and srun end the other ranks; a clean exit would first wait for them
    sys.exit(status)
