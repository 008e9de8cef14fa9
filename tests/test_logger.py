"""What a run tells TensorBoard and Weights & Biases, which are played by stand-ins here."""

import io
import os
import sys
import types
from pathlib import Path

import pytest
import soundfile
import torch as th

from mm_diffusion import logger
from mm_diffusion.data import images


class FakeWriter:
    """In the place of torch's SummaryWriter: keeps what it is given; `broken` raises from then on."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.broken = folder, purge_step, False
        self.scalars: dict[str, list] = {}
        self.images: dict[str, th.Tensor] = {}
        self.sounds: dict[str, types.SimpleNamespace] = {}
        self.file_writer = types.SimpleNamespace(add_summary=self._add_summary)
        FakeWriter.latest = self

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))

    def add_image(self, tag: str, image: th.Tensor, step: int) -> None:
        self.images[tag] = image

    def _add_summary(self, summary, step: int) -> None:
        (value,) = summary.value
        self.sounds[value.tag] = value.audio

    def flush(self) -> None:
        if self.broken:
            raise OSError(28, "No space left on device")


@pytest.fixture
def tensorboard(monkeypatch):
    class Summary(types.SimpleNamespace):
        Audio = Value = types.SimpleNamespace

    modules = {
        "tensorboard.compat.proto": types.SimpleNamespace(
            summary_pb2=types.SimpleNamespace(Summary=Summary)
        ),
        "torch.utils.tensorboard": types.SimpleNamespace(SummaryWriter=FakeWriter),
    }
    for name in ("tensorboard", "tensorboard.compat"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield FakeWriter
    logger.configure()


class FakeWandb:
    """In the place of the package: the runs it was `asked` for, and `rows` by step."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.rows: dict[int, dict] = {}
        self.starting_step, self.failure = 0, None
        self.Image = self.Video = self.Audio = self._keep

    def _keep(self, what):
        return Path(what).read_bytes() if isinstance(what, str) else what

    def init(self, **asked):
        self.asked.append(asked)
        if self.failure:
            raise self.failure
        return types.SimpleNamespace(
            id=asked["id"] or f"id{len(self.asked)}",
            starting_step=self.starting_step,
            log=self._log,
        )

    def _log(self, values: dict, step: int) -> None:
        if self.failure:
            raise self.failure
        self.rows.setdefault(step, {}).update(values)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    yield fake
    logger.configure()


def tell(step: int, **values: float) -> None:
    for key, value in {"step": step, **values}.items():
        logger.logkv(key, value)
    logger.dumpkvs()


def a_clip(frames: int = 5, channels: int = 2) -> tuple:
    """frames [F, 3, 8, 8], 4 a second, and a quarter of a second of sound per frame at 16 kHz."""
    generator = th.Generator().manual_seed(0)
    video = th.rand(frames, 3, 8, 8, generator=generator) * 2 - 1
    return video, 4, th.rand(channels, 4000 * frames, generator=generator) * 2 - 1, 16000


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_has_every_number_of_a_row_at_its_step(tmp_path, tensorboard):
    logger.configure(tmp_path, use_tensorboard=True)
    logger.start_trackers()
    tell(10, loss=0.5, loss_q0=0.25)
    tell(20, loss=0.4)
    writer = tensorboard.latest
    assert writer.folder == str(tmp_path / "tensorboard")
    assert writer.scalars == {
        "training/loss": [(10, 0.5), (20, 0.4)],
        "quartiles/loss_q0": [(10, 0.25)],
    }


def test_a_resumed_run_hides_the_steps_that_it_makes_anew(tmp_path, tensorboard):
    logger.configure(tmp_path, use_tensorboard=True)
    logger.start_trackers(600)
    assert tensorboard.latest.purge_step == 601


@pytest.mark.parametrize("channels", [1, 2])
def test_tensorboard_shows_all_frames_and_plays_all_channels(tmp_path, tensorboard, channels):
    logger.configure(tmp_path, use_tensorboard=True)
    logger.start_trackers()
    video, fps, audio, sample_rate = a_clip(channels=channels)
    logger.log_clip("clip", video, fps, audio, sample_rate, 10)
    picture = tensorboard.latest.images["clip/frames"]
    assert picture.shape == (
        3,
        2 * 10 + 2,
        3 * 10 + 2,
    )  # 5 frames in 2 rows of 3, with 2 pixels between
    assert th.equal(picture[:, 12:20, 12:20], images.to_uint8(video)[4])
    sound = tensorboard.latest.sounds["clip/sound"]
    samples, rate = soundfile.read(io.BytesIO(sound.encoded_audio_string), always_2d=True)
    assert (sound.num_channels, sound.length_frames, sound.sample_rate) == (
        channels,
        audio.shape[1],
        sample_rate,
    )
    assert rate == sample_rate
    assert (th.from_numpy(samples.T) - audio).abs().max() <= 1 / 32768


def test_a_full_disk_costs_tensorboard_but_no_row_of_the_run(tmp_path, tensorboard, capsys):
    logger.configure(tmp_path, use_tensorboard=True)
    logger.start_trackers()
    tell(1, loss=0.5)
    tensorboard.latest.broken = True
    for step in (2, 3):
        tell(step, loss=0.5)
    logger.log_clip("clip", *a_clip(), step=3)
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(told) == 1
    assert "TensorBoard failed" in told[0]
    assert "No space left" in told[0]
    assert (tmp_path / "progress.csv").read_text().splitlines()[1:] == ["1,0.5", "2,0.5", "3,0.5"]


# ---------------------------------------------------------------- Weights & Biases


