"""Write a data set of toy clips in the shape of SAVGBench: bright objects that move audibly."""

import dataclasses

from mm_diffusion.config import Parser
from mm_diffusion.data.toy import ToyConfig, write_toy_dataset
from mm_diffusion.dist_util import friendly_errors


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("out_dir", help="an empty folder, or one of the same data to complete")
    parser.add_argument("--num_clips", type=int, default=256, help="clips to write")
    parser.add_argument("--size", type=int, help="height and width at once")
    for field in dataclasses.fields(ToyConfig):
        kind, text = field.metadata["kind"], field.metadata["help"]
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text)
    flags = vars(parser.parse_args())
    out_dir, num_clips, size = (flags.pop(name) for name in ("out_dir", "num_clips", "size"))
    if size is not None:
        flags.update(height=size, width=size)
    write_toy_dataset(out_dir, num_clips, ToyConfig(**flags))
    print(f"{num_clips} clips in {out_dir}")


if __name__ == "__main__":
    with friendly_errors():
        main()
