"""States on disk: complete or absent, checked, thinned out; runs that stop and go on by themselves."""

import errno
import json
import os
import signal
import threading
import time

import blobfile as bf
import pytest
import torch as th
from test_train import everything, loop, rows, save, trained

from mm_diffusion import checkpoint
from mm_diffusion.checkpoint import CheckpointError
from mm_diffusion.script_util import TrainConfig
from mm_diffusion.training import states
from mm_diffusion.training.resume import find_state
from mm_diffusion.training.states import HostCopy, StateError, newest_intact, states_in

FLIP = {
    "schedule_sampler": "loss-second-moment",
    "flags": {"dropout": 0.2},
    "ema_rate": "0.9999,0.9",
}


def same(a, b):
    return all(th.equal(x, y) for x, y in zip(everything(a), everything(b), strict=True))


def found(folder, **config):
    return find_state(TrainConfig(output_dir=str(folder), **config))


def flip_bit(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 16
    path.write_bytes(data)


# Files


def test_a_state_has_a_manifest_with_the_length_and_checksum_of_every_file(tmp_path):
    save(trained(tmp_path, 1))
    manifest = json.loads((tmp_path / "state000001.json").read_text())
    assert sorted(manifest["files"]) == ["ema_0.9999_000001.pt", "model000001.pt", "opt000001.pt"]
    for name, checksum in manifest["files"].items():
        assert checksum["bytes"] == (tmp_path / name).stat().st_size
        assert len(checksum["sha256"]) == 64
    assert (manifest["samples"], manifest["ranks"], manifest["batch_size"]) == (2, 1, 2)
    assert newest_intact(str(tmp_path), pytest.fail).step == 1


@pytest.mark.parametrize(
    "name", ["model000002.pt", "opt000002.pt", "ema_0.9999_000002.pt", "state000002.json"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_a_damaged_newest_state_falls_back_to_the_one_before_with_a_warning_that_names_it(
    tmp_path, name, harm
):
    trainer = loop(tmp_path, lr_anneal_steps=2, save_interval=1)
    trainer.run_loop()
    path = tmp_path / name
    if harm == "flip":
        flip_bit(path)
    elif harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if harm == "empty" else -1])
    if name == "state000002.json" and harm == "flip" and _readable(path):
        pytest.skip("the flipped bit left the manifest as it was in meaning")
    warnings = []
    state = newest_intact(str(tmp_path), warnings.append)
    if name == "state000002.json" and harm == "gone":  # whole files without a manifest are a state
        assert (state.step, warnings) == (2, [])
    else:
        assert state.step == 1
        assert name in warnings[0]


def _readable(path):
    try:
        return bool(json.loads(path.read_text())["files"])
    except (ValueError, KeyError):
        return False


def test_a_folder_without_a_whole_state_is_refused_and_not_overwritten(tmp_path):
    save(trained(tmp_path, 1))
    flip_bit(tmp_path / "opt000001.pt")
    with pytest.raises(CheckpointError, match="none of its 1 states is whole"):
        found(tmp_path)


def test_sampling_refuses_a_file_that_its_manifest_calls_damaged(tmp_path):
    save(trained(tmp_path, 1))
    checkpoint.load_state(str(tmp_path / "ema_0.9999_000001.pt"))
    flip_bit(tmp_path / "ema_0.9999_000001.pt")
    with pytest.raises(CheckpointError, match=r"ema_0.9999_000001.pt is damaged"):
        checkpoint.load_state(str(tmp_path / "ema_0.9999_000001.pt"))


def test_old_states_go_and_multiples_stay(tmp_path):
    loop(tmp_path, lr_anneal_steps=7, save_interval=1, keep_last=2, keep_every=3).run_loop()
    assert [state.step for state in states_in(str(tmp_path))] == [7, 6, 3]
    steps = {name.split("0")[-1] for name in os.listdir(tmp_path) if name.endswith(".pt")}
    assert steps == {"7.pt", "6.pt", "3.pt"}


def test_files_of_others_stay_when_old_states_go(tmp_path):
    (tmp_path / "model000001.pt.bak").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    loop(tmp_path, lr_anneal_steps=3, save_interval=1, keep_last=1).run_loop()
    assert {"model000001.pt.bak", "notes.txt"} <= set(os.listdir(tmp_path))


def test_a_full_disk_stops_the_run_says_so_and_leaves_the_last_state_whole(tmp_path, monkeypatch):
    trainer = loop(tmp_path, lr_anneal_steps=4, save_interval=2)
    whole = os.fsync

    def full(handle):  # while a state is written, training goes on: the file tells which one it is
        if "000004" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StateError, match=r"cannot save step 4: the disk is full; the state of step 2 is intact"
    ):
        trainer.run_loop()
    assert found(tmp_path) == (str(tmp_path), 2)
    assert not [name for name in os.listdir(tmp_path) if "000004" in name]


