"""Checkpoints: published names, flags in the file, one-line errors about files that do not fit."""

import json
import pickle
import sys
from collections import OrderedDict

import blobfile
import pytest
import tiny
import torch as th

from mm_diffusion.checkpoint import (
    CheckpointError,
    find_checkpoints,
    load,
    load_state,
    load_weights,
    published_names,
    published_state_dict,
    save,
    save_weights,
)


def same(a, b):
    return a.keys() == b.keys() and all(th.equal(a[name], b[name]) for name in a)


def copied(model):
    return {name: value.clone() for name, value in published_state_dict(model).items()}


@pytest.fixture
def model():
    return tiny.build()[0]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"video_type": "3d"},
        {"use_scale_shift_norm": False},
        {"audio_attention_resolutions": "1,2"},
    ],
    ids=str,
)
def test_names_are_one_to_one(flags):
    model = tiny.build(**flags)[0]
    names = published_names(model)
    assert sorted(names.values()) == sorted(model.state_dict())
    assert len(names) == len(set(names))


def test_saving_and_loading_is_the_identity_and_keeps_the_flags(model, tmp_path):
    path = str(tmp_path / "model000007.pt")
    save_weights(path, model, tiny.FLAGS)
    empty = tiny.build(as_built=True)[0]
    assert load_weights(empty, path) == []
    assert same(empty.state_dict(), model.state_dict())
    state, flags = load_state(path)
    assert same(state, published_state_dict(model))
    assert flags == tiny.FLAGS
    assert [file.name for file in tmp_path.iterdir()] == ["model000007.pt"]


def test_a_checkpoint_is_an_ordinary_state_dict_for_other_tools(model, tmp_path):
    path = str(tmp_path / "model000007.pt")
    save_weights(path, model, tiny.FLAGS)
    state = th.load(path, weights_only=True)
    assert isinstance(state, OrderedDict)
    assert all(isinstance(value, th.Tensor) and value.is_contiguous() for value in state.values())
    published = th.nn.ParameterDict(
        {name.replace(".", "/"): th.zeros_like(v) for name, v in state.items()}
    )
    published.load_state_dict(
        {name.replace(".", "/"): value for name, value in state.items()}, strict=True
    )
    block = th.nn.Linear(32, 32)
    block.load_state_dict(
        {"weight": state["time_embed.0.weight"], "bias": state["time_embed.0.bias"]}
    )


def test_a_published_file_without_flags_loads(model, tmp_path):
    th.save(copied(model), tmp_path / "model330011.pt")
    state, flags = load_state(str(tmp_path / "model330011.pt"))
    assert flags == {}
    assert same(state, published_state_dict(model))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_a_wrapped_model_loads(model, tmp_path, prefix):
    wrapped = {prefix + name: value for name, value in published_state_dict(model).items()}
    th.save(wrapped, tmp_path / "model.pt")
    empty = tiny.build(as_built=True)[0]
    load_weights(empty, str(tmp_path / "model.pt"))
    assert same(empty.state_dict(), model.state_dict())
    again = tiny.build(as_built=True)[0]
    load_weights(again, wrapped)
    assert same(again.state_dict(), model.state_dict())


