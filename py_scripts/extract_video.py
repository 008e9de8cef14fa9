"""Write frames of videos as images to train the upsampler; a rerun completes what is missing."""

import functools
import sys

from mm_diffusion.config import Parser
from mm_diffusion.config.flags import convert
from mm_diffusion.data.extract import FORMATS, ExtractSettings, extract_videos
from mm_diffusion.dist_util import friendly_errors


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    source, target = ("-s", "--source", "--source_path"), ("-t", "--target", "--target_path")
    add(*source, nargs="+", required=True, help="videos, or folders, searched recursively")
    add(*target, required=True, help="folder of the image_<clip>_<number>.<format>")
    add("--fps", type=float, default=4.0, help="frames per second of the video's own time")
    add("--format", choices=FORMATS, default="png", help="png is lossless, jpg smaller")
    add("--quality", type=int, default=95, help="of jpg, 1 to 100")
    add("--size", type=int, default=0, help="fit into a square of this many pixels; 0: as it is")
    boolean = functools.partial(convert, bool, "antialias")
    add("--antialias", type=boolean, default=False, help="fit with antialiasing, unlike published")
    add("--num_workers", type=int, default=4, help="videos that are decoded side by side")
    args = parser.parse_args()
    settings = ExtractSettings(args.fps, args.format, args.quality, args.size, args.antialias)
    frames, bad = extract_videos(args.source, args.target, settings, args.num_workers)
    print(f"{sum(frames.values())} frames of {len(frames)} videos in {args.target}")
    for reason in bad.values():
        print(f"left out: {reason}", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    with friendly_errors():
        main()
