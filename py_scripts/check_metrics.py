"""Spoil true clips on purpose and check that every metric does what it should.

Fails if one does not. That checks your audio embedding, I3D and detector, too.
"""

from mm_diffusion.config import CheckMetricsConfig, MetricsConfig, parse, pick
from mm_diffusion.dist_util import end_job, friendly_errors, setup_dist
from mm_diffusion.evaluation import counterfactuals
from mm_diffusion.evaluation.clips import ClipFolder
from mm_diffusion.evaluation.evaluate import sizes_from_flags, with_preset
from mm_diffusion.evaluation.measures import left_out, make_measures


def main() -> None:
    flags = with_preset(*parse(__doc__, CheckMetricsConfig, positional="data_dir"))
    config = pick(CheckMetricsConfig, flags)
    measures = make_measures(config, setup_dist(config.devices).device)
    folder = ClipFolder(config.data_dir, sizes_from_flags(flags), "data_dir", config.sample_num)
    clips = [folder.clip(number) for number in range(len(folder))]
    found = counterfactuals.figures_under_changes(
        clips, measures, config.bright_object, config.num_workers
    )
    outcomes = counterfactuals.judge(found)
    print(f"{len(clips)} clips of {config.data_dir}; {folder.how()}")
    print(f"{counterfactuals.LEGEND}\n\n{counterfactuals.table(outcomes)}\n")
    for line in left_out(pick(MetricsConfig, {**flags, "ref_path": config.data_dir})):
        print(f"left out: {line}")
    if wrong := counterfactuals.failures(outcomes):
        end_job("\n".join(wrong))


if __name__ == "__main__":
    with friendly_errors():
        main()
