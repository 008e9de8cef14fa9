"""Evaluate a folder of clips: against true ones, and whether what is heard fits what is seen in time and place."""

from mm_diffusion import logger
from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.evaluation.evaluation import (
    evaluate,
    make_measures,
    report_folder,
    sizes_asked,
    tell,
)
from mm_diffusion.script_util import EvalConfig, parse, pick


def main() -> None:
    flags, _ = parse(__doc__, EvalConfig)
    config = pick(EvalConfig, flags)
    sizes, folder = sizes_asked(flags), report_folder(config)
    world = setup_dist(config.devices)
    logger.configure(enabled=world.rank == 0)
    measures = make_measures(config, world.device)
    tell(evaluate(config.samples_path, config, sizes, measures, world), folder, world)


if __name__ == "__main__":
    with friendly_errors():
        main()