def test_a_full_disk_stops_training_at_the_next_step(tmp_path, monkeypatch):
    """The error comes from the file itself, as torch.save meets it."""
    trainer, whole = loop(tmp_path), states._Hashing.write

    def write(self, data):
        self.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        return whole(self, data)

    monkeypatch.setattr(states._Hashing, "write", write)
    trainer.run_step(*next(trainer.data))
    trainer.save()
    assert trainer.writer._running.exception(60)
    with pytest.raises(
        StateError, match=r"cannot save step 1: the disk is full; no state was saved before"
    ):
        trainer.run_step(*next(trainer.data))
    assert [
        name for name in os.listdir(tmp_path) if name.endswith((".pt", ".partial", ".json"))
    ] == []


def test_training_goes_on_while_a_state_is_written_and_what_is_written_is_of_its_step(
    tmp_path, monkeypatch
):
    trainer = loop(tmp_path)
    gate, whole = threading.Event(), states.write_file

    def slow(path, content):
        gate.wait(30)
        return whole(path, content)

    monkeypatch.setattr("mm_diffusion.training.states.write_file", slow)
    trainer.run_step(*next(trainer.data))
    wanted = [p.detach().clone() for p in trainer.params]
    trainer.save()
    trainer.run_step(*next(trainer.data))
    assert not states_in(str(tmp_path))
    gate.set()
    trainer.writer.wait()
    resumed = loop(tmp_path)
    assert resumed.step == 1
    assert all(th.equal(a, b) for a, b in zip(resumed.params, wanted, strict=True))


def test_an_update_waits_for_the_copy_that_runs_beside_the_next_forward_and_backward(
    tmp_path, monkeypatch
):
    trainer, whole = loop(tmp_path), HostCopy.take

    def slow(self, name, tree):
        if not name:
            time.sleep(1)
        return whole(self, name, tree)

    monkeypatch.setattr(HostCopy, "take", slow)
    trainer.run_step(*next(trainer.data))
    wanted = [x.detach().clone() for x in everything(trainer)]
    trainer.save()
    trainer.run_step(*next(trainer.data))
    trainer.writer.wait()
    resumed = loop(tmp_path)
    assert all(th.equal(a, b) for a, b in zip(everything(resumed), wanted, strict=True))


