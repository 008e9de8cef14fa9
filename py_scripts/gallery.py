"""Write a page that shows the clips below a folder: players, frames, spectrograms, places seen and heard, scores."""

from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.script_util import Parser
from mm_diffusion.viewing import gallery


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="clips, searched deeply; index.html and gallery/ are written there",
    )
    parser.add_argument(
        "--scores",
        default="",
        help='JSON file {"clip name": {"score": number}}; empty: DIR/scores.json if it is there',
    )
    parser.add_argument("--num_workers", type=int, default=4, help="files looked at together")
    flags = parser.parse_args()
    print(
        f"look at the clips: {gallery.write_gallery(flags.folder, flags.scores, flags.num_workers)}"
    )


if __name__ == "__main__":
    with friendly_errors():
        main()
