"""Write a page of the clips below a folder: players, frames, spectrograms, positions and scores."""

from mm_diffusion.config import Parser
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.viewing import gallery


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    scores = 'JSON file {"clip name": {"score": number}}; default DIR/scores.json if it exists'
    add("folder", metavar="DIR", help="clips at any depth; gets index.html and gallery/")
    add("--scores", default="", help=scores)
    add("--num_workers", type=int, default=4, help="clips decoded in parallel")
    flags = parser.parse_args()
    page = gallery.write_gallery(flags.folder, flags.scores, num_workers=flags.num_workers)
    print(f"gallery: {page}")


if __name__ == "__main__":
    with friendly_errors():
        main()