def test_copies_use_their_memory_again_and_keep_types():
    copy, tree = HostCopy(), {"a": [th.ones(3), 5], "b": (th.zeros(2, dtype=th.int64), "x")}
    first = copy.take("t", tree)
    tree["a"][0].fill_(7)
    assert first["a"][0].tolist() == [1, 1, 1]
    second = copy.take("t", tree)
    assert second["a"][0].tolist() == [7, 7, 7]
    assert second["a"][0].data_ptr() == first["a"][0].data_ptr()
    assert second["b"][0].dtype == th.int64
    assert second["a"][1] == 5
    assert second["b"][1] == "x"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that blobfile finds under gs://bucket."""

    def here(value):
        return value.replace("gs://", f"{tmp_path}/") if isinstance(value, str) else value

    for name in ("BlobFile", "copy", "exists", "isdir", "listdir", "makedirs", "remove", "stat"):
        whole = getattr(bf, name)
        monkeypatch.setattr(
            bf, name, lambda *args, f=whole, **kwargs: f(*map(here, args), **kwargs)
        )
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def test_a_run_lives_in_a_remote_folder(bucket, tmp_path):
    options = {"lr_anneal_steps": 4, "keep_last": 1, **FLIP}
    straight = loop(tmp_path / "straight", **options)
    straight.run_loop()
    for steps in (2, 4):
        part = loop("gs://bucket/run", max_steps=steps, **options)
        part.run_loop()
    assert same(part, straight)
    names = [
        "ema_0.9999_000004.pt",
        "ema_0.9_000004.pt",
        "model000004.pt",
        "opt000004.pt",
        "progress.csv",
    ]
    assert sorted(os.listdir(bucket / "run")) == [*names, "state000004.json"]
    assert [row["step"] for row in rows(bucket / "run")] == ["1", "2", "3", "4"]
    path = "gs://bucket/run/ema_0.9_000004.pt"
    assert checkpoint.load_state(path)[1]["num_channels"] == 32
    flip_bit(bucket / "run/ema_0.9_000004.pt")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load_state(path)


def test_falling_back_with_few_states_to_keep_loses_none_that_is_whole(tmp_path):
    loop(tmp_path, lr_anneal_steps=6, save_interval=2, keep_last=2).run_loop()
    flip_bit(tmp_path / "opt000006.pt")
    again = loop(tmp_path, lr_anneal_steps=6, save_interval=2, keep_last=1, max_steps=5)
    assert again.step == 4
    again.run_loop()
    assert found(tmp_path) == (str(tmp_path), 5)
    assert (tmp_path / "abandoned_1/opt000006.pt").exists()


def test_old_states_that_cannot_be_removed_cost_a_warning(tmp_path, monkeypatch, capsys):
    trainer = loop(tmp_path, lr_anneal_steps=2, save_interval=1, keep_last=1)
    monkeypatch.setattr(
        bf, "remove", lambda path: (_ for _ in ()).throw(PermissionError(1, "not permitted", path))
    )
    trainer.run_loop()
    assert "old states stay" in capsys.readouterr().out
    assert [state.damage() for state in states_in(str(tmp_path))] == ["", ""]


def test_an_error_lets_the_state_in_hand_be_finished(tmp_path, monkeypatch):
    trainer, whole = loop(tmp_path, save_interval=1), states.write_file
    monkeypatch.setattr(
        "mm_diffusion.training.states.write_file", lambda *args: (time.sleep(0.1), whole(*args))[1]
    )
    poison_data = trainer.run_step

    def run_step(*batch):
        poison_data(*batch)
        if trainer.step == 2:
            raise ValueError("out of luck")

    trainer.run_step = run_step
    with pytest.raises(ValueError, match="out of luck"):
        trainer.run_loop()
    assert found(tmp_path) == (str(tmp_path), 1)


def test_what_a_killed_save_left_goes_and_a_table_with_damage_is_read(tmp_path):
    save(trained(tmp_path, 1))
    (tmp_path / "model000002.pt.partial").write_text("half")
    (tmp_path / "mine.partial").write_text("mine")
    with open(tmp_path / "progress.csv", "w") as file:
        file.write("step,loss\n1,2.0\nx,\n")
    resumed = loop(tmp_path)
    assert not (tmp_path / "model000002.pt.partial").exists()
    assert (tmp_path / "mine.partial").exists()
    resumed.run_step(*next(resumed.data))
    resumed._log()
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]


# Which state a run goes on from


def test_the_same_command_with_another_runs_checkpoint_goes_on_with_its_own_states(tmp_path):
    loop(tmp_path / "a", lr_anneal_steps=6, save_interval=2).run_loop()
    command = {"lr_anneal_steps": 6, "resume_checkpoint": str(tmp_path / "a/model000002.pt")}
    for folder in ("b", "a"):  # elsewhere, or back in time
        first = loop(tmp_path / folder, max_steps=3, **command)
        assert first.step == 2
        first.run_loop()
        second = loop(tmp_path / folder, **command)
        assert second.step == 3
        second.run_loop()
    assert sorted(path.name for path in (tmp_path / "a/abandoned_1").glob("model*")) == [
        "model000004.pt",
        "model000006.pt",
    ]


