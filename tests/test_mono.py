"""Mono models: trained on the mean of both channels, written as two equal ones, evaluated."""

import json
import runpy
import sys

import pytest
import tiny
import torch as th
from media_files import make_clip, moving_frames, noise
from test_launchers import REPO

from mm_diffusion import checkpoint
from mm_diffusion.config import DataConfig
from mm_diffusion.data import encode
from mm_diffusion.data.clips import load_data, read_clips
from mm_diffusion.data.decode import read_wav, read_window

RATES = {"video_fps": 4, "audio_fps": 1024}
FLAGS = {**tiny.FLAGS, "audio_size": "1,1024", **RATES}
READING = {"video_size": "4,3,8,8", "audio_size": "1,1024", "num_workers": 0, **RATES}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script with these flags."""
    monkeypatch.setenv("MM_DIFFUSION_CACHE", str(tmp_path / "cache"))

    def script(name, **flags):
        line = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        monkeypatch.setattr(sys, "argv", [name, *line])
        runpy.run_path(str(REPO / f"py_scripts/{name}.py"))["main"]()

    return script


@pytest.fixture
def clips(tmp_path):
    """A folder of three stereo clips."""
    (tmp_path / "clips").mkdir()
    for k in range(3):
        make_clip(
            tmp_path / f"clips/{k}.mkv", moving_frames(10, k), 10, noise(16000, seed=k), 16000
        )
    return tmp_path / "clips"


@pytest.fixture
def model(tmp_path):
    checkpoint.save_weights(
        str(tmp_path / "model000001.pt"), tiny.build(audio_size="1,1024")[0], FLAGS
    )
    return tmp_path / "model000001.pt"


def two_equal_channels(audio):
    return audio.shape[0] == 2 and th.equal(audio[0], audio[1]) and audio.abs().max() > 0


@pytest.mark.parametrize("cached", [False, True])
def test_mono_is_the_mean_of_left_and_right(clips, tmp_path, cached):
    stereo = read_clips(str(clips), DataConfig(**READING | {"audio_size": "2,1024"}))["audio"]
    cache = str(tmp_path / "decoded") if cached else ""
    config = DataConfig(data_dir=str(clips), batch_size=3, cache_dir=cache, **READING)
    for _ in range(1 + cached):
        found = next(load_data(config))[0]["audio"]
        assert found.shape == (3, 1, 1024)
        for audio in found:
            distances = (stereo.mean(dim=1, keepdim=True) - audio).abs().amax(dim=(1, 2))
            assert distances.min() < 1e-6
    both = DataConfig(data_dir=str(clips), cache_dir=cache, **READING | {"audio_size": "2,1024"})
    assert next(load_data(both))[0]["audio"].shape == (4, 2, 1024)


def test_a_mono_model_trains_and_its_previews_have_two_equal_channels(run, clips, tmp_path):
    out = tmp_path / "out"
    options = {"max_steps": 1, "batch_size": 1, "num_workers": 0, "sample_fn": "ddim"}
    sizes = {**FLAGS, "timestep_respacing": "2"}
    run("multimodal_train", **sizes, **options, data_dir=clips, output_dir=out)
    state, carried = checkpoint.load_state(str(out / "model000001.pt"))
    assert state["audio_out.2.audio_conv.weight"].shape[0] == 1
    assert carried["audio_size"] == "1,1024"
    (preview,) = (out / "samples").glob("*/*.mp4")
    assert two_equal_channels(read_window(preview, 0, 4, 4, 8, 8, 1024, 1024)[1])


def test_a_mono_model_samples_two_equal_channels_and_is_evaluated(run, clips, model, tmp_path):
    out = tmp_path / "out"
    options = {"all_save_num": 2, "sample_fn": "ddim", "timestep_respacing": "3"}
    run(
        "multimodal_sample_sr",
        multimodal_model_path=model,
        output_dir=out,
        ref_path=clips,
        gallery=False,
        num_workers=0,
        **options,
    )
    wavs = sorted((out / "audios").glob("*.wav"))
    assert len(wavs) == 2
    for wav in wavs:
        audio, _ = read_wav(wav)
        assert two_equal_channels(audio)
        mp4 = out / f"original/{wav.stem}.mp4"
        assert th.equal(read_window(mp4, 0, 4, 4, 8, 8, 1024, 1024)[1], audio)
    assert json.loads((out / "original/metrics.json").read_text())["scores"]


def test_evaluation_of_a_mono_model_takes_its_size(run, clips, tmp_path):
    run("eval", samples_path=clips, output_dir=tmp_path / "report", **READING)
    assert json.loads((tmp_path / "report/metrics.json").read_text())["scores"]


@pytest.mark.parametrize(
    ("script", "kind"), [("video2audio_sample", "video"), ("audio2video_sample_sr", "audio")]
)
def test_a_mono_model_generates_across_modalities_from_the_folder_of_ref_path(
    run, clips, model, tmp_path, script, kind, capsys
):
    """--ref_path in its published meaning: the clips to condition on."""
    out = tmp_path / "out"
    options = {"model_path": model, "ref_path": clips, "timestep_respacing": "3", "num_workers": 0}
    run(script, **options, all_save_num=1, output_dir=out)
    (truth,), (generated,) = ((out / name).glob("*.mp4") for name in ("ground_truth", "original"))
    known, found = (read_window(path, 0, 4, 4, 8, 8, 1024, 1024) for path in (truth, generated))
    assert two_equal_channels(known[1])
    assert two_equal_channels(found[1])
    place = ("video", "audio").index(kind)
    assert th.equal(found[place], known[place])
    assert f"--ref_path {clips}: its clips condition" in capsys.readouterr().out


def test_three_channels_are_refused_before_anything_is_read(run):
    with pytest.raises(ValueError, match="stereo or mono"):
        run("eval", samples_path="nowhere", **READING | {"audio_size": "3,1024"})


def test_what_evaluation_or_a_second_checkpoint_cannot_do_is_refused_before_sampling(
    run, clips, model, tmp_path
):
    options = {"output_dir": tmp_path / "out", "sample_fn": "ddim", "timestep_respacing": "2"}
    with pytest.raises(ValueError, match=r"nowhere.*--ref_path"):
        run("multimodal_sample_sr", multimodal_model_path=model, ref_path="nowhere", **options)
    other = tmp_path / "model000002.pt"
    checkpoint.save_weights(str(other), tiny.build()[0], {**FLAGS, "audio_size": "3,1024"})
    with pytest.raises(ValueError, match="stereo or mono"):
        run("multimodal_sample_sr", multimodal_model_path=f"{model},{other}", **options)
    assert not (tmp_path / "out").exists()


# Audio codecs


@pytest.mark.parametrize("rate", [16000, 44100])
def test_aac_has_the_samples_in_their_places_to_its_accuracy(tmp_path, rate):
    audio = th.from_numpy(noise(rate, seed=1))
    encode.write_clip(tmp_path / "a.mp4", th.zeros(4, 3, 16, 16), 4, audio, rate, "aac")
    found = read_window(tmp_path / "a.mp4", 0, 4, 4, 16, 16, rate, rate)[1]
    inner = slice(rate // 10, -rate // 10)
    error = (found - audio)[:, inner].norm() / audio[:, inner].norm()
    assert 0 < error < 0.2  # 0.47 if it were a sample late


def test_sampling_writes_aac_where_it_is_asked_for(run, tmp_path):
    path = str(tmp_path / "model000001.pt")
    flags = {**tiny.FLAGS, "audio_size": "2,16000", "video_fps": 4, "audio_fps": 16000}
    checkpoint.save_weights(path, tiny.build(audio_size="2,16000")[0], flags)
    options = {"sample_fn": "ddim", "timestep_respacing": "2", "all_save_num": 1, "gallery": False}
    run(
        "multimodal_sample_sr",
        multimodal_model_path=path,
        output_dir=tmp_path / "out",
        audio_codec="aac",
        **options,
    )
    (mp4,) = (tmp_path / "out/original").glob("*.mp4")
    with encode.av.open(str(mp4)) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == "aac"
        assert stream.duration * stream.time_base == 1


def test_a_rate_that_aac_does_not_have_is_refused_before_sampling(run, model, tmp_path):
    with pytest.raises(ValueError, match=r"--audio_codec aac: has no sample rate of 1024 Hz"):
        run(
            "multimodal_sample_sr",
            multimodal_model_path=model,
            output_dir=tmp_path / "out",
            audio_codec="aac",
        )
    assert not (tmp_path / "out").exists()
