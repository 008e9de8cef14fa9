"""The trainer: one gradient however the batch is split; resuming changes nothing."""

import csv
import itertools
import math
import os

import numpy as np
import pytest
import tiny
import torch as th
import torch.multiprocessing as mp

from mm_diffusion import checkpoint, dist_util, logger
from mm_diffusion.checkpoint import CheckpointError
from mm_diffusion.config import TrainConfig
from mm_diffusion.dist_util import World
from mm_diffusion.train_util import TrainLoop, update_ema, warm_rate
from mm_diffusion.tree import leaves, tree_map


def batches(size, world=None, dtype=th.float32):
    """First sample -> the shares of this rank of global batches from there on."""
    world = world or World()

    def data(start_sample):
        for step in itertools.count(start_sample // (size * world.size)):
            first = (step * world.size + world.rank) * size
            yield tree_map(lambda x: x.to(dtype), tiny.clips(first, size)), {}

    return data


OWN = ("task_mix", "meter")  # options of TrainLoop itself


def loop(folder, *, flags=None, world=None, data=None, preview=None, use_fp16=False, **options):
    """A trainer of the tiny model; its log goes to `folder`."""
    own = {name: options.pop(name) for name in OWN if name in options}
    config = TrainConfig(
        **{"output_dir": str(folder), "batch_size": 2, "lr": 1e-3, "log_interval": 1, **options}
    )
    th.manual_seed(world.rank if world else 0)  # every rank starts from the weights of rank 0
    model, diffusion = tiny.build(**(flags or {}))
    logger.configure(folder, enabled=not world or world.rank == 0)
    data = data or batches(config.batch_size, world)
    return TrainLoop(
        model,
        diffusion,
        data,
        config,
        world or World(),
        use_fp16=use_fp16,
        flags=tiny.FLAGS,
        preview=preview,
        **own,
    )


def trained(folder, steps, **options):
    trainer = loop(folder, lr_anneal_steps=0, **options)
    for _ in range(steps):
        trainer.run_step(*next(trainer.data))
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def flat(tree):
    return th.cat([tree[name].flatten().double() for name in sorted(tree)])


def relative(found, wanted):
    return ((flat(found) - flat(wanted)).norm() / flat(wanted).norm()).item()


def gradient(folder, **options):
    """The gradient of the first step."""
    trainer, found = loop(folder, **options), {}

    def keep():
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        return th.zeros(())

    trainer._optimize = keep
    trainer.run_step(*next(trainer.data))
    return found


def files(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".pt"))


def rows(folder):
    with open(f"{folder}/progress.csv", newline="") as file:
        return list(csv.DictReader(file))


# One gradient, however the batch is split


@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
def test_microbatches_of_1_of_3_and_of_b_give_one_gradient(tmp_path, sampler):
    """Faults: microbatching crashed, or trained on the first microbatch only. 3 leaves a rest."""
    whole = gradient(tmp_path, batch_size=4, schedule_sampler=sampler)
    for size in (1, 3, 4, 9):
        part = gradient(tmp_path, batch_size=4, microbatch=size, schedule_sampler=sampler)
        assert relative(part, whole) < 1e-5


def test_recomputing_activations_gives_the_same_gradient(tmp_path):
    wanted = gradient(tmp_path, flags={"dropout": 0.3})
    found = gradient(tmp_path, flags={"dropout": 0.3, "use_checkpoint": True})
    assert relative(found, wanted) < 1e-6


def rank_main(rank, size, port, folder, jobs):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    th.set_num_threads(1)
    world = dist_util.setup_dist()
    for name, (steps, options) in jobs.items():
        trainer = trained(f"{folder}/{name}", steps, world=world, **options)
        trainer._log()
        averages = dict(zip(weights(trainer), trainer.emas["0.9999"], strict=True))
        result = {
            "weights": weights(trainer),
            "averages": averages,
            "sampler": trainer.sampler.state_dict(),
        }
        th.save(result, f"{folder}/{name}{rank}.pt")
    th.distributed.destroy_process_group()


