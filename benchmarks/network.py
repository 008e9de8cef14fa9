"""FLOP/s of the joint network as a share of what a matrix product reaches in the same process.

A share means the same on any machine; seconds do not.
"""

import torch as th
from measure import device, matrix_rate, seconds
from torch.utils.flop_counter import FlopCounterMode

from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.sampling import DTYPES
from mm_diffusion.script_util import DiffusionConfig, ModelConfig, create_model_and_diffusion, parse, pick


def main() -> None:
    flags, _ = parse(__doc__, ModelConfig)
    model, _ = create_model_and_diffusion(**vars(pick(ModelConfig, flags)), **vars(DiffusionConfig()))
    model = model.to(device())
    video, audio = (th.randn(1, *size, device=device()) for size in (model.video_size, model.audio_size))
    t = th.tensor([371], device=device())

    def training_step() -> None:
        out = model(video, audio, t)
        (out[0].float().square().mean() + out[1].float().square().mean()).backward()
        model.zero_grad()

    with th.no_grad(), FlopCounterMode(display=False) as counter:
        model(video, audio, t)
    forward_flop = counter.get_total_flops()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {forward_flop / 1e9:.1f} GFLOP forward, batch 1")
    for name in ("fp32", "bf16"):
        peak = matrix_rate(name)
        with th.autocast(device().type, dtype=DTYPES[name], enabled=name != "fp32"):
            with th.no_grad():
                forward = forward_flop / seconds(lambda: model(video, audio, t))
            step = 3 * forward_flop / seconds(training_step)
        print(
            f"{name}: matrix product {peak / 1e9:.0f} GFLOP/s; forward {forward / 1e9:.0f} ({forward / peak:.0%}), "
            f"forward and backward {step / 1e9:.0f} ({step / peak:.0%})"
        )


if __name__ == "__main__":
    with friendly_errors():
        main()
