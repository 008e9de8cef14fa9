"""What a run logs: TensorBoard and Weights & Biases (stand-ins here), and the rows of its table."""

import io
import os
import sys
import types
from pathlib import Path

import av
import pytest
import torch as th

from mm_diffusion import logger
from mm_diffusion.data import images
from mm_diffusion.training.trackers import make_trackers


class FakeWriter:
    """Stands in for torch's SummaryWriter: keeps what is added; once `broken`, flush raises."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.broken = folder, purge_step, False
        self.scalars: dict[str, list] = {}
        self.images: dict[str, th.Tensor] = {}
        self.audio: dict[str, tuple[th.Tensor, int]] = {}
        FakeWriter.latest = self

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))

    def add_image(self, tag: str, image: th.Tensor, step: int) -> None:
        self.images[tag] = image

    def add_images(self, tag: str, images: th.Tensor, step: int) -> None:
        self.images[tag] = images

    def add_audio(self, tag: str, audio: th.Tensor, step: int, sample_rate: int) -> None:
        assert audio.ndim == 1  # more channels are refused
        self.audio[tag] = (audio, sample_rate)

    def flush(self) -> None:
        if self.broken:
            raise OSError(28, "No space left on device")


@pytest.fixture
def tensorboard(monkeypatch):
    module = types.SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
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


def configure(folder: Path | str, flag: str, rank: int = 0) -> None:
    """As the training scripts do, with the tracker that `flag` asks for."""
    flags = {"output_dir": str(folder), "use_db": False, "use_tensorboard": False, flag: True}
    made = make_trackers(flags, rank)
    logger.configure(folder, enabled=rank == 0, trackers=made)


def log_row(step: int, **values: float) -> None:
    for key, value in {"step": step, **values}.items():
        logger.logkv(key, value)
    logger.dumpkvs()


def a_clip(frames: int = 5, channels: int = 2) -> tuple:
    """frames [F, 3, 8, 8], 4 a second, and a quarter of a second of audio per frame at 16 kHz."""
    generator = th.Generator().manual_seed(0)
    video = th.rand(frames, 3, 8, 8, generator=generator) * 2 - 1
    return video, 4, th.rand(channels, 4000 * frames, generator=generator) * 2 - 1, 16000


def streams_of(mp4: bytes) -> tuple[int, tuple[int, int]]:
    """Number of video frames, and (channels, samples) of the audio."""
    with av.open(io.BytesIO(mp4)) as container:
        frames = len(list(container.decode(video=0)))
    with av.open(io.BytesIO(mp4)) as container:
        audio = list(container.decode(audio=0))
    return frames, (audio[0].layout.nb_channels, sum(frame.samples for frame in audio))


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_has_every_value_of_a_row_at_its_step(tmp_path, tensorboard):
    configure(tmp_path, "use_tensorboard")
    logger.start_trackers()
    log_row(10, loss=0.5, loss_q0=0.25)
    log_row(20, loss=0.4)
    writer = tensorboard.latest
    assert writer.folder == str(tmp_path / "tensorboard")
    assert writer.scalars == {
        "training/loss": [(10, 0.5), (20, 0.4)],
        "quartiles/loss_q0": [(10, 0.25)],
    }


def test_a_resumed_run_hides_the_steps_that_it_makes_anew(tmp_path, tensorboard):
    configure(tmp_path, "use_tensorboard")
    logger.start_trackers(600)
    assert tensorboard.latest.purge_step == 601


@pytest.mark.parametrize("channels", [1, 2])
def test_tensorboard_shows_all_frames_and_plays_each_channel(tmp_path, tensorboard, channels):
    configure(tmp_path, "use_tensorboard")
    logger.start_trackers()
    video, fps, audio, sample_rate = a_clip(channels=channels)
    logger.log_clip("clip", video, fps, audio, sample_rate, 10)
    assert th.equal(tensorboard.latest.images["clip/frames"], images.to_uint8(video))
    played = tensorboard.latest.audio
    assert list(played) == [f"clip/audio/{channel}" for channel in range(channels)]
    for channel, (waveform, rate) in enumerate(played.values()):
        assert th.equal(waveform, audio[channel])
        assert rate == sample_rate


def test_a_full_disk_costs_tensorboard_but_no_row_of_the_run(tmp_path, tensorboard, capsys):
    configure(tmp_path, "use_tensorboard")
    logger.start_trackers()
    log_row(1, loss=0.5)
    tensorboard.latest.broken = True
    for step in (2, 3):
        log_row(step, loss=0.5)
    logger.log_clip("clip", *a_clip(), step=3)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "TensorBoard failed" in warnings[0]
    assert "No space left" in warnings[0]
    assert (tmp_path / "progress.csv").read_text().splitlines()[1:] == ["1,0.5", "2,0.5", "3,0.5"]


# ---------------------------------------------------------------- Weights & Biases


def test_weights_and_biases_has_rows_clips_and_images_of_a_step_together(tmp_path, wandb):
    configure(tmp_path / "mine", "use_db")
    logger.start_trackers(0, {"lr": 1e-4})
    log_row(10, loss=0.5)
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
    assert streams_of(row["clip/video"]) == (len(video), audio.shape)
    assert row["sheet"].shape == (8, 8, 3)


def test_a_mono_clip_can_be_watched_too(tmp_path, wandb):
    configure(tmp_path, "use_db")
    logger.start_trackers()
    logger.log_clip("clip", *a_clip(channels=1), step=10)
    frames, audio_shape = streams_of(wandb.rows[10]["clip/video"])
    assert (frames, audio_shape[0]) == (5, 2)


def test_a_resumed_run_continues_the_noted_one_and_a_new_one_does_not(tmp_path, wandb):
    for step in (0, 600, 0):
        configure(tmp_path, "use_db")
        logger.start_trackers(step)
    assert [asked["id"] for asked in wandb.asked] == [None, "id1", None]
    assert (tmp_path / "wandb_run.txt").read_text() == "id3\n"


def test_steps_that_weights_and_biases_has_are_not_sent_again(tmp_path, wandb):
    wandb.starting_step = 801
    configure(tmp_path, "use_db")
    logger.start_trackers(600)
    for step in (700, 800, 900):
        log_row(step, loss=0.5)
    assert list(wandb.rows) == [900]


def test_a_lost_network_costs_weights_and_biases_but_not_the_run(tmp_path, wandb, capsys):
    configure(tmp_path, "use_db")
    logger.start_trackers()
    wandb.failure = ConnectionError("network\nis gone")
    for step in (1, 2):
        log_row(step, loss=0.5)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [
        "warning: Weights & Biases failed (network is gone); the run continues without it"
    ]
    assert len((tmp_path / "progress.csv").read_text().splitlines()) == 3


# ---------------------------------------------------------------- errors before training


@pytest.mark.parametrize(
    ("flag", "package"), [("use_tensorboard", "tensorboard"), ("use_db", "wandb")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch, flag, package
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{flag} True.*pip install {package}"):
        configure(tmp_path, flag)


def test_the_key_comes_from_the_environment_and_reaches_no_file(tmp_path, wandb, monkeypatch):
    configure(tmp_path, "use_db")
    logger.start_trackers()
    log_row(1, loss=0.5)
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(ValueError, match="WANDB_API_KEY"):
        configure(tmp_path, "use_db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    configure(tmp_path, "use_db")


def test_a_start_that_fails_says_what_to_do(tmp_path, wandb):
    wandb.failure = RuntimeError("no route to host")
    configure(tmp_path, "use_db")
    with pytest.raises(ValueError, match=r"no route to host.*WANDB_MODE=offline"):
        logger.start_trackers()


def test_tensorboard_needs_a_folder(tensorboard):
    with pytest.raises(ValueError, match="--output_dir"):
        configure("", "use_tensorboard")


def test_other_ranks_start_no_tracker(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    configure(tmp_path, "use_db", rank=1)
    logger.start_trackers()
    logger.log_clip("clip", *a_clip(), step=1)
    assert not wandb.asked


def test_clips_and_images_go_nowhere_without_a_tracker(tmp_path):
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
            log_row(step, loss=0.5)
    rows = (tmp_path / "progress.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4", "5"]


def test_a_table_whose_last_line_was_not_ended_continues_in_a_new_line(tmp_path):
    (tmp_path / "progress.csv").write_text("loss,step\n0.5,10\n0.4,20")
    logger.configure(tmp_path)
    logger.drop_rows_from(20)
    log_row(30, loss=0.3)
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
