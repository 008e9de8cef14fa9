"""Does the sound of clips come from where the object is? One number for a data set and for clips drawn from a model."""

import math
from collections.abc import Callable
from pathlib import Path

import torch as th

from mm_diffusion.data import encode, images
from mm_diffusion.data.clips import read_clips
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.evaluation.spatial import (
    mismatched_alignment,
    show_heard_place,
    spatial_alignment,
    why_unaligned,
)
from mm_diffusion.script_util import Parser


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("samples", help="folder of clips drawn from a model (its original/)")
    parser.add_argument(
        "--data_dir", help="folder of the clips that it was trained on, for comparison"
    )
    parser.add_argument(
        "--video_size", default="20,3,64,64", help="frames, channels, height, width"
    )
    parser.add_argument("--audio_size", default="2,80000", help="channels, samples")
    parser.add_argument("--video_fps", type=int, default=4, help="frames per second")
    parser.add_argument("--audio_fps", type=int, default=16000, help="samples per second")
    parser.add_argument(
        "--contact_sheet",
        help="write a PNG: a row per clip, and below it where the sound comes from",
    )
    parser.add_argument("--watch_dir", help="write copies that are large enough for any player")
    flags = parser.parse_args()

    sizes = flags.video_size, flags.audio_size, flags.video_fps, flags.audio_fps
    videos, audios = read_clips(flags.samples, *sizes).values()
    if flags.contact_sheet:
        images.save_contact_sheet(flags.contact_sheet, show_heard_place(videos, audios))
    if flags.watch_dir:
        for k, (video, audio) in enumerate(zip(videos, audios, strict=True)):
            path = f"{flags.watch_dir}/clip_{k:02d}.mp4"
            encode.write_watchable(path, video, flags.video_fps, audio, flags.audio_fps)
    if flags.data_dir:
        tell(
            "spatial alignment",
            flags.data_dir,
            spatial_alignment,
            *read_clips(flags.data_dir, *sizes).values(),
        )
    tell("spatial alignment", flags.samples, spatial_alignment, videos, audios)
    if len(videos) > 1:
        tell("mismatched pairs", flags.samples, mismatched_alignment, videos, audios)


def tell(
    what: str, folder: str, measure: Callable[..., float], videos: th.Tensor, audios: th.Tensor
) -> None:
    value, reason = measure(videos, audios), why_unaligned(videos, audios)
    if math.isnan(value):
        reason = reason or "nothing is seen and heard at once"
    print(
        f"{f'{what} of {Path(folder).name}':40} {f'     - ({reason})' if reason else f'{value:6.3f}'}"
    )


if __name__ == "__main__":
    with friendly_errors():
        main()
