"""The benchmark of learning: its coupling and its rows. Training it is too slow for a test."""

import sys
from pathlib import Path

import pytest
import tiny
import torch as th

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import learn_toy


class Copycat(th.nn.Module):
    """Predicts noise as a multiple of what it is given, and of the other modality's mean as much as `across` says."""

    def __init__(self, across):
        super().__init__()
        self.across = across

    def forward(self, video, audio, timesteps):
        means = [x.flatten(1).mean(dim=1) for x in (audio, video)]
        return tuple(
            x + self.across * mean.view(-1, *(1,) * (x.ndim - 1)) for x, mean in zip((video, audio), means, strict=True)
        )


def tied_clips(count):
    """Clips whose pictures are all as bright as their sounds are offset."""
    level = th.linspace(-1, 1, count)
    return {
        "video": level.view(-1, 1, 1, 1, 1).expand(-1, *tiny.SHAPES["video"]),
        "audio": level.view(-1, 1, 1).expand(-1, *tiny.SHAPES["audio"]),
    }


@pytest.mark.parametrize(("across", "sign"), [(0.0, 0), (-0.9, 1)])
def test_coupling_is_positive_only_where_the_model_uses_the_other_modality(across, sign):
    _, diffusion = tiny.build(as_built=True)
    row = learn_toy.coupling(Copycat(across), diffusion, tied_clips(6), 4, th.device("cpu"))
    for name in tiny.SHAPES:
        values = [row[f"coupling_{name}_{level}"] for level in learn_toy.NOISE_LEVELS]
        assert row[f"coupling_{name}"] == pytest.approx(sum(values) / len(values))
        if sign:
            assert min(values[:4]) > 0.1
        else:
            assert values == pytest.approx([0] * len(values), abs=1e-5)


def test_mirroring_pictures_leaves_sounds():
    clips = tiny.clips(0, 2)
    mirrored, _ = learn_toy.mirror_pictures((clips, {}))
    assert mirrored["audio"].equal(clips["audio"])
    assert mirrored["video"].flip(-1).equal(clips["video"])


def test_rows_come_back_as_they_were(tmp_path):
    rows = [{"step": 0.0, "spatial": -0.25}, {"step": 500.0, "spatial": 0.75}]
    learn_toy.write_rows(tmp_path / "learning.csv", rows)
    assert learn_toy.read_rows(tmp_path / "learning.csv") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["learning.csv"]
    assert learn_toy.read_rows(tmp_path / "none.csv") == []
