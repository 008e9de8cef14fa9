"""Write the frames of videos as image files, to train the upsampler with; a rerun completes what is missing."""

import argparse
import sys

from mm_diffusion.data.extract import FORMATS, ExtractSettings, extract_videos
from mm_diffusion.dist_util import friendly_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "-s",
        "--source",
        nargs="+",
        required=True,
        help="videos, or folders of them, searched deeply",
    )
    parser.add_argument(
        "-t", "--target", required=True, help="folder of the frames, image_<clip>_<number>.<format>"
    )
    parser.add_argument(
        "--fps", type=float, default=4.0, help="frames per second of the video's own time"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="png", help="png is lossless, jpg smaller"
    )
    parser.add_argument("--quality", type=int, default=95, help="of jpg, 1 to 100")
    parser.add_argument(
        "--size",
        type=int,
        default=0,
        help="fit into a square of this many pixels (0: leave as it is)",
    )
    parser.add_argument("--num_workers", type=int, default=4, help="videos worked on together")
    args = parser.parse_args()
    settings = ExtractSettings(args.fps, args.format, args.quality, args.size)
    frames, bad = extract_videos(args.source, args.target, settings, args.num_workers)
    print(f"{sum(frames.values())} frames of {len(frames)} videos in {args.target}")
    for reason in bad.values():
        print(f"left out: {reason}", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    with friendly_errors():
        main()