WHOLE = {
    "schedule_sampler": "loss-second-moment",
    "lr": 2e-4,
    "grad_clip": 1.0,
    "flags": {"diffusion_steps": 50, "as_built": True},
}
CUT = {"lr": 2e-4, "microbatch": 1}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Name of a run -> weights and sampler states of two ranks with two clips each."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = {"whole": (3, WHOLE), "cut": (1, CUT)}
    mp.spawn(rank_main, (2, dist_util._free_port(), str(folder), jobs), nprocs=2)
    found = {
        name: [th.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]
        for name in jobs
    }
    return {**found, "folder": folder}


def test_two_ranks_train_like_one_process_with_the_same_global_batch(ranks, tmp_path):
    """Fault: ranks on the CPU were not synchronised.

    Split alike, the weights are the same to the last bit. Split otherwise, sums are rounded
    otherwise, and AdamW makes a step of up to lr out of the rounding of a gradient that should be
    zero (biases before a norm, biases of keys).
    """
    first, second = ranks["whole"]
    assert relative(first["weights"], second["weights"]) == 0
    assert relative(first["averages"], second["averages"]) == 0
    alike = trained(tmp_path, 3, **WHOLE, batch_size=4, microbatch=2)
    assert relative(first["weights"], weights(alike)) == 0
    whole = trained(tmp_path, 3, **WHOLE, batch_size=4)
    assert relative(first["weights"], weights(whole)) < 1e-6
    th.testing.assert_close(first["sampler"], whole.sampler.state_dict(), rtol=1e-5, atol=1e-6)
    assert first["sampler"]["counts"].sum() == 12
    assert rows(ranks["folder"] / "whole")[-1]["samples"] == "12"


def test_ranks_with_several_microbatches_have_one_gradient(ranks, tmp_path):
    first, second = ranks["cut"]
    assert relative(first["weights"], second["weights"]) == 0
    assert relative(first["weights"], weights(trained(tmp_path, 1, **CUT, batch_size=4))) < 1e-6


def test_randomness_is_a_function_of_seed_step_and_place_in_the_global_batch(tmp_path):
    same, other = gradient(tmp_path, seed=1), gradient(tmp_path, seed=2)
    assert relative(gradient(tmp_path, seed=1), same) == 0
    assert relative(other, same) > 0.1
    elsewhere = gradient(tmp_path, seed=1, data=batches(2, World(rank=1, size=2)))
    assert relative(elsewhere, same) > 0.1


# Averages of the weights


def test_ema_weights_are_put_back_bit_for_bit_and_dropout_is_off_inside(tmp_path):
    """Fault: in float32 the weights stayed overwritten, and previews ran with dropout."""
    trainer = trained(tmp_path, 2, ema_rate="0.9999,0.5", flags={"dropout": 0.3})
    before = weights(trainer)
    average = dict(zip(before, trainer.emas["0.5"], strict=True))
    trainer.model.train()
    with trainer.ema_weights("0.5") as model:
        assert not any(module.training for module in model.modules())
        assert relative(weights(trainer), average) == 0
        assert relative(weights(trainer), before) > 0
    assert all(module.training for module in trainer.model.modules())
    assert all(th.equal(weights(trainer)[name], value) for name, value in before.items())
    with pytest.raises(KeyError), trainer.ema_weights():
        raise KeyError
    assert all(th.equal(weights(trainer)[name], value) for name, value in before.items())


def test_an_average_warms_up_and_is_the_sum_it_stands_for(tmp_path):
    assert [warm_rate(0.9999, n) for n in (0, 8)] == [0.1, 0.5]
    assert warm_rate(0.9999, 10**6) == 0.9999
    assert warm_rate(0.05, 0) == 0.05
    trainer = loop(tmp_path, ema_rate="0.9999")
    wanted = flat(weights(trainer))
    for step in range(3):
        trainer.run_step(*next(trainer.data))
        rate = (1 + step) / (10 + step)
        wanted = rate * wanted + (1 - rate) * flat(weights(trainer))
    names = list(weights(trainer))
    found = flat(dict(zip(names, trainer.emas["0.9999"], strict=True)))
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-7