def test_the_same_command_goes_on_where_it_was_bit_for_bit(tmp_path):
    options = {"lr_anneal_steps": 6, "save_interval": 2, **FLIP}
    straight = loop(tmp_path / "a", **options)
    straight.run_loop()
    broken = loop(tmp_path / "b", **options)
    for _ in range(3):
        broken.run_step(*next(broken.data))
        if broken.step == 2:
            save(broken)
    resumed = loop(tmp_path / "b", **options)
    assert resumed.step == 2
    resumed.run_loop()
    assert same(resumed, straight)


def test_an_explicit_checkpoint_comes_before_the_output_folder_and_that_before_initial_weights(
    tmp_path,
):
    loop(tmp_path, lr_anneal_steps=3, save_interval=1).run_loop()
    path = str(tmp_path / "model000001.pt")
    assert found(tmp_path, resume_checkpoint=path) == (str(tmp_path), 1)
    assert found(tmp_path / "new", resume_checkpoint=path) == (str(tmp_path), 1)
    assert found(tmp_path / "new", resume_checkpoint=str(tmp_path)) == (str(tmp_path), 3)
    assert found(tmp_path, resume_checkpoint="auto") == found(tmp_path) == (str(tmp_path), 3)
    assert found(tmp_path, init_checkpoint="other.pt") == (str(tmp_path), 3)
    assert found(tmp_path / "new") is None
    assert found(tmp_path / "new", resume_checkpoint="none") is None


def test_a_run_is_never_overwritten(tmp_path):
    save(trained(tmp_path, 1))
    with pytest.raises(ValueError, match="holds a run already"):
        found(tmp_path, resume_checkpoint="none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no state to resume"):
        found(tmp_path / "new", resume_checkpoint=str(tmp_path / "empty"))


def test_a_finished_run_does_nothing_when_started_again(tmp_path):
    loop(tmp_path, lr_anneal_steps=2).run_loop()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    again = loop(tmp_path, lr_anneal_steps=2)
    again.run_loop()
    assert again.step == 2
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")} == before


def test_another_batch_size_goes_on_with_the_next_samples_and_a_note(tmp_path, capsys):
    save(trained(tmp_path, 3, batch_size=2))
    starts = []

    def data(start_sample):
        starts.append(start_sample)
        return iter(())

    resumed = loop(tmp_path, batch_size=4, data=data)
    assert starts == [6]
    assert (resumed.step, resumed.samples) == (3, 6)
    assert "note: 1 ranks of 2 samples before, now 1 of 4" in capsys.readouterr().out


# Stopping


def press(number, trainer, step):
    """Send this process a signal when the trainer has done that many steps."""
    whole = trainer.run_step

    def run_step(*batch):
        whole(*batch)
        if trainer.step == step:
            os.kill(os.getpid(), number)

    trainer.run_step = run_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_ends_and_the_same_command_goes_on_bit_for_bit(tmp_path, number, capsys):
    options = {"lr_anneal_steps": 5, **FLIP}
    before = signal.getsignal(number)
    straight = loop(tmp_path / "a", **options)
    straight.run_loop()
    stopped = loop(tmp_path / "b", **options)
    press(number, stopped, 2)
    stopped.run_loop()
    assert stopped.step == 2
    assert number.name in capsys.readouterr().out
    assert signal.getsignal(number) == before
    resumed = loop(tmp_path / "b", **options)
    assert resumed.step == 2
    resumed.run_loop()
    assert same(resumed, straight)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    trainer = loop(tmp_path)
    whole = trainer.run_step

    def run_step(*batch):
        whole(*batch)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.run_step = run_step
    with pytest.raises(KeyboardInterrupt):
        trainer.run_loop()


def test_training_ends_by_itself_at_the_first_limit(tmp_path):
    for limits, steps in (
        ({"max_steps": 3}, 3),
        ({"max_steps": 3, "lr_anneal_steps": 5}, 3),
        ({"max_hours": 1e-9}, 0),
    ):
        folder = tmp_path / str(len(limits)) / str(steps)
        trainer = loop(folder, **limits)
        trainer.run_loop()
        assert trainer.step == steps
        assert found(folder) == (str(folder), steps)


