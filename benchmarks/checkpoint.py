"""How long a save keeps training waiting, against torch.save of the same state. Flags choose the model."""

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
        pause = []
        for step in range(4):
            loop.step = step
            synchronise()
            start = time.perf_counter()
            loop.save()
            pause.append(time.perf_counter() - start)
            loop.writer.wait()
            written = time.perf_counter() - start
        print(f"{size / 1e6:.0f} MB; torch.save {plain:.2f} s; written beside training in {written:.2f} s")
        print(f"pause of a save {min(pause[1:]):.3f} s ({min(pause[1:]) / plain:.1%}), of the first {pause[0]:.3f} s")


if __name__ == "__main__":
    with friendly_errors():
        main()