def test_an_average_of_equal_weights_stays():
    value = [th.full((3,), 0.3)]
    for _ in range(100):
        update_ema(value, [th.full((3,), 0.3)], 0.9)
    assert th.equal(value[0], th.full((3,), 0.3))


@pytest.mark.parametrize("text", ["", "1", "-0.1", "0.9,", "high", "9e-1", "nan"])
def test_impossible_ema_rates_are_named(text):
    with pytest.raises(ValueError, match="ema_rate"):
        TrainConfig(output_dir="x", ema_rate=text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": math.nan},
        {"lr": -1.0},
        {"grad_clip": math.inf},
        {"max_hours": math.nan},
        {"seed": -1},
    ],
)
def test_impossible_values_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} .*a finite number that is not negative"):
        TrainConfig(output_dir="x", **wrong)


# Steps, learning rates, files


def test_annealing_over_n_steps_makes_exactly_n_and_the_last_file_says_n(tmp_path):
    """Faults: N - 1 steps, a wrong number in the last file, save_interval 1 never saved."""
    trainer = loop(tmp_path, lr_anneal_steps=3, save_interval=1, lr=0.3e-3)
    trainer.run_loop()
    assert trainer.step == 3
    numbers = ["000001", "000002", "000003"]
    assert files(tmp_path) == sorted(
        f"{kind}{n}.pt" for kind in ("model", "ema_0.9999_", "opt") for n in numbers
    )
    np.testing.assert_allclose(
        [float(row["lr"]) for row in rows(tmp_path)], [0.3e-3, 0.2e-3, 0.1e-3]
    )
    last = checkpoint.load_state(f"{tmp_path}/model000003.pt")[0]
    now = checkpoint.published_state_dict(trainer.model)
    assert all(th.equal(last[name], now[name]) for name in now)


def test_a_last_step_between_the_saves_is_saved_too(tmp_path):
    loop(tmp_path, lr_anneal_steps=3, save_interval=2).run_loop()
    assert [name for name in files(tmp_path) if name.startswith("model")] == [
        "model000002.pt",
        "model000003.pt",
    ]


def test_warm_up_rises_linearly_to_the_rate_and_goes_with_annealing(tmp_path):
    trainer = loop(tmp_path, lr_warmup_steps=4, lr=1.0)
    rates = []
    for trainer.step in range(6):
        rates.append(trainer._anneal())
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    trainer = loop(tmp_path, lr_warmup_steps=2, lr_anneal_steps=4, lr=1.0)
    rates = []
    for trainer.step in range(4):
        rates.append(trainer._anneal())
    assert rates == [0.5, 0.75, 0.5, 0.25]
    assert trainer.optimizer.param_groups[0]["lr"] == 0.25


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    """The first moments of AdamW after a step are (1 - beta1) times the clipped gradient."""
    norms = []
    for limit in (0.0, 0.01):
        trainer = trained(tmp_path, 1, grad_clip=limit)
        moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        norms.append(10 * th.stack([m.norm() for m in moments]).norm().item())
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "case",
    [
        {"flags": {"use_kl": True}},
        {"flags": {"learn_sigma": True}},
        {"flags": {"learn_sigma": True, "use_kl": True}},
        {"flags": {"learn_sigma": True, "rescale_learned_sigmas": True}},
        {"flags": {"predict_xstart": True, "use_checkpoint": True}},
        {"schedule_sampler": "loss-second-moment"},
        {"use_fp16": True},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_every_way_to_train_moves_every_weight_and_keeps_the_loss_in_float32(tmp_path, case):
    """Faults: use_kl trained nothing, learn_sigma and loss-second-moment crashed."""
    trainer = loop(tmp_path, **case)
    before = weights(trainer)
    for _ in range(2):
        trainer.run_step(*next(trainer.data))
    for name, value in weights(trainer).items():
        assert value.isfinite().all(), name
        assert not th.equal(value, before[name]), name
    assert {value.dtype for value in trainer.averages.values["loss"]} == {th.float32}


def test_training_makes_the_loss_smaller(tmp_path):
    one = tiny.clips(0, 2)
    trainer = loop(tmp_path, data=lambda start: itertools.repeat((one, {})), lr=3e-3)
    for _ in range(24):
        trainer.run_step(*next(trainer.data))
    losses = [value.mean().item() for value in trainer.averages.values["loss"]]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])


