"""Evaluate a folder of clips: against reference clips, and the alignment of audio and video."""

from mm_diffusion import logger
from mm_diffusion.config import EvalConfig, parse, pick
from mm_diffusion.dist_util import friendly_errors, setup_dist
from mm_diffusion.evaluation.comparison import publish_comparison
from mm_diffusion.evaluation.evaluate import (
    compare,
    evaluate,
    report_folder,
    sizes_from_flags,
    with_preset,
)
from mm_diffusion.evaluation.measures import make_measures
from mm_diffusion.evaluation.report import publish
from mm_diffusion.viewing.metrics_page import write_metrics_page


def main() -> None:
    flags = with_preset(*parse(__doc__, EvalConfig))
    config = pick(EvalConfig, flags)
    sizes, folder = sizes_from_flags(flags), report_folder(config)
    world = setup_dist(config.devices)
    logger.configure(enabled=world.rank == 0)
    measures = make_measures(config, world.device)
    if config.compare:
        path = publish_comparison(compare(config, sizes, measures, world), folder, world)
    else:
        report = evaluate(
            config.samples_path, config, sizes, measures, world, sample_num=config.sample_num
        )
        path = publish(report, folder, world)
    if path:
        logger.log(f"page: {write_metrics_page(path)}")


if __name__ == "__main__":
    with friendly_errors():
        main()
