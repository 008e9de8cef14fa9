"""One model for joint generation and for either modality from the other."""

import csv
import itertools

import golden_data
import pytest
import tiny
import torch as th
from test_cross_modal import OTHER, RESPACED, SOLVERS
from test_train import gradient, loop, relative

from mm_diffusion import unet
from mm_diffusion.config import JointTrainConfig
from mm_diffusion.generation.run import conditioning_settings
from mm_diffusion.sampling import SAMPLERS, make_sampler, prepare, sample_joint
from mm_diffusion.script_util import merge_checkpoint_flags
from mm_diffusion.training.averages import Averages
from mm_diffusion.training.tasks import TaskMix, bind_known, without_known
from mm_diffusion.tree import tree_map

MIX = {"joint": 0.5, "video2audio": 0.25, "audio2video": 0.25}
SMALLER = {  # one level
    "channel_mult": "1",
    "cross_attention_resolutions": "1",
    "cross_attention_windows": "1",
    "video_attention_resolutions": "-1",
}
TEXT = "joint:0.5,video2audio:0.25,audio2video:0.25"

# A timestep per modality


@pytest.mark.parametrize(
    "flags",
    [{}, {"use_scale_shift_norm": False}, {"cross_attention_rope": True}, {"use_checkpoint": True}],
    ids=str,
)
def test_equal_timesteps_of_both_modalities_are_one_timestep_bit_for_bit(flags):
    model, _ = tiny.build(**flags)
    video, audio, t = tiny.inputs()
    with unet.window_shift("max"):
        for one, two in zip(
            model(video, audio, t), model(video, audio, {"audio": t, "video": t}), strict=True
        ):
            assert th.equal(one, two)


def test_the_timestep_of_a_modality_reaches_the_other_only_through_cross_attention():
    video, audio, t = tiny.inputs()
    given = {"cross_attention_resolutions": "-1", "cross_attention_windows": "-1"}
    for flags, is_coupled in (({}, True), (given, False)):
        model, _ = tiny.build(**flags)
        with unet.window_shift("zero"), th.no_grad():
            one = model(video, audio, t)
            other = model(video, audio, {"video": t, "audio": th.zeros_like(t)})
        assert not th.equal(one[1], other[1])
        assert th.equal(one[0], other[0]) != is_coupled


# Drawing tasks


def test_a_task_depends_on_seed_step_and_place_and_comes_as_often_as_its_share_says():
    mix = TaskMix(MIX)
    tasks = mix.draw(7, 3, range(2000), th.device("cpu"))
    assert th.equal(tasks[1500:1510], mix.draw(7, 3, range(1500, 1510), th.device("cpu")))
    assert not th.equal(tasks, mix.draw(7, 4, range(2000), th.device("cpu")))
    assert not th.equal(tasks, mix.draw(8, 3, range(2000), th.device("cpu")))
    shares = th.bincount(tasks, minlength=3) / 2000
    assert shares.tolist() == pytest.approx(list(MIX.values()), abs=0.04)


@pytest.mark.parametrize(
    "text",
    ["", "joint:0.5", "joint:0.5,joint:0.5", "song:1", "joint:x", "joint:1.5,video2audio:-0.5"],
)
def test_shares_that_are_none_are_refused_by_the_name_of_the_flag(text):
    with pytest.raises(ValueError, match="--task_mix"):
        JointTrainConfig(output_dir="x", task_mix=text)
    assert JointTrainConfig(output_dir="x", task_mix=TEXT).task_mix == MIX
    assert JointTrainConfig(output_dir="x").task_mix == {"joint": 1.0}


# The loss