def test_float64_clips_are_trained_on_in_float32(tmp_path):
    """Fault: float64 audio dragged the loss to float64."""
    double = gradient(tmp_path, data=batches(2, dtype=th.float64))
    assert {value.dtype for value in double.values()} == {th.float32}


def test_loss_second_moment_learns_from_the_unweighted_losses_of_every_sample(tmp_path):
    trainer = trained(
        tmp_path,
        3,
        schedule_sampler="loss-second-moment",
        batch_size=3,
        microbatch=2,
        flags={"diffusion_steps": 50},
    )
    assert trainer.sampler.counts.sum() == 9
    assert trainer.sampler.losses.max() > 0


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("lr", -1.0),
        ("batch_size", 0),
        ("save_interval", 0),
        ("log_interval", 0),
        ("output_dir", ""),
        ("grad_clip", -1.0),
    ],
)
def test_impossible_values_are_refused_with_the_flag_named(tmp_path, flag, value):
    with pytest.raises(ValueError, match=flag):
        loop(tmp_path, **{flag: value})


# Previews


def test_previews_come_from_the_average_after_every_save(tmp_path):
    seen = []

    def preview(model, step):
        th.rand(7)  # random numbers of a preview must not change the training
        seen.append(
            (step, model.training, flat({name: p.detach() for name, p in model.named_parameters()}))
        )

    trainer = loop(
        tmp_path / "a", lr_anneal_steps=4, save_interval=2, preview=preview, flags={"dropout": 0.2}
    )
    trainer.run_loop()
    assert [(step, training) for step, training, _ in seen] == [(2, False), (4, False)]
    names = list(weights(trainer))
    assert th.equal(seen[-1][2], flat(dict(zip(names, trainer.emas["0.9999"], strict=True))))
    without = loop(tmp_path / "b", lr_anneal_steps=4, save_interval=2, flags={"dropout": 0.2})
    without.run_loop()
    assert relative(weights(trainer), weights(without)) == 0


# Resuming


def everything(trainer):
    state = [*leaves(weights(trainer)), *itertools.chain(*trainer.emas.values())]
    for moments in trainer.optimizer.state.values():
        state += [moments["step"], moments["exp_avg"], moments["exp_avg_sq"]]
    return state + list(trainer.sampler.state_dict().values())


@pytest.mark.parametrize(
    "case", [{}, {"schedule_sampler": "loss-second-moment", "flags": {"dropout": 0.2}}], ids=str
)
def test_2_and_2_steps_equal_4_bit_for_bit(tmp_path, case):
    options = {"ema_rate": "0.9999,0.9", "lr_anneal_steps": 4, "save_interval": 2, **case}
    straight = loop(tmp_path / "a", **options)
    straight.run_loop()
    source = f"{tmp_path}/a/model000002.pt"
    resumed = loop(tmp_path / "b", resume_checkpoint=source, **options)
    assert resumed.step == 2
    resumed.run_loop()
    for found, wanted in zip(everything(resumed), everything(straight), strict=True):
        assert th.equal(found, wanted)


def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path):
    first = loop(tmp_path)
    for _ in range(3):
        first.run_step(*next(first.data))
        first._log()
        if first.step == 2:
            first.save()
    loop(tmp_path, lr_anneal_steps=4, save_interval=2).run_loop()
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]


def test_learning_rate_and_weight_decay_given_on_resuming_take_effect(tmp_path):
    """Fault: --lr was ignored on resume."""
    trained(tmp_path, 2).save()
    resume = f"{tmp_path}/model000002.pt"
    resumed = loop(tmp_path, resume_checkpoint=resume, lr=0.5e-3, weight_decay=0.1)
    resumed.run_step(*next(resumed.data))
    assert resumed.optimizer.param_groups[0]["lr"] == 0.5e-3
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("gone", ["ema_0.9999_000001.pt", "opt000001.pt", "model000001.pt"])
def test_a_missing_file_beside_the_checkpoint_is_an_error_that_names_it(tmp_path, gone):
    """Fault: a missing EMA or optimizer file restarted silently."""
    trained(tmp_path, 1).save()
    os.remove(tmp_path / gone)
    with pytest.raises(CheckpointError, match=gone):
        loop(tmp_path / "new", resume_checkpoint=f"{tmp_path}/model000001.pt")


