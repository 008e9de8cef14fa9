"""What sampling must not wait for: encoders, copies to the device, compilation."""

import os
import threading

import pytest
import tiny
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mm_diffusion import rng
from mm_diffusion.generation.output import ClipFormat, background, missing_clips, write_sample
from mm_diffusion.generation.run import generate_clips
from mm_diffusion.rng import randn_like
from mm_diffusion.sampling import make_sampler, prepare
from mm_diffusion.tree import append_dims

PATIENCE_SECONDS = 20  # after which something that should not wait counts as waiting


def quick(**flags):
    model, diffusion = tiny.build(timestep_respacing="2", **flags)
    return prepare(model), make_sampler("ddim", diffusion)


def test_the_model_does_not_wait_for_the_encoder():
    """The encoder of the first clip goes on only when the model has begun the last one."""
    model, sampler = quick()
    calls, last_began, saved = [], threading.Event(), []

    def note(*_):
        calls.append(1)
        if len(calls) == 3 * 2:
            last_began.set()

    def slow(index, *_):
        assert last_began.wait(PATIENCE_SECONDS)
        saved.append(index)

    model.register_forward_pre_hook(note)
    generate_clips(model, sampler, [4, 2, 9], slow, batch_size=1, seed=1)
    assert saved == [4, 2, 9]  # in order, and all of them before generate_clips returns


def test_only_so_many_clips_wait_for_the_encoder():
    go, started, blocked = threading.Event(), [], threading.Event()

    def produce():
        with background(most_waiting=3) as call:
            for k in range(5):
                if k == 3:
                    blocked.set()
                call(str(k), go.wait, PATIENCE_SECONDS)
                started.append(k)

    producer = threading.Thread(target=produce)
    producer.start()
    assert blocked.wait(PATIENCE_SECONDS)
    assert started == [0, 1, 2]  # the fourth waits for the first
    go.set()
    producer.join(PATIENCE_SECONDS)
    assert started == [0, 1, 2, 3, 4]


def test_an_error_of_the_encoder_stops_the_run_and_names_the_clip():
    """It is raised by the next clip, not at the end; what was generated before is written."""
    failed, written, begun = threading.Event(), [], []

    def write(k):
        if k == 1:
            failed.set()
            raise OSError("disk full")
        written.append(k)

    def run():
        with background(most_waiting=4) as call:
            for k in range(30):
                begun.append(k)
                call(f"clip {k}", write, k)
                if k == 1:
                    assert failed.wait(PATIENCE_SECONDS)

    with pytest.raises(OSError, match="disk full") as caught:
        run()
    assert caught.value.__notes__ == ["while saving clip 1"]
    assert len(begun) < 30
    assert written == [k for k in begun[:-1] if k != 1]


def test_a_clip_that_cannot_be_written_is_named_in_one_line(tmp_path):
    clip = tiny.clips(0, 1)
    (tmp_path / "original" / "clip_00007.mp4").mkdir(parents=True)
    with pytest.raises(OSError, match=r"clip_00007\.mp4: cannot be written \(.*directory"):
        write_sample(
            tmp_path, "clip_00007", clip["video"][0], clip["audio"][0], ClipFormat(4, 16000)
        )


def test_a_failing_encoder_leaves_no_half_file(tmp_path, monkeypatch):
    def half(container, stream, frames):
        raise OSError("no space left")

    monkeypatch.setattr("mm_diffusion.data.encode._encode_audio", half)
    clip = tiny.clips(0, 1)
    with pytest.raises(OSError, match="no space left"):
        write_sample(tmp_path, "k", clip["video"][0], clip["audio"][0], ClipFormat(4, 16000))
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["k.wav"]


def test_what_a_killed_run_left_half_written_is_removed_by_the_next(tmp_path):
    old, new = (tmp_path / "original" / f".{digit * 32}.mp4" for digit in "ab")
    old.parent.mkdir()
    kept = [new, old.with_name(".mine.mp4")]
    for path in (old, *kept):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(kept[1], (0, 0))
    missing_clips(tmp_path, ["k"], {"given": []})
    assert sorted(old.parent.iterdir()) == sorted(kept)


# ---------------------------------------------------------------- waits for the device

# What makes the host wait for a device: reading a value, counting what a mask selects, and blocking
# copies.
READS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
}


