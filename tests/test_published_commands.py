"""Command lines of the published launchers through our parsers; names of flags that changed."""

import runpy
import sys
from pathlib import Path

import pytest
from media_files import small_clip

from mm_diffusion.config import (
    EvalConfig,
    SRDiffusionConfig,
    UpsamplerConfig,
    parse,
    pick,
)

FOLDER = Path(__file__).resolve().parents[1] / "py_scripts"
MODEL = """
    --cross_attention_resolutions 2,4,8 --cross_attention_windows 1,4,8
    --cross_attention_shift True --dropout 0.1 --video_attention_resolutions 2,4,8
    --audio_attention_resolutions -1 --video_size 20,3,64,64 --audio_size 2,80000
    --learn_sigma False --num_channels 128 --num_head_channels 64 --num_res_blocks 2
    --resblock_updown True --use_fp16 True --use_scale_shift_norm True --num_workers 4
"""
UPSAMPLER = """
    --sr_attention_resolutions 8,16,32 --large_size 256 --small_size 64 --sr_learn_sigma True
    --sr_num_channels 192 --sr_num_heads 4 --sr_num_res_blocks 2 --sr_resblock_updown True
    --use_fp16 False --sr_use_scale_shift_norm True --sr_class_cond False --sr_dropout 0.0
"""
DIFFUSION = "--noise_schedule linear --diffusion_steps 1000"
SR_DIFFUSION = "--sr_diffusion_steps 1100 --sr_timestep_respacing ddim25"
SAMPLING = """
    --all_save_num 96 --save_type mp4 --devices G8 --batch_size 4 --is_strict True
    --sample_fn dpm_solver++ --output_dir out
"""
RUN = "--save_interval 10000 --log_interval 100 --use_db False --devices G8 --frame_gap 1"

# Script -> published command line
COMMANDS = {
    "multimodal_train": f"""
        {MODEL} {DIFFUSION} {RUN} --data_dir clips --lr 2e-4 --t_lr 1e-4 --batch_size 4
        --sample_fn dpm_solver --video_fps 4 --audio_fps 16000 --output_dir out
        --schedule_sampler uniform --ema_rate 0.9999 --lr_anneal_steps 0
        --resume_checkpoint model330011.pt
    """,
    "image_sr_train": f"""
        {UPSAMPLER} {RUN} --sr_diffusion_steps 1000 --noise_schedule linear --use_kl False
        --predict_xstart False --rescale_timesteps False --rescale_learned_sigmas False
        --data_dir frames --lr 1e-4 --batch_size 6 --num_workers 4 --output_dir out
        --resume_checkpoint guided-diffusion_64_256_upsampler.pt
    """,
    "multimodal_sample_sr": f"""
        {MODEL} {UPSAMPLER} {DIFFUSION} {SR_DIFFUSION} {SAMPLING} --sr_sample_fn ddim
        --multimodal_model_path model.pt --sr_model_path sr.pt --ref_path ref --load_noise noise.npy
    """,
    "audio2video_sample_sr": f"""
        {MODEL} {UPSAMPLER} {DIFFUSION} {SR_DIFFUSION} {SAMPLING} --sr_sample_fn ddim
        --model_path model.pt --sr_model_path sr.pt --ref_path clips --classifier_scale 3.0
    """,
    "video2audio_sample": f"""
        {MODEL} {DIFFUSION} {SAMPLING} --model_path model.pt --ref_path clips --classifier_scale 3.0
    """,
    "eval": "--ref_dir reference --fake_dir samples --sample_num 2048 --devices G8",
}
CONFIGS = {"eval": (EvalConfig,)}


@pytest.fixture
def command(monkeypatch):
    """Parses a command line with the flags of a script."""

    def run(script, line):
        names = runpy.run_path(str(FOLDER / f"{script}.py"))
        monkeypatch.setattr(sys, "argv", [script, *line.split()])
        configs = CONFIGS.get(script) or names["CONFIGS"]
        values, explicit = parse("A script.", *configs, defaults=names.get("DEFAULTS"))
        for config in configs:
            pick(config, values)
        return values, explicit

    return run


@pytest.mark.parametrize("script", COMMANDS)
def test_every_published_command_line_is_understood(command, script):
    values, explicit = command(script, COMMANDS[script])
    assert explicit <= {*values, "t_lr", "frame_gap", "save_type"}


def test_the_upsamplers_training_takes_the_names_without_prefix(command):
    line = "--output_dir x --noise_schedule cosine --use_kl yes --predict_xstart True --dropout 0.3"
    values, explicit = command("image_sr_train", f"{line} --rescale_learned_sigmas True")
    process, network = pick(SRDiffusionConfig, values), pick(UpsamplerConfig, values)
    assert (process.noise_schedule, process.use_kl, process.predict_xstart) == (
        "cosine",
        True,
        True,
    )
    assert process.rescale_learned_sigmas
    assert network.dropout == 0.3
    assert {"sr_noise_schedule", "sr_use_kl", "sr_dropout"} < explicit
    assert explicit.isdisjoint({"noise_schedule", "use_kl", "dropout"})


def test_a_published_name_never_hides_a_flag_of_the_script(command):
    """Where both networks are, a name without prefix is the joint model's."""
    line = "--output_dir x --multimodal_model_path m.pt --num_channels 64"
    values, _ = command("multimodal_sample_sr", line)
    assert (values["num_channels"], values["sr_num_channels"]) == (64, 192)


def test_evaluation_takes_the_published_names(command):
    values, _ = command("eval", COMMANDS["eval"])
    config = pick(EvalConfig, values)
    assert (config.ref_path, config.samples_path) == ("reference", "samples")
    assert config.sample_num == 2048


@pytest.mark.parametrize(
    ("script", "line", "words"),
    [
        (
            "image_sr_train",
            "--noise_schedule linear --sr_noise_schedule cosine",
            "--noise_schedule linear means --sr_noise_schedule, which is cosine",
        ),
        (
            "video2audio_sample",
            "--model_path a.pt --multimodal_model_path b.pt",
            "--model_path a.pt means --multimodal_model_path, which is b.pt",
        ),
    ],
)
def test_two_names_of_a_flag_with_two_values_are_an_error_that_names_both(
    command, capsys, script, line, words
):
    with pytest.raises(SystemExit):
        command(script, f"--output_dir x {line}")
    assert words in capsys.readouterr().err


def test_extraction_takes_the_published_names(tmp_path, monkeypatch):
    small_clip(tmp_path / "a.mp4", frames=10)
    line = ["--source_path", str(tmp_path / "a.mp4"), "--target_path", str(tmp_path / "frames")]
    monkeypatch.setattr(sys, "argv", ["extract_video", *line, "--num_workers", "1"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(FOLDER / "extract_video.py"))["main"]()
    assert len(list((tmp_path / "frames").glob("image_a_*.png"))) == 4


def test_a_published_name_is_read_like_its_flag(command, capsys):
    with pytest.raises(SystemExit):
        command("image_sr_train", "--use_kl perhaps")
    assert "use_kl" in capsys.readouterr().err