def test_what_is_known_goes_in_clean_at_timestep_0_and_has_no_loss():
    _, diffusion = tiny.build(as_built=True)
    clips, t, seen = tiny.clips(0, 3), th.tensor([40, 60, 80]), {}
    known = TaskMix(MIX).known(th.tensor([0, 1, 2]))  # nothing, the video, the audio

    def model_fn(x, timesteps):
        seen.update(x=x, t=timesteps)
        return tree_map(th.zeros_like, x)

    noise = tree_map(lambda x: golden_data.noise(f"task {x.ndim}", x.shape), clips)
    terms = diffusion.training_losses(bind_known(model_fn, clips, known), clips, t, noise)
    terms = without_known(terms, known)
    noisy = diffusion.q_sample(clips, t, noise)
    for key, clean in (("video", 1), ("audio", 2)):
        expected = noisy[key].clone()
        expected[clean] = clips[key][clean]
        assert th.equal(seen["x"][key], expected)
        assert seen["t"][key].tolist() == [0 if k == clean else t[k] for k in range(3)]
        loss = noise[key].square().flatten(1).mean(dim=1)
        loss[clean] = 0
        th.testing.assert_close(terms[f"mse_{key}"], loss)
    th.testing.assert_close(terms["loss"], terms["mse_video"] + terms["mse_audio"])


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"prediction": "v", "noise_schedule": "linear_zero_snr"},
        {"learn_sigma": True, "use_kl": True},
    ],
    ids=str,
)
def test_mixed_tasks_have_one_gradient_for_any_microbatch(tmp_path, flags):
    options = {"batch_size": 4, "task_mix": MIX, "flags": flags | SMALLER}
    whole = gradient(tmp_path / "a", **options)
    assert relative(gradient(tmp_path / "b", microbatch=1, **options), whole) < 1e-5
    joint = gradient(tmp_path / "c", **{**options, "task_mix": None})
    assert relative(joint, whole) > 0.01


