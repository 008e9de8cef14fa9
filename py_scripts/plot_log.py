"""Plot the curves of one or more training runs from their progress.csv."""

from mm_diffusion.config import Parser
from mm_diffusion.dist_util import friendly_errors
from mm_diffusion.viewing import curves


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="output folders of training runs, or csv files")
    add("--out", default="curves.png", help="image file (.png, .svg, .pdf)")
    add("--keys", default="", help="comma list of columns; LOSS_q: its quartiles")
    add("--smooth", type=float, default=0.9, help="rate of the moving average over rows; 0: none")
    add("--x", default="step", choices=list(curves.AXES), help="horizontal axis")
    flags = parser.parse_args()
    if not 0 <= flags.smooth < 1:
        raise ValueError(f"smooth {flags.smooth}: need a number in [0, 1)")
    runs = curves.read_runs(flags.runs)
    keys = [key.strip() for key in flags.keys.split(",") if key.strip()]
    panels = curves.choose_panels(runs, keys)
    curves.save(curves.draw(runs, panels, x=flags.x, smooth=flags.smooth), flags.out)
    print(f"{flags.out}: {len(panels)} panels, runs: {', '.join(run.name for run in runs)}")


if __name__ == "__main__":
    with friendly_errors():
        main()
