"""Print what folders of clips hold: windows, durations, rates, loudness, balance and bad files."""

import dataclasses

import tqdm

from mm_diffusion.config import DataConfig, Parser
from mm_diffusion.data import summary
from mm_diffusion.data.index import VIDEO_EXTENSIONS, probe_folders, refuse_if_bad
from mm_diffusion.dist_util import friendly_errors

FLAGS = ("video_size", "video_fps", "clip_stride", "video_stream", "audio_stream", "num_workers")


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
    args = parser.parse_args()
    flags = {name: getattr(args, name) for name in FLAGS}
    config = DataConfig(data_dir=",".join(args.data_dir), **flags)
    streams = (config.video_stream, config.audio_stream)
    index = probe_folders(config.data_dir, config.num_workers, *streams)
    measured = tqdm.tqdm(index.clips[: args.limit], "audio", unit="file", leave=False)
    rows = [summary.measure(path, info) for path, info in measured]
    print(summary.describe(index, rows, config) if index.clips else index.report())
    refuse_if_bad(config.data_dir, index, max_bad_share=1.0)


if __name__ == "__main__":
    with friendly_errors():
        main()
