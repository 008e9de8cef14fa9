"""Write a SAVGBench-shaped data set of toy clips: bright objects that sound from where they are."""

import argparse
import dataclasses

from tqdm import tqdm

from mm_diffusion.data.toy import ToyConfig, write_toy_dataset
from mm_diffusion.dist_util import friendly_errors

HELP = {
    "height": "picture height in pixels",
    "width": "picture width in pixels",
    "fps": "frames per second",
    "seconds": "length of a clip",
    "sample_rate": "sound samples per second",
    "num_objects": "sounding objects per clip",
    "seed": "clip k depends on these numbers, the seed and k only",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("out_dir", help="an empty folder, or one of the same data to be completed")
    parser.add_argument("--num_clips", type=int, default=256, help="how many")
    parser.add_argument("--size", type=int, help="height and width at once")
    for field in dataclasses.fields(ToyConfig):
        parser.add_argument(
            f"--{field.name}",
            type=type(field.default),
            default=field.default,
            help=HELP[field.name],
        )
    flags = vars(parser.parse_args())
    out_dir, num_clips, size = (flags.pop(name) for name in ("out_dir", "num_clips", "size"))
    if size is not None:
        flags.update(height=size, width=size)
    write_toy_dataset(
        out_dir,
        num_clips,
        ToyConfig(**flags),
        progress=lambda ks: tqdm(ks, "toy clips", unit="clip"),
    )
    print(f"{num_clips} clips in {out_dir}")


if __name__ == "__main__":
    with friendly_errors():
        main()