def test_an_ema_rate_that_was_not_kept_is_an_error_that_names_its_file(tmp_path):
    trained(tmp_path, 1).save()
    with pytest.raises(CheckpointError, match=r"ema_0\.5_000001\.pt"):
        loop(tmp_path, resume_checkpoint=f"{tmp_path}/model000001.pt", ema_rate="0.5")


def test_another_timestep_sampler_on_resuming_is_an_error(tmp_path):
    trained(tmp_path, 1, schedule_sampler="loss-second-moment").save()
    with pytest.raises(ValueError, match="schedule_sampler"):
        loop(tmp_path, resume_checkpoint=f"{tmp_path}/model000001.pt")


def test_an_optimizer_file_of_something_else_is_an_error_that_names_it(tmp_path):
    trained(tmp_path, 1).save()
    (tmp_path / "state000001.json").unlink()  # which would call it corrupt
    checkpoint.save(f"{tmp_path}/opt000001.pt", {"lr": 1.0})
    with pytest.raises(CheckpointError, match="opt000001"):
        loop(tmp_path / "new", resume_checkpoint=f"{tmp_path}/model000001.pt")


def test_other_file_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="resume_checkpoint"):
        loop(tmp_path, resume_checkpoint=f"{tmp_path}/ema_0.9999_000001.pt")


def test_runs_of_more_than_999999_steps_resume(tmp_path):
    trainer = loop(tmp_path)
    trainer.step = 1_234_567
    trainer.save()
    assert "model1234567.pt" in files(tmp_path)
    resumed = loop(tmp_path, resume_checkpoint=f"{tmp_path}/model1234567.pt")
    assert resumed.step == 1_234_567
    assert checkpoint.find_checkpoints(str(tmp_path)) == [f"{tmp_path}/ema_0.9999_1234567.pt"]


def test_a_save_that_is_killed_leaves_no_file_under_the_final_name(tmp_path, monkeypatch):
    trainer = trained(tmp_path, 1)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert files(tmp_path) == []


# The log


def test_the_log_has_losses_quartiles_norms_and_rates(tmp_path, capsys):
    trainer = loop(tmp_path, lr_anneal_steps=4, log_interval=4, batch_size=4)
    trainer.run_loop()
    (row,) = rows(tmp_path)
    for term in ("loss", "mse_video", "mse_audio"):
        quartiles = [float(row[f"{term}_q{q}"]) for q in range(4) if row.get(f"{term}_q{q}")]
        assert quartiles
        assert min(quartiles) <= float(row[term]) <= max(quartiles)
    assert float(row["loss"]) == pytest.approx(
        float(row["mse_video"]) + float(row["mse_audio"]), rel=1e-4
    )
    assert float(row["grad_norm"]) > 0
    assert float(row["param_norm"]) == pytest.approx(flat(weights(trainer)).norm().item(), rel=1e-4)
    assert row["step"] == "4"
    assert row["samples"] == "16"
    assert float(row["samples_per_second"]) > 0
    assert "| grad_norm" in capsys.readouterr().out


def test_ranks_other_than_0_log_nothing_and_write_nothing(tmp_path, capsys):
    logger.configure(tmp_path / "log", enabled=False)
    logger.log("words")
    logger.logkv("loss", 1.0)
    logger.dumpkvs()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "log").exists()


def test_a_new_column_keeps_the_rows_that_lack_it(tmp_path):
    logger.configure(tmp_path)
    for step, extra in ((1, {}), (2, {"vb": 0.5}), (3, {})):
        for key, value in {"step": step, "loss": 1.0, **extra}.items():
            logger.logkv(key, value)
        logger.dumpkvs()
    assert [row["vb"] for row in rows(tmp_path)] == ["", "0.5", ""]
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]
