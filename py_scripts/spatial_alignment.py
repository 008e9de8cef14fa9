"""Correlation of the object's position and the audio's panning, of data and generated clips."""

import math
from pathlib import Path

from mm_diffusion.config import DataConfig, Parser
from mm_diffusion.data import encode, images
from mm_diffusion.data.clips import read_clips
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.evaluation.bright_object import (
    draw_audio_position,
    mismatched_alignment,
    spatial_alignment,
    why_unaligned,
)


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("samples", help="folder of generated clips (original/ of a sampling run)")
    add("--data_dir", help="folder of the training clips, for comparison")
    add("--video_size", default="20,3,64,64", help="frames, channels, height, width")
    add("--audio_size", default="2,80000", help="channels, samples")
    add("--video_fps", type=int, default=4, help="frames per second")
    add("--audio_fps", type=int, default=16000, help="samples per second")
    add("--contact_sheet", help="write a PNG: a row per clip, below it the audio's position")
    add("--watch_dir", help="write copies that are large enough for any player")
    flags = parser.parse_args()

    names = ("video_size", "audio_size", "video_fps", "audio_fps")
    config = DataConfig(**{name: getattr(flags, name) for name in names})
    if config.audio_size[0] != 2:
        raise ValueError(f"--audio_size {flags.audio_size}: mono has no position; give C 2")
    clips = read_clips(flags.samples, config)
    if flags.contact_sheet:
        sheet = draw_audio_position(clips["video"], clips["audio"])
        images.save_contact_sheet(flags.contact_sheet, sheet)
    if flags.watch_dir:
        for k, (video, audio) in enumerate(zip(clips["video"], clips["audio"], strict=True)):
            path = f"{flags.watch_dir}/clip_{k:02d}.mp4"
            encode.write_watchable(path, video, flags.video_fps, audio, flags.audio_fps)
    if flags.data_dir:
        data = read_clips(flags.data_dir, config)
        show("spatial alignment", flags.data_dir, spatial_alignment, data)
    show("spatial alignment", flags.samples, spatial_alignment, clips)
    if len(clips["video"]) > 1:
        show("mismatched pairs", flags.samples, mismatched_alignment, clips)


def show(title: str, folder: str, alignment, clips) -> None:
    """Print the alignment of clips, or why it is undefined."""
    videos, audios = clips["video"], clips["audio"]
    value, reason = alignment(videos, audios), why_unaligned(videos, audios)
    if math.isnan(value):
        reason = reason or "no frame has both object and audio"
    result = f"     - ({reason})" if reason else f"{value:6.3f}"
    name = "/".join(Path(folder).parts[-2:])
    print(f"{f'{title} of {name}':46} {result}")


if __name__ == "__main__":
    with friendly_errors():
        main()
