"""States on disk: complete or absent, verified, thinned out; runs that stop and resume."""

import errno
import io
import json
import os
import re
import signal
import time

import blobfile as bf
import pytest
import tiny
import torch as th
from test_train import everything, loop, rows, trained

from mm_diffusion import checkpoint
from mm_diffusion.checkpoint import CheckpointError
from mm_diffusion.config import TrainConfig
from mm_diffusion.training.lock import LOCK
from mm_diffusion.training.resume import find_state
from mm_diffusion.training.states import StateError, newest_intact, states_in

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
    trained(tmp_path, 1).save()
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
def test_a_corrupt_newest_state_falls_back_to_the_one_before_with_a_warning_that_names_it(
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
    if name == "state000002.json" and harm == "gone":  # intact files without a manifest are a state
        assert (state.step, warnings) == (2, [])
    else:
        assert state.step == 1
        assert name in warnings[0]


def _readable(path):
    try:
        return bool(json.loads(path.read_text())["files"])
    except (ValueError, KeyError):
        return False


def test_a_folder_without_an_intact_state_is_refused_and_not_overwritten(tmp_path):
    trained(tmp_path, 1).save()
    flip_bit(tmp_path / "opt000001.pt")
    with pytest.raises(CheckpointError, match="none of its 1 states is intact"):
        found(tmp_path)


def test_sampling_refuses_a_file_that_differs_from_its_manifest(tmp_path):
    trained(tmp_path, 1).save()
    checkpoint.load_state(str(tmp_path / "ema_0.9999_000001.pt"))
    flip_bit(tmp_path / "ema_0.9999_000001.pt")
    with pytest.raises(CheckpointError, match=r"ema_0.9999_000001.pt is corrupt"):
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


@pytest.fixture
def full_disk(monkeypatch):
    """A function after whose call torch.save finds no space left."""

    def fill():
        whole = th.save

        def save(content, file):
            file.close()
            with open("/dev/full", "wb", buffering=0) as full:
                whole(content, full)

        monkeypatch.setattr(th, "save", save)

    return fill


def test_a_full_disk_is_reported_with_the_state_that_is_intact(tmp_path, full_disk):
    trainer = loop(tmp_path, save_interval=2)
    at_step(trainer, 2, full_disk)
    trainer.save()
    with pytest.raises(
        StateError, match=r"cannot save step 2: the disk is full; the state of step 0 is intact"
    ):
        trainer.run_loop()
    assert found(tmp_path)[:2] == (str(tmp_path), 0)
    assert not [name for name in os.listdir(tmp_path) if "000002" in name or name[0] == "."]


def test_a_disk_that_is_full_from_the_start_is_reported_too(tmp_path, full_disk):
    trainer = loop(tmp_path)
    full_disk()
    with pytest.raises(
        StateError, match=r"cannot save step 0: the disk is full; no state was saved before"
    ):
        trainer.save()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_failed_write_inside_torch_save_is_reported_as_what_it_is(tmp_path, monkeypatch):
    """torch.save turns an error of its file into a RuntimeError about positions."""

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Full())
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(str(tmp_path / "x.pt"), {"a": th.zeros(1000)})


def test_a_save_tells_how_long_it_took(tmp_path, capsys):
    trained(tmp_path, 1).save()
    assert re.search(r"saved .*model000001.pt and its state in \d+\.\d s", capsys.readouterr().out)


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
    (tmp_path / "bucket/run").mkdir(parents=True)
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
    with pytest.raises(CheckpointError, match="is corrupt"):
        checkpoint.load_state(path)


def test_falling_back_with_few_states_to_keep_loses_none_that_is_intact(tmp_path):
    loop(tmp_path, lr_anneal_steps=6, save_interval=2, keep_last=2).run_loop()
    flip_bit(tmp_path / "opt000006.pt")
    again = loop(tmp_path, lr_anneal_steps=6, save_interval=2, keep_last=1, max_steps=5)
    assert again.step == 4
    again.run_loop()
    assert found(tmp_path)[:2] == (str(tmp_path), 5)
    assert (tmp_path / "opt000006.pt").exists()


def test_old_states_that_cannot_be_removed_cost_a_warning(tmp_path, monkeypatch, capsys):
    trainer = loop(tmp_path, lr_anneal_steps=2, save_interval=1, keep_last=1)
    monkeypatch.setattr(
        bf, "remove", lambda path: (_ for _ in ()).throw(PermissionError(1, "not permitted", path))
    )
    trainer.run_loop()
    assert "cannot remove old states" in capsys.readouterr().out
    assert [state.corruption() for state in states_in(str(tmp_path))] == ["", ""]


