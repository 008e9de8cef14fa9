"""The upsampler: FLOP/s of one frame as a share of the matrix rate, and against plain NCHW convolutions; peak memory.

Without flags it is the published one. Memory is that of sampling the frames of a clip in 2 DDIM steps, in a process of
its own, by the number of frames that go through the model at a time.
"""

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch as th
import torch.nn.functional as F
from measure import device, matrix_rate, seconds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.sampling import frames_that_fit, make_sampler, prepare, upscale_video
from mm_diffusion.script_util import image_sr_create_model_and_diffusion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sr_num_channels", type=int, default=192)
    parser.add_argument("--sr_num_res_blocks", type=int, default=2)
    parser.add_argument("--large_size", type=int, default=256)
    parser.add_argument("--small_size", type=int, default=64)
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--chunks", nargs="*", type=int, default=[1, 2, 4], help="frames at a time; none: no memory")
    parser.add_argument("--num_frames", type=int, default=20, help="of the clip whose sampling takes memory")
    args = vars(parser.parse_args())
    precisions, chunks, num_frames = args.pop("precisions"), args.pop("chunks"), args.pop("num_frames")
    measure_speed(args, precisions)
    for chunk in chunks:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            before, peak = alone.apply(peak_memory, (args, chunk, num_frames))
        above = f"{(peak - before) / 2**30:.2f} GiB above the {before / 2**30:.2f} of the model"
        print(f"{num_frames} frames, {chunk} at a time: {above}")


def measure_speed(flags: dict, precisions: list[str]) -> None:
    model = image_sr_create_model_and_diffusion(**flags)[0].to(device())
    x = th.randn(1, 3, flags["large_size"], flags["large_size"], device=device())
    low_res = th.randn(1, 3, flags["small_size"], flags["small_size"], device=device())
    t = th.tensor([371], device=device())

    def forward(network: nn.Module) -> None:
        with th.no_grad():
            network(x, t, low_res=low_res)

    with FlopCounterMode(display=False) as counter:
        forward(model)
    flop = counter.get_total_flops()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {flop / 1e9:.1f} GFLOP a frame")
    fitting = frames_that_fit(model, device(), 1000)
    print(f"sampling takes {fitting} frames at a time, reckoned at {model.bytes_per_picture() / 2**30:.2f} GiB each")
    plain = plain_convolution_rate(model, forward)
    print(f"its convolutions as plain NCHW ones in float32: {plain / 1e9:.0f} GFLOP/s")
    for name in precisions:
        prepared, peak = prepare(model, name), matrix_rate(name)
        rate = flop / seconds(lambda network=prepared: forward(network))
        print(
            f"{name}: matrix product {peak / 1e9:.0f} GFLOP/s; forward {rate / 1e9:.0f} ({rate / peak:.0%}),"
            f" {rate / plain:.2f} times the plain convolutions"
        )


def plain_convolution_rate(model: nn.Module, forward: Callable[[nn.Module], None]) -> float:
    """FLOP/s of all 3x3 convolutions of one forward pass, each alone, on contiguous NCHW maps."""
    calls: list[tuple[nn.Conv2d, th.Size]] = []
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [c.register_forward_pre_hook(lambda conv, args: calls.append((conv, args[0].shape))) for c in convs]
    forward(model)
    for hook in hooks:
        hook.remove()
    flop = total = 0.0
    for conv, shape in calls:
        x, weight = th.randn(shape, device=device()), conv.weight.detach().contiguous()
        options = {"stride": conv.stride, "padding": conv.padding}
        flop += 2 * weight.numel() * F.conv2d(x, weight, **options)[:, 0].numel()
        total += seconds(lambda x=x, w=weight, o=options: F.conv2d(x, w, **o))
    return flop / total


def peak_memory(flags: dict, chunk: int, num_frames: int) -> tuple[int, int]:
    """Bytes (with the model alone, at the peak of sampling a clip)."""
    model, diffusion = image_sr_create_model_and_diffusion(**flags, timestep_respacing="2")
    model = model.to(device())
    sampler = make_sampler("ddim", diffusion)
    video = th.zeros(num_frames, 3, flags["small_size"], flags["small_size"])
    before = _memory()
    upscale_video(model, sampler, video, 0, 0, frames_at_once=chunk, device=device())
    return before, _peak()


def _memory() -> int:
    """Bytes in use now."""
    if th.cuda.is_available():
        return th.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    if th.cuda.is_available():
        return th.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    with friendly_errors():
        main()