def test_weights_and_biases_has_rows_clips_and_pictures_of_a_step_together(tmp_path, wandb):
    logger.configure(tmp_path / "mine", use_db=True)
    logger.start_trackers(0, {"lr": 1e-4})
    tell(10, loss=0.5)
    video, fps, audio, sample_rate = a_clip()
    logger.log_clip("clip", video, fps, audio, sample_rate, 10)
    logger.log_image("sheet", video[0], 10)
    (asked,) = wandb.asked
    assert asked["config"] == {"lr": 1e-4}
    assert (asked["project"], asked["name"], asked["resume"]) == (
        "mm-diffusion-stereo",
        "mine",
        "allow",
    )
    row = wandb.rows[10]
    assert row["loss"] == 0.5
    assert b"ftyp" in row["clip/video"][:16]
    assert soundfile.info(io.BytesIO(row["clip/sound"])).frames == audio.shape[1]
    assert row["sheet"].shape == (8, 8, 3)


def test_a_mono_clip_can_be_watched_too(tmp_path, wandb):
    logger.configure(tmp_path, use_db=True)
    logger.start_trackers()
    logger.log_clip("clip", *a_clip(channels=1), step=10)
    assert soundfile.info(io.BytesIO(wandb.rows[10]["clip/sound"])).channels == 1
    assert wandb.rows[10]["clip/video"]


def test_a_resumed_run_goes_on_in_the_noted_one_and_a_new_one_does_not(tmp_path, wandb):
    for step in (0, 600, 0):
        logger.configure(tmp_path, use_db=True)
        logger.start_trackers(step)
    assert [asked["id"] for asked in wandb.asked] == [None, "id1", None]
    assert (tmp_path / "wandb_run.txt").read_text() == "id3\n"


def test_steps_that_weights_and_biases_has_are_not_sent_again(tmp_path, wandb):
    wandb.starting_step = 801
    logger.configure(tmp_path, use_db=True)
    logger.start_trackers(600)
    for step in (700, 800, 900):
        tell(step, loss=0.5)
    assert list(wandb.rows) == [900]


def test_a_lost_network_costs_weights_and_biases_but_not_the_run(tmp_path, wandb, capsys):
    logger.configure(tmp_path, use_db=True)
    logger.start_trackers()
    wandb.failure = ConnectionError("network\nis gone")
    for step in (1, 2):
        tell(step, loss=0.5)
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert told == [
        "warning: Weights & Biases failed (network is gone); the run goes on without it"
    ]
    assert len((tmp_path / "progress.csv").read_text().splitlines()) == 3


# ---------------------------------------------------------------- what is missing is told before training


@pytest.mark.parametrize(
    ("flag", "package"), [("use_tensorboard", "tensorboard"), ("use_db", "wandb")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch, flag, package
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{flag} True.*pip install {package}"):
        logger.configure(tmp_path, **{flag: True})


def test_the_key_comes_from_the_environment_and_reaches_no_file(tmp_path, wandb, monkeypatch):
    logger.configure(tmp_path, use_db=True)
    logger.start_trackers()
    tell(1, loss=0.5)
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(ValueError, match="WANDB_API_KEY"):
        logger.configure(tmp_path, use_db=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger.configure(tmp_path, use_db=True)


def test_a_start_that_fails_says_what_to_do(tmp_path, wandb):
    wandb.failure = RuntimeError("no route to host")
    logger.configure(tmp_path, use_db=True)
    with pytest.raises(ValueError, match=r"no route to host.*WANDB_MODE=offline"):
        logger.start_trackers()


def test_tensorboard_needs_a_folder(tensorboard):
    with pytest.raises(ValueError, match="--output_dir"):
        logger.configure(use_tensorboard=True)


def test_other_ranks_start_no_tracker(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    logger.configure(tmp_path, enabled=False, use_db=True)
    logger.start_trackers()
    logger.log_clip("clip", *a_clip(), step=1)
    assert not wandb.asked


def test_clips_and_pictures_go_nowhere_without_a_tracker(tmp_path):
    logger.configure(tmp_path)
    logger.start_trackers()
    logger.log_clip("clip", *a_clip(), step=1)
    logger.log_image("sheet", th.zeros(3, 8, 8), 1)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- rows and memory


def test_rows_that_a_resumed_run_makes_anew_appear_once(tmp_path):
    for first, last in ((1, 4), (3, 5)):
        logger.configure(tmp_path)
        logger.drop_rows_from(first - 1)
        logger.drop_rows_from(first - 1)
        for step in range(first, last + 1):
            tell(step, loss=0.5)
    rows = (tmp_path / "progress.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4", "5"]


def test_a_table_whose_last_line_was_not_ended_goes_on_in_a_new_line(tmp_path):
    (tmp_path / "progress.csv").write_text("loss,step\n0.5,10\n0.4,20")
    logger.configure(tmp_path)
    logger.drop_rows_from(20)
    tell(30, loss=0.3)
    assert (tmp_path / "progress.csv").read_text().splitlines() == [
        "loss,step",
        "0.5,10",
        "0.4,20",
        "0.3,30",
    ]


def test_peak_memory_is_at_least_what_the_process_holds_now_and_less_than_there_is(monkeypatch):
    monkeypatch.setattr(th.cuda, "is_initialized", lambda: False)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    page = os.sysconf("SC_PAGE_SIZE")
    assert pages * page <= logger.peak_memory() * 1.01 < os.sysconf("SC_PHYS_PAGES") * page


def test_peak_memory_is_that_of_the_tensors_where_a_gpu_is_in_use(monkeypatch):
    monkeypatch.setattr(th.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(th.cuda, "max_memory_allocated", lambda: 123)
    assert logger.peak_memory() == 123
