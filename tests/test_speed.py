"""What sampling must not wait for: encoders, copies to the device, compilation."""

import os
import threading

import pytest
import tiny

from mm_diffusion import drawing, media
from mm_diffusion.drawing import background, draw_clips, write_sample
from mm_diffusion.sampling import make_sampler, prepare

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
    draw_clips(model, sampler, [4, 2, 9], 1, 1, "cpu", slow)
    assert saved == [4, 2, 9]  # in order, and all of them before draw_clips returns


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
    """It is told by the next clip, not at the end of the run; what was drawn before is still written."""
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
        write_sample(tmp_path, "clip_00007", clip["video"][0], clip["audio"][0], 4, 16000)


def test_a_failing_encoder_leaves_no_half_file(tmp_path, monkeypatch):
    def half(container, stream, frames):
        raise OSError("no space left")

    monkeypatch.setattr(media, "_encode_audio", half)
    clip = tiny.clips(0, 1)
    with pytest.raises(OSError, match="no space left"):
        write_sample(tmp_path, "k", clip["video"][0], clip["audio"][0], 4, 16000)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["k.wav"]


def test_what_a_killed_run_left_half_written_is_removed_by_the_next(tmp_path):
    old, new = (tmp_path / "original" / f".{digit * 32}.mp4" for digit in "ab")
    old.parent.mkdir()
    kept = [new, old.with_name(".mine.mp4")]
    for path in (old, *kept):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(kept[1], (0, 0))
    drawing.missing_clips(tmp_path, ["k"], {"given": []})
    assert sorted(old.parent.iterdir()) == sorted(kept)
