"""Corrupted checkpoints: an error of one line, or the same weights; no code runs."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import tiny
import torch as th

from mm_diffusion import checkpoint
from mm_diffusion.checkpoint import CheckpointError, load_weights, published_state_dict

COUNT = 100


class Evil:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model000001.pt"
    checkpoint.save_weights(str(path), tiny.build()[0], tiny.FLAGS)
    return path.read_bytes()


def corrupted(data, kind, rng):
    """The bytes of a checkpoint, corrupted."""
    corrupt = bytearray(data)
    if kind == "cut":
        return bytes(corrupt[: rng.integers(len(corrupt))])
    if kind == "flip":
        for place in rng.integers(len(corrupt), size=rng.integers(1, 4)):
            corrupt[place] ^= 1 << rng.integers(8)
    elif kind == "tail":  # where a zip file keeps its directory
        corrupt[-int(rng.integers(1, 4000))] ^= 1 << rng.integers(8)
    elif kind == "zeros":
        start = rng.integers(len(corrupt))
        corrupt[start : start + 512] = bytes(len(corrupt[start : start + 512]))
    elif kind == "noise":
        return rng.bytes(rng.integers(1, 5000))
    elif kind == "repeated":
        return bytes(corrupt + corrupt[: rng.integers(len(corrupt))])
    return bytes(corrupt)


def outcome(path, wanted):
    """ "refused" or "same"; anything else is a failure."""
    try:
        state, _ = checkpoint.load_state(str(path))
    except CheckpointError as error:
        return "refused" if str(path) in str(error) and "\n" not in str(error) else str(error)
    assert state.keys() == wanted.keys()
    assert all(th.equal(state[name], wanted[name]) for name in wanted), "other weights were taken"
    return "same"


def test_corrupted_checkpoints_are_refused_or_harmless(tmp_path, good):
    path, rng = tmp_path / "model000001.pt", np.random.default_rng(0)
    path.write_bytes(good)
    wanted, _ = checkpoint.load_state(str(path))
    kinds = ["cut", "flip", "tail", "zeros", "noise", "repeated"]
    outcomes = []
    for number in range(COUNT):
        path.write_bytes(corrupted(good, kinds[number % len(kinds)], rng))
        outcomes.append(outcome(path, wanted))
    assert set(outcomes) == {"refused", "same"}
    assert outcomes.count("refused") > COUNT // 2


@pytest.mark.parametrize("kind", ["pickle", "zip", "state"])
def test_a_checkpoint_never_runs_code(tmp_path, good, kind):
    path, trap = tmp_path / "model000001.pt", tmp_path / "trap"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(trap)))
    elif kind == "state":
        th.save({"weight": th.zeros(1), "extra": Evil(trap)}, path)
    else:  # the pickle inside a checkpoint, replaced
        source, target = zipfile.ZipFile(io.BytesIO(good)), zipfile.ZipFile(path, "w")
        for entry in source.infolist():
            data = (
                pickle.dumps(Evil(trap))
                if entry.filename.endswith("data.pkl")
                else source.read(entry)
            )
            target.writestr(entry.filename, data)
        target.close()
    with pytest.raises(CheckpointError, match=r"model000001\.pt"):
        checkpoint.load_state(str(path))
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"a": 1},
        {"a": [th.zeros(1)]},
        th.zeros(3),
        None,
        "text",
        {1: th.zeros(1)},
        {"model": {"a": th.zeros(1)}},
    ],
    ids=str,
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, content):
    th.save(content, tmp_path / "model000001.pt")
    with pytest.raises(CheckpointError, match=r"model000001\.pt") as caught:
        load_weights(tiny.build()[0], str(tmp_path / "model000001.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [th.tensor(1.0), th.zeros(2, dtype=th.int64), th.zeros(1, 1, 1, 1, 1, 1, 1)]
)
def test_a_tensor_of_another_shape_changes_nothing(value):
    model, _ = tiny.build()
    before = {name: p.clone() for name, p in published_state_dict(model).items()}
    name = next(iter(before))
    with pytest.raises(CheckpointError, match="misshapen"):
        load_weights(model, before | {name: value})
    assert all(th.equal(p, before[name]) for name, p in published_state_dict(model).items())


def test_weights_that_are_not_finite_are_refused():
    model, _ = tiny.build()
    state = dict(published_state_dict(model))
    name = next(iter(state))
    with pytest.raises(CheckpointError, match=rf"{name}.*not finite"):
        load_weights(model, state | {name: th.full_like(state[name], float("nan"))})
