"""Several ranks against one: the same gradient, the time of a step, and the hidden exchange.

Hidden is the share of the exchange of gradients that overlaps the backward pass: what a step does
not take longer for it, over the time of the exchange by itself. Ranks have one thread each, and on
GPUs one GPU each.
"""

import argparse
import os
import socket
from collections.abc import Callable
from functools import partial
from statistics import median

import torch as th
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import seconds_of
from models import SMALL_FLAGS
from torch.nn.parallel import DistributedDataParallel

from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.script_util import create_model_and_diffusion
from mm_diffusion.unet import window_shift

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    mp.spawn(rank_main, nprocs=ranks)


def rank_main(rank: int) -> None:
    """Measure as one of the ranks; rank 0 prints the results."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    th.set_num_threads(1)
    world = setup_dist()
    th.manual_seed(0)
    model = create_model_and_diffusion(**SMALL_FLAGS)[0].to(world.device)
    with th.no_grad():
        for parameter in model.parameters():  # layers start at zero, and so would their gradients
            parameter.add_(0.01 * th.randn_like(parameter))
    ranks = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    sizes = (model.video_size, model.audio_size)
    video, audio = (th.randn(world.size, *size).to(world.device) for size in sizes)
    own = slice(rank, rank + 1)

    def backward(network: th.nn.Module, part: slice) -> None:
        model.zero_grad(set_to_none=True)
        t = th.full((len(video[part]),), 7, device=world.device)
        with window_shift("zero"):
            out = network(video[part], audio[part], t)
        (out[0].square().mean() + out[1].square().mean()).backward()

    def compute() -> None:
        with ranks.no_sync():
            backward(ranks, own)

    def gradients() -> list[th.Tensor]:
        return [p.grad for p in model.parameters() if p.grad is not None]

    def exchange() -> None:
        for gradient in gradients():
            dist.all_reduce(gradient)

    backward(ranks, own)
    found = th.cat([g.flatten() for g in gradients()])
    backward(model, slice(None))
    wanted = th.cat([g.flatten() for g in gradients()])
    computing, exchanging = typical(compute), typical(exchange)
    both = typical(partial(backward, ranks, own))
    if rank == 0:
        difference = float((found - wanted).norm() / wanted.norm())
        hidden = 1 - (both - computing) / exchanging
        print(f"{world.size} ranks on {world.device}, {found.numel():,} gradients")
        print(f"relative difference from the gradients of one rank: {difference:.1e}")
        print(f"forward and backward: {computing:.3f} s without, {both:.3f} s with the exchange")
        print(f"the exchange by itself: {exchanging:.3f} s, of which {hidden:.0%} is hidden")
    dist.barrier()
    dist.destroy_process_group()


def typical(call: Callable[[], None]) -> float:
    """Median seconds over a few calls that all ranks begin together."""
    times = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        times.append(seconds_of(call))
    return median(times[1:])


if __name__ == "__main__":
    with friendly_errors():
        main()