def write_safetensors(path, state):
    """The format: length of a JSON header, header, values in order."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, value in state.items():
        start, end = end, end + value.numel() * 4
        header[name] = {"dtype": "F32", "shape": [*value.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    values = b"".join(value.contiguous().numpy().tobytes() for value in state.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def test_a_safetensors_file_loads_where_its_library_is_installed(model, tmp_path):
    pytest.importorskip("safetensors")
    write_safetensors(tmp_path / "model.safetensors", copied(model))
    empty = tiny.build(as_built=True)[0]
    load_weights(empty, str(tmp_path / "model.safetensors"))
    assert same(empty.state_dict(), model.state_dict())


def test_a_safetensors_file_without_its_library_is_named_for_what_it_is(
    model, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    write_safetensors(tmp_path / "model.pt", copied(model))
    with pytest.raises(CheckpointError, match=r"model.pt: a safetensors file.*pip install"):
        load_state(str(tmp_path / "model.pt"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 2140000000\n",
            "a Git LFS pointer, not the file itself; run git lfs pull",
        ),
        ("<!DOCTYPE html>\n<title>Sign in</title>", "a web page, not a checkpoint; download"),
        ("\n <HTML lang=en>", "a web page"),
    ],
)
def test_what_a_download_left_instead_of_a_checkpoint_is_named_for_what_it_is(
    tmp_path, content, words
):
    path = tmp_path / "model330011.pt"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=f"model330011.pt: {words}"):
        load_state(str(path))


def test_saved_weights_do_not_follow_the_model(model, tmp_path):
    path = str(tmp_path / "m.pt")
    save_weights(path, model, {})
    before = copied(model)
    with th.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert same(load_state(path)[0], before)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file has run')",))


def whole(tmp_path):
    save_weights(str(tmp_path / "whole.pt"), tiny.build()[0], {})
    return (tmp_path / "whole.pt").read_bytes()


BROKEN = {
    "truncated by one byte": lambda folder: whole(folder)[:-1],
    "half": lambda folder: whole(folder)[: len(whole(folder)) // 2],
    "of 100 bytes": lambda folder: whole(folder)[:100],
    "empty": lambda folder: b"",
    "text": lambda folder: b"hello, I am not a checkpoint\n",
    "another text": lambda folder: b"c" * 50,
    "zeros": lambda folder: bytes(1000),
    "binary": lambda folder: bytes(range(256)) * 8,
    "html": lambda folder: b"<!DOCTYPE html><html>404</html>",
    "code": lambda folder: pickle.dumps({"a": Harmful()}, 2),
    "another object": lambda folder: pickle.dumps([1, 2], 2),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line_with_its_name(tmp_path, kind):
    path = tmp_path / "broken.pt"
    path.write_bytes(BROKEN[kind](tmp_path))
    with pytest.raises(CheckpointError, match=r"broken\.pt") as caught:
        load_state(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [{}, [1], {"a": 1}, {"a": {"b": th.zeros(1)}}, th.zeros(3), "text"], ids=str
)
def test_a_file_of_something_else_is_one_line_with_its_name(tmp_path, value):
    save(str(tmp_path / "odd.pt"), value)
    with pytest.raises(CheckpointError, match=r"odd\.pt: holds no weights"):
        load_state(str(tmp_path / "odd.pt"))


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    th.save({"a": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        load(str(tmp_path / "bad.pt"))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt: no such checkpoint"):
        load_state(str(tmp_path / "none.pt"))
    with pytest.raises(CheckpointError, match="is a folder"):
        load_state(str(tmp_path))


MISMATCHES = {
    "num_channels": {"num_channels": 64},
    "channel_mult": {"channel_mult": "1,3"},
    "num_res_blocks": {"num_res_blocks": 2},
    "learn_sigma": {"learn_sigma": True},
    "audio_attention_resolutions": {"audio_attention_resolutions": "2"},
    "video_attention_resolutions": {"video_attention_resolutions": "-1"},
    "cross_attention_resolutions": {
        "cross_attention_resolutions": "2",
        "cross_attention_windows": "2",
    },
    "use_scale_shift_norm": {"use_scale_shift_norm": False},
    "video_type": {"video_type": "3d"},
    "audio_size": {"audio_size": "1,64"},
    "cross_attention_windows": {
        "channel_mult": "1,2,2,2",
        "audio_size": "2,512",
        "cross_attention_resolutions": "1,2,4",
        "cross_attention_windows": "1,4,8",
        "video_size": "8,3,8,8",
    },
}


@pytest.mark.parametrize("flag", MISMATCHES)
def test_a_checkpoint_of_another_model_names_tensors_and_the_flag_and_changes_nothing(
    model, tmp_path, flag
):
    """Fault: a checkpoint of another width loaded without a word, 0 of 1,046 tensors."""
    path = str(tmp_path / "other.pt")
    save_weights(path, tiny.build(**MISMATCHES[flag])[0], {})
    if flag == "cross_attention_windows":
        model = tiny.build(**{**MISMATCHES[flag], flag: "1,4,4"})[0]
    before = copied(model)
    with pytest.raises(CheckpointError, match=r"other\.pt does not fit") as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert flag in message.split("probably wrong:")[1]
    assert any(word in message for word in ("missing", "extra", "misshapen"))
    assert "\n" not in message
    assert same(copied(model), before)


def test_without_strict_what_fits_is_taken_and_the_rest_is_listed(model, tmp_path):
    state = copied(model)
    del state["time_embed.0.bias"]
    state["time_embed.2.bias"] = th.zeros(5)
    state["stray"] = th.zeros(1)
    target = tiny.build(as_built=True)[0]
    left = load_weights(target, state, strict=False)
    assert sorted(left) == ["stray", "time_embed.0.bias", "time_embed.2.bias"]
    found, wanted = copied(target), copied(model)
    taken = [name for name in wanted if name not in left]
    assert all(th.equal(found[name], wanted[name]) for name in taken)
    with pytest.raises(CheckpointError, match=r"1 missing .*1 extra .*1 misshapen"):
        load_weights(target, state)


def test_without_strict_a_checkpoint_of_which_nothing_fits_is_refused_all_the_same(model):
    with pytest.raises(CheckpointError, match="not one of its tensors"):
        load_weights(model, {"stray": th.zeros(1)}, strict=False)


def test_a_remote_folder_stands_for_its_newest_average_too(monkeypatch):
    monkeypatch.setattr(
        blobfile, "isdir", {"gs://bucket/run": True}.__getitem__
    )  # a file is not asked for
    monkeypatch.setattr(
        blobfile, "listdir", lambda path: iter(["model000002.pt", "ema_0.9_000002.pt", "samples/"])
    )
    assert find_checkpoints("gs://bucket/run,gs://bucket/a.pt") == [
        "gs://bucket/run/ema_0.9_000002.pt",
        "gs://bucket/a.pt",
    ]
    monkeypatch.undo()
    assert find_checkpoints("https://example.org/a.pt") == [
        "https://example.org/a.pt"
    ]  # loading it says what is wrong


def test_a_folder_stands_for_its_newest_average(tmp_path):
    names = [
        "model000100.pt",
        "ema_0.9999_000090.pt",
        "ema_0.9999_1000000.pt",
        "ema_0.9999_000100.pt",
        "opt1000000.pt",
    ]
    for name in names:
        (tmp_path / name).touch()
    newest = str(tmp_path / "ema_0.9999_1000000.pt")
    assert find_checkpoints(str(tmp_path)) == [newest]
    assert find_checkpoints(f"{tmp_path},a.pt") == [newest, "a.pt"]
    for name in names[1:4]:
        (tmp_path / name).unlink()
    assert find_checkpoints(str(tmp_path)) == [str(tmp_path / "model000100.pt")]
    for rate in ("0.5", "0.9999", "0.999"):
        (tmp_path / f"ema_{rate}_000100.pt").touch()
    assert find_checkpoints(str(tmp_path)) == [
        str(tmp_path / "ema_0.9999_000100.pt")
    ]  # the slowest
    (tmp_path / "ema_.99999_000100.pt").touch()
    assert find_checkpoints(str(tmp_path)) == [str(tmp_path / "ema_.99999_000100.pt")]
    for bad in ("", str(tmp_path / "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError):
            find_checkpoints(bad)
