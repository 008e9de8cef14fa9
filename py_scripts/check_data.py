"""Print what folders of clips hold: windows, durations, rates, loudness, balance and bad files."""

import dataclasses
from functools import partial

from mm_diffusion.config import DataConfig, Parser
from mm_diffusion.config.flags import convert
from mm_diffusion.data import summary
from mm_diffusion.data.index import VIDEO_EXTENSIONS, probe_folders
from mm_diffusion.dist_util import friendly_errors

FLAGS = (
    *("video_size", "video_fps", "audio_size", "audio_fps", "clip_stride"),
    *("video_stream", "audio_stream", "num_workers"),
)


def main() -> None:
    parser = Parser(description=__doc__)
    kinds = " ".join(VIDEO_EXTENSIONS)
    parser.add_argument("data_dir", nargs="+", help=f"folders ({kinds}), searched recursively")
    fields = {field.name: field for field in dataclasses.fields(DataConfig)}
    for name in FLAGS:
        default, metadata = fields[name].default, fields[name].metadata
        kind, text = metadata["kind"], metadata["help"]
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("--limit", type=int, default=20, help="files listed and measured, at most")
    text = "decode every file to its end, which finds damage in the middle"
    parser.add_argument("--full", type=partial(convert, bool, "full"), default=False, help=text)
    args = parser.parse_args()
    flags = {name: getattr(args, name) for name in FLAGS}
    config = DataConfig(data_dir=",".join(args.data_dir), **flags)
    config.check_durations()
    streams = (config.video_stream, config.audio_stream)
    index = probe_folders(config.data_dir, config.num_workers, *streams)
    if args.full:
        index = summary.check_fully(index, config.num_workers)
    index, rows = summary.measure_some(index, args.limit, config.num_workers)
    print(summary.describe(index, rows, config) if index.clips else index.report())
    index.refuse_if_bad(max_bad_share=1.0)


if __name__ == "__main__":
    with friendly_errors():
        main()
