"""Optimizer files: published ones give every parameter its own moments, and ours load there."""

import golden_data
import pytest
import tiny
import torch as th
from test_train import everything, loop, trained

from mm_diffusion import checkpoint
from mm_diffusion.checkpoint import CheckpointError, published_name, published_order
from mm_diffusion.script_util import create_model_and_diffusion, image_sr_create_model_and_diffusion
from mm_diffusion.training.optimizer_state import from_published, to_published

PUBLISHED = {
    "manifest_base": create_model_and_diffusion,
    "manifest_base_mult123": create_model_and_diffusion,
    "manifest_sr": image_sr_create_model_and_diffusion,
}


def parameter_shapes(model):
    return {published_name(name): p.shape for name, p in model.named_parameters()}


def published_file(shapes, step=7):
    """What the published code writes: moments that depend on the name, by number."""
    moments = {
        number: {
            "step": step,
            "exp_avg": golden_data.noise(name, shapes[name]),
            "exp_avg_sq": golden_data.noise(f"{name} squared", shapes[name]).square(),
        }
        for number, name in enumerate(published_order(shapes))
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    return {"state": moments, "param_groups": [group | {"params": list(range(len(shapes)))}]}


def moments_by_name(trainer):
    state = trainer.optimizer.state
    named = zip(trainer.names, trainer.params, strict=True)
    return {published_name(name): state[p] for name, p in named}


@pytest.mark.parametrize("manifest", PUBLISHED)
def test_the_published_order_is_that_of_the_published_parameters(manifest):
    known = golden_data.manifest(manifest)
    with th.device("meta"):
        model, _ = PUBLISHED[manifest](**known["flags"])
    assert published_order(parameter_shapes(model)) == list(known["tensors"])


def write_published_run(folder, **changes):
    """model, average and optimizer as the published code writes them after 7 steps -> the model."""
    model = tiny.build()[0]
    state = checkpoint.published_state_dict(model)
    folder.mkdir()
    th.save(state, folder / "model000007.pt")
    th.save({name: value / 2 for name, value in state.items()}, folder / "ema_0.9999_000007.pt")
    th.save(published_file(parameter_shapes(model)) | changes, folder / "opt000007.pt")
    return str(folder / "model000007.pt")


def test_a_published_run_resumes_with_the_moments_of_each_parameter(tmp_path):
    """Fault: moments were matched by number in another order, and the process crashed."""
    path = write_published_run(tmp_path / "published")
    resumed = loop(tmp_path / "new", resume_checkpoint=path)
    assert resumed.step == 7
    for name, moments in moments_by_name(resumed).items():
        assert float(moments["step"]) == 7
        assert th.equal(moments["exp_avg"], golden_data.noise(name, moments["exp_avg"].shape))
        squared = golden_data.noise(f"{name} squared", moments["exp_avg_sq"].shape).square()
        assert th.equal(moments["exp_avg_sq"], squared)
    for param, average in zip(resumed.params, resumed.emas["0.9999"], strict=True):
        assert th.equal(average, param / 2)
    resumed.run_step(*next(resumed.data))
    assert all(p.isfinite().all() for p in resumed.params)


def test_our_files_give_the_optimizer_of_a_published_model_its_moments(tmp_path):
    trainer = trained(tmp_path, 1)
    trainer.save()
    content = th.load(tmp_path / "opt000001.pt", weights_only=True)
    assert "fused" not in content["param_groups"][0]
    wanted = moments_by_name(trainer)
    names = published_order(wanted)
    params = [th.nn.Parameter(th.zeros(wanted[name]["exp_avg"].shape)) for name in names]
    optimizer = th.optim.AdamW(params, lr=1.0)
    optimizer.load_state_dict(content)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == trainer.config.lr
    for name, param in zip(names, params, strict=True):
        assert th.equal(optimizer.state[param]["exp_avg"], wanted[name]["exp_avg"])


def test_early_files_of_ours_with_moments_in_our_order_resume_as_before(tmp_path):
    trainer = trained(tmp_path, 1)
    trainer.save()
    (tmp_path / "state000001.json").unlink()  # which would call it corrupt
    path = tmp_path / "opt000001.pt"
    train = th.load(path, weights_only=True)["train"]
    th.save(trainer.optimizer.state_dict() | {"train": train}, path)
    resumed = loop(tmp_path)
    for found, wanted in zip(everything(resumed), everything(trainer), strict=True):
        assert th.equal(found, wanted)


SHAPES = {"b.in_layers.0.weight": (4,), "b.emb_layers.1.weight": (4, 2), "out.0.bias": (3,)}


def read(content, shapes=SHAPES):
    shapes = {name: th.Size(shape) for name, shape in shapes.items()}
    return from_published(content, shapes, "opt000007.pt")


def test_moments_survive_being_written_and_read():
    emb = "b.emb_layers.1.weight"
    ours = {emb: SHAPES[emb], **SHAPES}  # first, as in our blocks
    state = read(published_file(SHAPES), ours)
    again = read(to_published(state, list(ours)), ours)
    for number, moments in state["state"].items():
        for key, value in moments.items():
            assert th.equal(value, again["state"][number][key])


def test_moments_of_another_shape_are_refused_with_the_parameters_name():
    wrong = published_file(SHAPES | {"out.0.bias": (5,)})
    with pytest.raises(CheckpointError, match=r"opt000007.pt: out.0.bias: exp_avg .*\[5\].* \[3\]"):
        read(wrong)


def test_moments_without_a_step_count_are_refused_with_the_parameters_name():
    content = published_file(SHAPES)
    del content["state"][0]["step"]
    with pytest.raises(CheckpointError, match=r"opt000007.pt: \S+: no step count"):
        read(content)


def test_moments_of_another_number_of_parameters_are_refused():
    with pytest.raises(CheckpointError, match="moments of 4 parameters, the model has 3"):
        read(published_file(SHAPES | {"more": (1,)}))


def test_flat_moments_of_a_published_float16_run_are_refused_for_what_they_are():
    with pytest.raises(CheckpointError, match="2 flat tensors, as published float16 runs"):
        read(published_file({"vectors": (7,), "matrices": (1, 8)}))


@pytest.mark.parametrize("content", [{"lr": 1.0}, [1], {"state": {}}])
def test_anything_else_is_no_optimizer_state(content):
    with pytest.raises(CheckpointError, match=r"opt000007.pt: holds no optimizer state"):
        read(content)