def test_what_a_killed_save_left_is_removed_and_a_corrupt_table_is_read(tmp_path):
    trained(tmp_path, 1).save()
    unfinished = tmp_path / f".{32 * 'a'}.pt"
    unfinished.write_text("half")
    (tmp_path / ".mine").write_text("mine")
    with open(tmp_path / "progress.csv", "w") as file:
        file.write("step,loss\n1,2.0\nx,\n")
    resumed = loop(tmp_path)
    assert not unfinished.exists()
    assert (tmp_path / ".mine").exists()
    resumed.run_step(*next(resumed.data))
    resumed._log()
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]


# Which state a run resumes


def test_the_same_command_with_another_runs_checkpoint_resumes_its_own_states(tmp_path):
    loop(tmp_path / "a", lr_anneal_steps=6, save_interval=2).run_loop()
    command = {"lr_anneal_steps": 6, "resume_checkpoint": str(tmp_path / "a/model000002.pt")}
    first = loop(tmp_path / "b", max_steps=3, **command)
    assert first.step == 2
    first.run_loop()
    between = loop(tmp_path / "b", max_steps=4, lr_anneal_steps=6)  # the record stays
    assert between.step == 3
    between.run_loop()
    second = loop(tmp_path / "b", **command)
    assert second.step == 4
    second.run_loop()
    assert json.loads((tmp_path / "b/state000006.json").read_text())["resumed_from"] == str(
        tmp_path / "a/model000002.pt"
    )


def test_a_state_without_a_manifest_descends_from_what_the_one_before_does(tmp_path):
    loop(tmp_path / "a", max_steps=2).run_loop()
    command = {"resume_checkpoint": str(tmp_path / "a/model000002.pt"), "save_interval": 1}
    loop(tmp_path / "b", max_steps=4, **command).run_loop()
    (tmp_path / "b/state000004.json").unlink()  # killed before it was written
    assert loop(tmp_path / "b", **command).step == 4


def test_an_explicit_checkpoint_that_the_existing_run_does_not_descend_from_is_refused(tmp_path):
    for folder in ("a", "b"):
        loop(tmp_path / folder, max_steps=4, save_interval=2).run_loop()
    for source in ("a/model000002.pt", "a", "b/model000002.pt"):  # elsewhere, or back in time
        with pytest.raises(ValueError, match=r"do not descend from .*another --output_dir"):
            found(tmp_path / "b", resume_checkpoint=str(tmp_path / source))
    for source in ("b/model000004.pt", "b"):
        state = found(tmp_path / "b", resume_checkpoint=str(tmp_path / source))
        assert state[:2] == (str(tmp_path / "b"), 4)


def test_initial_weights_are_ignored_with_a_note_where_a_run_is_resumed(tmp_path, capsys):
    trained(tmp_path, 1).save()
    loop(tmp_path, init_checkpoint="other.pt")
    note = f"--init_checkpoint other.pt ignored: resuming the existing run in {tmp_path}"
    assert note in capsys.readouterr().out


def test_the_same_command_resumes_where_it_was_bit_for_bit(tmp_path):
    options = {"lr_anneal_steps": 6, "save_interval": 2, **FLIP}
    straight = loop(tmp_path / "a", **options)
    straight.run_loop()
    broken = loop(tmp_path / "b", **options)
    for _ in range(3):
        broken.run_step(*next(broken.data))
        if broken.step == 2:
            broken.save()
    resumed = loop(tmp_path / "b", **options)
    assert resumed.step == 2
    resumed.run_loop()
    assert resumed.step == straight.step == 6  # no signal from elsewhere has stopped them
    assert same(resumed, straight)


def test_the_output_folder_comes_before_an_explicit_checkpoint_and_that_before_initial_weights(
    tmp_path,
):
    loop(tmp_path, max_steps=3, save_interval=1).run_loop()
    path, folder = str(tmp_path / "model000001.pt"), str(tmp_path)
    assert found(tmp_path / "new", resume_checkpoint=path)[:2] == (folder, 1)
    assert found(tmp_path / "new", resume_checkpoint=folder)[:2] == (folder, 3)
    for same in ("", "auto", folder):
        assert found(tmp_path, resume_checkpoint=same)[:2] == (folder, 3)
    assert found(tmp_path, init_checkpoint="other.pt")[:2] == (folder, 3)
    assert found(tmp_path / "new") is None
    assert found(tmp_path / "new", resume_checkpoint="none") is None


