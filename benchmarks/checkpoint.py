"""How long a save keeps training waiting, against torch.save of the same state. Flags choose the model.

The state is copied while the next forward and backward run; only where they are shorter training waits for the rest.
"""

import os
import tempfile
import time

import torch as th
from measure import device, seconds, synchronise

from mm_diffusion.dist_util import World, friendly_errors
from mm_diffusion.script_util import DiffusionConfig, ModelConfig, TrainConfig, create_model_and_diffusion, parse, pick
from mm_diffusion.train_util import TrainLoop


def main() -> None:
    flags, _ = parse(__doc__, ModelConfig)
    model, diffusion = create_model_and_diffusion(**vars(pick(ModelConfig, flags)), **vars(DiffusionConfig()))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(output_dir=folder, batch_size=1)
        loop = TrainLoop(model, diffusion, lambda start_sample: iter(()), config, World(device=device()))
        for parameter in loop.params:  # a state as after a step
            parameter.grad = th.zeros_like(parameter)
        loop.optimizer.step()
        state = {"model": model.state_dict(), "opt": loop.optimizer.state_dict(), "emas": loop.emas}
        path = os.path.join(folder, "plain.pt")
        plain = seconds(lambda: th.save(state, path))
        size = os.path.getsize(path)
        rows = []
        for step in range(4):
            loop.step = step
            synchronise()
            start = time.perf_counter()
            rows.append([])
            for stage in (loop.save, loop.writer.wait_for_copy, loop.writer.wait):
                stage()
                rows[-1].append(time.perf_counter() - start)
        pause, copied, written = (min(column[1:]) for column in zip(*rows, strict=True))
        print(f"{size / 1e6:.0f} MB; torch.save {plain:.2f} s")
        print(
            f"a save keeps training waiting for {pause:.3f} s ({pause / plain:.1%}); the copy beside the next forward"
        )
        print(f"and backward takes {copied:.2f} s (the first {rows[0][1]:.2f} s); written after {written:.2f} s")


if __name__ == "__main__":
    with friendly_errors():
        main()
