"""Draw the curves of one or more training runs from their progress.csv into a picture."""

from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.script_util import Parser
from mm_diffusion.viewing import curves


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folders of training runs, or csv files"
    )
    parser.add_argument(
        "--out", default="curves.png", help=f"the picture ({', '.join(curves.PICTURES)})"
    )
    parser.add_argument(
        "--keys", default="", help="columns with commas between, LOSS_q for the quartiles of a loss"
    )
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.9,
        help="rate of the moving average over rows (lower for few rows); 0: none",
    )
    parser.add_argument(
        "--x", default="step", choices=list(curves.AXES), help="what the curves run over"
    )
    flags = parser.parse_args()
    if not 0 <= flags.smooth < 1:
        raise ValueError(f"smooth {flags.smooth}: need a number in [0, 1)")
    curves.check_picture_name(flags.out)
    runs = curves.read_runs(flags.runs)
    panels = curves.choose_panels(
        runs, [key.strip() for key in flags.keys.split(",") if key.strip()]
    )
    curves.save(curves.draw(runs, panels, flags.x, flags.smooth), flags.out)
    print(
        f"{len(panels)} panels of {len(runs)} {'run' if len(runs) == 1 else 'runs'} in {flags.out}"
    )


if __name__ == "__main__":
    with friendly_errors():
        main()