def test_max_steps_does_not_change_the_learning_rates(tmp_path):
    straight = loop(tmp_path / "a", lr_anneal_steps=4)
    straight.run_loop()
    for steps in (2, 4):
        part = loop(tmp_path / "b", lr_anneal_steps=4, max_steps=steps)
        part.run_loop()
    assert same(part, straight)


def test_an_error_of_the_data_is_not_taken_for_a_signal(tmp_path):
    def data(start_sample):
        raise RuntimeError("worker died")
        yield

    with pytest.raises(RuntimeError, match="worker died"):
        loop(tmp_path, data=data).run_loop()


# Gradients that are not finite


def poison(trainer, steps):
    """Make the gradient of these steps infinite."""
    whole = trainer._forward_backward

    def forward_backward(*batch):
        whole(*batch)
        if trainer.step in steps:
            trainer.params[0].grad[0] = float("inf")

    trainer._forward_backward = forward_backward


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(tmp_path, precision):
    trainer = loop(tmp_path, precision=precision, grad_clip=1.0)
    poison(trainer, [1])
    seen = []
    for _ in range(3):
        before = [p.detach().clone() for p in trainer.params]
        trainer.run_step(*next(trainer.data))
        seen.append(any(not th.equal(a, b) for a, b in zip(before, trainer.params, strict=True)))
    assert seen == [True, False, True]
    assert trainer.skipped.tolist() == [1, 0, 1]
    assert {float(moments["step"]) for moments in trainer.optimizer.state.values()} == {2}
    assert all(p.isfinite().all() for p in trainer.params)


def test_too_many_in_a_row_stop_the_run_with_good_weights_on_disk_and_advice(tmp_path):
    trainer = loop(tmp_path, save_interval=2, max_skipped_steps=3)
    poison(trainer, range(2, 100))
    with pytest.raises(ValueError, match=r"not finite 4 steps in a row .*--lr"):
        trainer.run_loop()
    resumed = loop(tmp_path, max_skipped_steps=3, lr_anneal_steps=trainer.step + 10)
    assert resumed.step == trainer.step
    assert all(p.isfinite().all() for p in resumed.params)
    resumed.run_loop()  # followed the advice: the streak of before does not count
    assert resumed.step == trainer.step + 10
    assert resumed.skipped[0] == trainer.skipped[0]


def test_the_loss_scale_falls_at_an_overflow_grows_otherwise_and_is_kept(tmp_path):
    trainer = loop(tmp_path, fp16_scale_growth=0.25)
    trainer.precision = "fp16"
    trainer.log_loss_scale += 4
    poison(trainer, [1])
    seen = []
    for _ in range(3):
        trainer.run_step(*next(trainer.data))
        seen.append(float(trainer.log_loss_scale))
    assert seen == [4.25, 3.25, 3.5]


def test_only_a_float16_run_hands_its_loss_scale_on(tmp_path):
    save(trained(tmp_path, 1, precision="fp32"))
    resumed = loop(tmp_path, precision="fp16")
    assert float(resumed.log_loss_scale) == 20
    resumed.log_loss_scale -= 7
    resumed.step = 2
    save(resumed)
    assert float(loop(tmp_path, precision="fp16").log_loss_scale) == 13


def test_a_streak_that_is_over_counts_too(tmp_path):
    trainer = loop(tmp_path, log_interval=6, max_skipped_steps=2)
    poison(trainer, [1, 2, 3])
    with pytest.raises(ValueError, match="not finite 3 steps in a row"):
        trainer.run_loop()


def test_precisions_are_named(tmp_path):
    for precision, wanted in (("fp32", "fp32"), ("bf16", "bf16"), ("", "bf16")):
        assert loop(tmp_path, precision=precision, use_fp16=True).precision == wanted
    with pytest.raises(ValueError, match="precision 'half'"):
        loop(tmp_path, precision="half")