def test_every_step_of_mixed_tasks_is_logged_by_task_and_a_modality_where_it_is_learnt(tmp_path):
    trainer = loop(
        tmp_path,
        batch_size=4,
        task_mix=MIX,
        schedule_sampler="loss-second-moment",
        max_steps=6,
        flags=SMALLER,
    )
    trainer.run_loop()
    with (tmp_path / "progress.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for name in MIX:
        assert any(row[f"loss_{name}"] for row in rows)
    for row in rows:
        single = [float(row[f"loss_{name}"]) for name in list(MIX)[1:] if row[f"loss_{name}"]]
        both = [float(row[f"mse_{key}"]) for key in ("audio", "video") if row[f"mse_{key}"]]
        assert all(value > 0 for value in (*single, *both))


def test_values_that_do_not_count_change_no_average(monkeypatch):
    logged = {}
    monkeypatch.setattr("mm_diffusion.logger.logkv", logged.__setitem__)
    averages = Averages()
    counted = {"a": th.tensor([True, False, True]), "b": th.zeros(3, dtype=th.bool)}
    values = {"a": th.tensor([1.0, 0, 3]), "b": th.zeros(3), "c": th.tensor([1.0, 2, 6])}
    averages.add(th.tensor([0, 0, 3]), values, counted)
    averages.add_norm(th.tensor(1.0))
    averages.log()
    assert logged.pop("grad_norm") == 1
    assert logged == {"a": 2, "a_q0": 1, "a_q3": 3, "c": 3, "c_q0": 1.5, "c_q3": 6}


def test_one_and_one_step_of_mixed_tasks_are_two(tmp_path):
    def weights(folder, *limits):
        for limit in limits:
            trainer = loop(folder, task_mix=MIX, flags=SMALLER, max_steps=limit)
            trainer.run_loop()
        return trainer.params

    for one, two in zip(weights(tmp_path / "a", 2), weights(tmp_path / "b", 1, 2), strict=True):
        assert th.equal(one, two)


def test_mixed_tasks_teach_to_use_what_is_known(tmp_path):
    """Clips whose audio is as loud as the video is bright: known, it tells all of the video."""

    def data(start):
        for step in itertools.count(start // 4):
            level = th.rand(4, generator=th.Generator().manual_seed(step)) * 2 - 1
            yield (
                {
                    "video": level.view(-1, 1, 1, 1, 1).expand(-1, 4, 3, 8, 8),
                    "audio": level.view(-1, 1, 1).expand(-1, 2, 64),
                },
                {},
            )

    trainer = loop(
        tmp_path,
        data=data,
        batch_size=4,
        task_mix={"audio2video": 1.0},
        flags={"prediction": "x_start", "cross_attention_shift": False, **SMALLER},
        lr=3e-3,
    )
    for _ in range(20):
        trainer.run_step(*next(trainer.data))
    losses = th.stack([value.mean() for value in trainer.averages.values["mse_video"]])
    assert losses[-5:].mean() < 0.5 * losses[:5].mean()


# Sampling


def clean(name, **settings):
    respacing = {"timestep_respacing": RESPACED[name]}
    model, diffusion = tiny.build(**SMALLER, **respacing, predict_xstart=True)
    settings = SOLVERS.get(name, {}) | settings
    return model, make_sampler(name, diffusion, conditioning="clean", **settings)


@pytest.mark.parametrize("known", OTHER)
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_known_goes_in_clean_at_every_step_and_comes_back_as_it_is(name, known):
    model, sampler = clean(name)
    truth = {known: tiny.clips(0, 2)[known]}
    timesteps = []

    def spy(module, args, kwargs):
        assert th.equal(kwargs[known], truth[known])
        assert kwargs["timesteps"][known].tolist() == [0, 0]
        timesteps.append(kwargs["timesteps"][OTHER[known]].tolist())

    model.eval().register_forward_pre_hook(spy, with_kwargs=True)
    clip = sample_joint(model, sampler, [3, 4], 5, conditioning=truth)
    assert list(clip) == ["video", "audio"]
    assert th.equal(clip[known], truth[known])
    assert len(timesteps) > 3
    assert min(timesteps[0]) > 70 > 30 > max(timesteps[-1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_clean_modality_neither_is_solved_for_nor_steers_the_steps(name):
    """The other one is what its own conditional model gives, whatever the sampler."""
    _, sampler = clean(name)
    clips = tiny.clips(0, 2)
    x_T = tree_map(lambda x: golden_data.noise(f"clean {x.ndim}", x.shape), clips)
    level = clips["audio"].mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1)

    def video(x, level):
        return (0.3 * x + 4 * level).tanh()

    def both(x, t):
        mean = x["audio"].mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1)
        return {"video": video(x["video"], mean), "audio": 1e3 * x["audio"]}

    def alone(x, t, level):
        return {"video": video(x["video"], level)}

    def generators():
        return [th.Generator().manual_seed(k) for k in range(2)]

    together = sampler(both, x_T, generators(), conditioning={"audio": clips["audio"]})
    single = sampler(alone, {"video": x_T["video"]}, generators(), cond={"level": level})
    th.testing.assert_close(together["video"], single["video"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "dpm_solver++"])
def test_a_clip_for_a_clean_modality_does_not_depend_on_its_neighbours(name):
    settings = {"method": "adaptive", "atol": 0.2, "rtol": 1.0} if name[-1] == "+" else {}
    model, sampler = clean(name, **settings)
    truth, model = tiny.clips(0, 3)["video"], prepare(model)
    together = sample_joint(model, sampler, [4, 5, 6], 5, conditioning={"video": truth})
    alone = sample_joint(model, sampler, [6], 5, conditioning={"video": truth[2:]})
    th.testing.assert_close(together["audio"][2:], alone["audio"], rtol=1e-3, atol=1e-3)
    other = sample_joint(model, sampler, [6], 5, conditioning={"video": truth[:1]})
    assert (other["audio"] - alone["audio"]).abs().max() > 1e-4


FLAGS = {"classifier_scale": 0.0, "conditioning": "auto"}


@pytest.mark.parametrize(
    ("flags", "modality", "way"),
    [
        ({"task_mix": TEXT}, "video", "clean"),
        ({"task_mix": "video2audio"}, "video", "clean"),
        ({"task_mix": "video2audio"}, "audio", "replacement"),
        ({"task_mix": "joint"}, "video", "replacement"),
        ({}, "audio", "replacement"),
        ({"task_mix": TEXT, "conditioning": "replacement"}, "video", "replacement"),
        ({"task_mix": TEXT, "classifier_scale": 2.0}, "video", "replacement"),
        ({"conditioning": "clean"}, "video", "clean"),
    ],
    ids=str,
)
def test_a_known_modality_goes_in_clean_where_the_checkpoint_has_learnt_that(
    flags, modality, way, capsys
):
    found = conditioning_settings(FLAGS | flags, modality)
    assert found["conditioning"] == way
    assert found["classifier_scale"] == flags.get("classifier_scale", 0.0)
    assert ("has not learned" in capsys.readouterr().out) == (flags == {"conditioning": "clean"})


def test_checkpoints_carry_the_mix_of_tasks_and_a_later_run_may_change_it():
    values, trained = {"task_mix": "joint"}, {"task_mix": TEXT}
    assert merge_checkpoint_flags(values, set(), trained, "x")["task_mix"] == TEXT
    assert merge_checkpoint_flags(values, {"task_mix"}, trained, "x")["task_mix"] == "joint"


def test_guidance_does_not_go_with_a_clean_modality():
    with pytest.raises(ValueError, match="classifier_scale"):
        make_sampler("ddpm", tiny.build()[1], classifier_scale=1.0, conditioning="clean")
    with pytest.raises(ValueError, match="classifier_scale"):
        conditioning_settings(FLAGS | {"conditioning": "clean", "classifier_scale": 1.0}, "video")
