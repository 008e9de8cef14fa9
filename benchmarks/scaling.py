"""Two ranks against one: the same gradient, the time of a step, and how much of the exchange hides behind the backward.

Overlap: the part of the time of exchanging all gradients at once, after the backward, that a step does not take longer
for exchanging them. Ranks have one thread each; on GPUs, one GPU each.
"""

import argparse
import os
import socket
import time
from collections.abc import Callable

import torch as th
import torch.distributed as dist
import torch.multiprocessing as mp
from models import SMALL_FLAGS
from torch.nn.parallel import DistributedDataParallel

from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.script_util import create_model_and_diffusion
from mm_diffusion.unet import window_shift

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(args.ranks),
    }
    mp.spawn(rank_main, nprocs=args.ranks)


def rank_main(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    th.set_num_threads(1)
    world = setup_dist()
    th.manual_seed(0)
    model = create_model_and_diffusion(**SMALL_FLAGS)[0].to(world.device)
    with th.no_grad():
        for parameter in model.parameters():  # layers start at zero, and so would their gradients
            parameter.add_(0.01 * th.randn_like(parameter))
    ranks = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    video, audio = (
        th.randn(world.size, *size).to(world.device)
        for size in (model.video_size, model.audio_size)
    )
    mine = slice(rank, rank + 1)

    def backward(network: th.nn.Module, part: slice) -> None:
        model.zero_grad(set_to_none=True)
        with window_shift("zero"):
            out = network(
                video[part], audio[part], th.full((len(video[part]),), 7, device=world.device)
            )
        (out[0].square().mean() + out[1].square().mean()).backward()

    def alone() -> None:
        with ranks.no_sync():
            backward(ranks, mine)

    def exchange() -> None:
        for gradient in gradients():
            dist.all_reduce(gradient)

    def gradients() -> list[th.Tensor]:
        return [p.grad for p in model.parameters() if p.grad is not None]

    backward(ranks, mine)
    found = th.cat([g.flatten() for g in gradients()])
    backward(model, slice(None))
    wanted = th.cat([g.flatten() for g in gradients()])
    times = {call.__name__: typical(call) for call in (alone, exchange)}
    together = typical(lambda: backward(ranks, mine))
    if rank == 0:
        difference = float((found - wanted).norm() / wanted.norm())
        hidden = 1 - (together - times["alone"]) / times["exchange"]
        print(
            f"{world.size} ranks on {world.device}, {found.numel():,} gradients: {difference:.1e} off those of one rank"
        )
        print(
            f"forward and backward alone {times['alone']:.3f} s, with the exchange {together:.3f} s;"
        )
        print(f"the exchange by itself {times['exchange']:.3f} s, of which {hidden:.0%} is hidden")
    dist.barrier()
    dist.destroy_process_group()


def typical(call: Callable[[], None]) -> float:
    """Median seconds over a few calls that all ranks begin together."""
    times = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        start = time.perf_counter()
        call()
        if th.cuda.is_available():
            th.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[REPEATS // 2]


if __name__ == "__main__":
    with friendly_errors():
        main()