class Remote(th.Tensor):
    """A tensor of a device of its own, called "meta", whose numbers lie on the host."""

    @staticmethod
    def __new__(cls, held):
        return th.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: outside of Device")


class Device(TorchDispatchMode):
    """Runs what is said to run on "meta" apart from the host, and notes `waits` and `copies`."""

    def __init__(self):
        super().__init__()
        self.waits, self.copies = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.name().split(".")[0]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, th.Tensor)]
        remote = [isinstance(x, Remote) for x in inputs]
        to_remote = any(remote)
        if "device" in kwargs and kwargs["device"] is not None:
            to_remote = th.device(kwargs["device"]).type == "meta"
            kwargs["device"] = "cpu"
            if inputs and to_remote != remote[0]:
                (self.copies if kwargs.get("non_blocking") and to_remote else self.waits).append(
                    name
                )
        elif any(remote):
            assert all(r or x.ndim == 0 for r, x in zip(remote, inputs, strict=True)), (
                f"{name} mixes devices"
            )
            picks_by_mask = name == "aten::index" and any(x.dtype == th.bool for x in inputs[1:])
            if name in READS or picks_by_mask:
                self.waits.append(name)
        out = func(*tree_map_only(Remote, held, args), **tree_map_only(Remote, held, kwargs))
        if (
            any(remote)
            and out is not None
            and any(out is x.held for x in inputs if isinstance(x, Remote))
        ):
            return args[0]  # changed in place
        return tree_map_only(th.Tensor, Remote, out) if to_remote else out


def held(x):
    return x.held


def remote_model():
    """A function from trees to trees of the same kind, on any device, and the list of its calls."""
    calls = []

    def model_fn(x, t, **cond):
        calls.append(len(t))
        return {key: 0.3 * leaf + 0.1 * append_dims(t / 100, leaf) for key, leaf in x.items()}

    return model_fn, calls


@pytest.mark.parametrize(
    ("name", "settings", "respacing", "waits", "copies"),
    [
        ("ddpm", {}, "6", 0, 2),  # the noise of both modalities
        ("ddim", {}, "6", 0, 0),
        ("dpm_solver", {"steps": 6}, "", 0, 3),  # the timestep and the weights of the step
        (
            "dpm_solver++",
            {"steps": 6, "method": "multistep"},
            "",
            0,
            4,
        ),  # and of the change to data
        ("dpm_solver++", {}, "", 0.5, 5),  # the error of a step, once in two evaluations
    ],
    ids=str,
)
def test_the_host_waits_for_the_device_only_where_steps_are_adaptive(
    name, settings, respacing, waits, copies
):
    _, diffusion = tiny.build(as_built=True, timestep_respacing=respacing)
    sampler, (model_fn, calls) = make_sampler(name, diffusion, **settings), remote_model()
    generators = rng.per_sample(3, indices=range(2))
    seeded = rng.generator("noise")
    noise = {key: th.randn(2, *shape, generator=seeded) for key, shape in tiny.SHAPES.items()}
    wanted = sampler(model_fn, noise, rng.per_sample(3, indices=range(2)))
    with Device() as first:
        sampler(
            model_fn, {key: Remote(x) for key, x in noise.items()}, generators
        )  # takes tables to the device
    calls.clear()
    with Device() as device:
        found = sampler(
            model_fn,
            {key: Remote(x) for key, x in noise.items()},
            rng.per_sample(3, indices=range(2)),
        )
    assert all(kind == "aten::_to_copy" for kind in first.waits)
    assert len(device.waits) == waits * len(calls)
    assert len(device.copies) <= copies * len(calls) + 16  # eight when a clip is done
    for key, x in wanted.items():
        th.testing.assert_close(found[key].held, x)


def test_frames_of_a_clip_share_one_draw_of_noise():
    shared, like, x = rng.generator(5), rng.generator(5), th.zeros(6, 3, 4)
    noise = randn_like(x, [shared] * 4 + [like, rng.generator(6)])
    assert all(th.equal(noise[0], row) for row in noise[:5])
    assert not th.equal(noise[0], noise[5])
    assert th.equal(
        th.randn(3, generator=shared), th.randn(3, generator=like)
    )  # either has drawn once