def test_weights_with_nothing_beside_them_resume_at_their_step_with_a_warning(tmp_path, capsys):
    """The usual way to fine-tune: of the joint model one file was ever published."""
    path, model = tmp_path / "model330011.pt", tiny.build()[0]
    th.save(checkpoint.published_state_dict(model), path)
    resumed = loop(tmp_path / "new", resume_checkpoint=str(path), ema_rate="0.9999,0.9")
    assert resumed.step == 330011
    printed = capsys.readouterr().out
    assert re.search(r"model330011.pt: neither averages nor optimizer .*--init_checkpoint", printed)
    for average in resumed.emas.values():
        for found, wanted in zip(average, model.parameters(), strict=True):
            assert th.equal(found, wanted)
    assert not resumed.optimizer.state
    resumed.run_step(*next(resumed.data))
    resumed.save()
    assert loop(tmp_path / "new", resume_checkpoint=str(path), ema_rate="0.9,0.9999").step == 330012


@pytest.mark.parametrize("name", ["guided-diffusion_64_256.pt", "model_SR_mmdiff_120000.pt"])
def test_a_checkpoint_to_resume_that_is_no_file_of_a_run_is_weights_for_a_new_one(tmp_path, name):
    """The published upsampler's launcher names its initial weights so."""
    model = tiny.build()[0]
    th.save(checkpoint.published_state_dict(model), tmp_path / name)
    started = loop(tmp_path / "new", resume_checkpoint=str(tmp_path / name))
    assert started.step == 0
    for found, wanted in zip(started.params, model.parameters(), strict=True):
        assert th.equal(found, wanted)
    started.run_step(*next(started.data))
    started.save()
    again = loop(tmp_path / "new", resume_checkpoint=str(tmp_path / name))
    assert again.step == 1
    with pytest.raises(ValueError, match=r"--resume_checkpoint .* and --init_checkpoint .* both"):
        loop(tmp_path / "b", resume_checkpoint=str(tmp_path / name), init_checkpoint="x.pt")


def test_a_run_is_never_overwritten(tmp_path):
    trained(tmp_path, 1).save()
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


def test_another_batch_size_continues_with_the_next_samples_and_a_note(tmp_path, capsys):
    trained(tmp_path, 3, batch_size=2).save()
    starts = []

    def data(start_sample):
        starts.append(start_sample)
        return iter(())

    resumed = loop(tmp_path, batch_size=4, data=data)
    assert starts == [6]
    assert (resumed.step, resumed.samples) == (3, 6)
    assert "note: batch_size was 2 and is 4 now" in capsys.readouterr().out


# Stopping


def at_step(trainer, step, act):
    """Call `act` when the trainer has done that many steps."""
    whole = trainer.run_step

    def run_step(*batch):
        whole(*batch)
        if trainer.step == step:
            act()

    trainer.run_step = run_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_ends_and_the_same_command_resumes_bit_for_bit(tmp_path, number, capsys):
    options = {"lr_anneal_steps": 5, **FLIP}
    before = signal.getsignal(number)
    straight = loop(tmp_path / "a", **options)
    straight.run_loop()
    stopped = loop(tmp_path / "b", **options)
    at_step(stopped, 2, lambda: os.kill(os.getpid(), number))
    stopped.run_loop()
    assert stopped.step == 2
    assert number.name in capsys.readouterr().out
    assert signal.getsignal(number) == before
    resumed = loop(tmp_path / "b", **options)
    assert resumed.step == 2
    resumed.run_loop()
    assert resumed.step == straight.step == 5  # no signal from elsewhere has stopped them
    assert same(resumed, straight)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    trainer = loop(tmp_path)

    def press_twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(trainer, 1, press_twice)
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
        assert found(folder)[:2] == (str(folder), steps)


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
    results = []
    for _ in range(3):
        before = [p.detach().clone() for p in trainer.params]
        trainer.run_step(*next(trainer.data))
        results.append(any(not th.equal(a, b) for a, b in zip(before, trainer.params, strict=True)))
    assert results == [True, False, True]
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
    results = []
    for _ in range(3):
        trainer.run_step(*next(trainer.data))
        results.append(float(trainer.log_loss_scale))
    assert results == [4.25, 3.25, 3.5]


def test_only_a_float16_run_hands_its_loss_scale_on(tmp_path):
    trained(tmp_path, 1, precision="fp32").save()
    resumed = loop(tmp_path, precision="fp16")
    assert float(resumed.log_loss_scale) == 20
    resumed.log_loss_scale -= 7
    resumed.step = 2
    resumed.save()
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
