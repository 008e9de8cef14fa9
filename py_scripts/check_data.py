"""Print what folders of clips hold: files, windows, durations, rates, loudness, left-right balance, and bad files."""

import argparse

import tqdm

from mm_diffusion.data import summary
from mm_diffusion.data.index import probe_folders, refuse_if_bad
from mm_diffusion.dist_util import friendly_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "data_dir",
        nargs="+",
        help="folders of clips (.mp4 .avi .gif .mkv .webm .mov), searched deeply",
    )
    parser.add_argument("--video_size", default="20,3,64,64", help="F,C,H,W of a training window")
    parser.add_argument(
        "--video_fps", type=float, default=4.0, help="frames per second of a training window"
    )
    parser.add_argument("--clip_stride", type=int, default=1, help="frames between windows")
    parser.add_argument(
        "--video_stream", type=int, help="index of the video stream in every file (else the best)"
    )
    parser.add_argument(
        "--audio_stream", type=int, help="index of the audio stream in every file (else the best)"
    )
    parser.add_argument("--num_workers", type=int, default=4, help="files looked at together")
    parser.add_argument(
        "--limit", type=int, default=20, help="files listed one by one, and measured for loudness"
    )
    args = parser.parse_args()
    data_dir = ",".join(args.data_dir)
    index = probe_folders(data_dir, args.num_workers, args.video_stream, args.audio_stream)
    windows = summary.windows_of(index, args.video_size, args.video_fps, args.clip_stride)
    measured = tqdm.tqdm(index.clips[: args.limit], "sound", unit="file", leave=False)
    rows = [summary.measure(path, info) for path, info in measured]
    print(summary.describe(index, rows, windows) if index.clips else index.report())
    refuse_if_bad(data_dir, index, max_bad_share=1.0)


if __name__ == "__main__":
    with friendly_errors():
        main()
