"""The coupled U-Net: recorded figures of the published one, and properties it must have."""

import copy
import math
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import golden_data
import pytest
import tiny
import torch as th
import torch.nn.functional as F

from mm_diffusion import nn, unet
from mm_diffusion.checkpoint import load_weights, published_names, published_state_dict
from mm_diffusion.cross_attention import CrossAttention
from mm_diffusion.modality import AUDIO, VIDEO, tokens
from mm_diffusion.nn import (
    MIN_NATIVE_NORM_POSITIONS,
    FactorizedConv,
    GroupNorm32,
    SelfAttention,
)
from mm_diffusion.sampling import prepare
from mm_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from mm_diffusion.train_util import update_ema
from mm_diffusion.tree import tree_map
from mm_diffusion.unet import BlockConfig, ResBlock, coupled_block, window_shift

INDEX = golden_data.index()
BASE = [case for case, facts in INDEX.items() if facts.get("kind") == "base_unet"]
BLOCKS = [case for case, facts in INDEX.items() if facts.get("kind") == "block"]


def recorded_inputs(case):
    return {
        key: golden_data.noise(x["noise_name"], x["shape"])
        for key, x in INDEX[case]["inputs"].items()
    }


def published_gradients(module):
    parameters = dict(module.named_parameters())
    return {name: parameters[ours].grad for name, ours in published_names(module).items()}


def run(model, *inputs, shift="max"):
    with th.no_grad(), window_shift(shift):
        return model(*inputs)


# Recorded figures


@contextmanager
def as_on_gpus():
    """The branches of the layers that a GPU takes."""
    with (
        patch.object(nn, "linear", F.linear),
        patch.object(nn, "SHORT_SEQUENCE", 0),
        patch.object(nn, "CACHED_ELEMENTS", 2**60),
    ):
        yield


def per_modality(model):
    """The model with its timesteps as one per modality."""

    def call(video, audio, timesteps):
        return model(video, audio, {"video": timesteps, "audio": timesteps})

    return call


# Every way to run the network, and where.
WAYS = {
    "as on CPUs": (lambda model: model, nullcontext),
    "as on GPUs": (lambda model: model, as_on_gpus),
    "prepared": (prepare, nullcontext),
    "a timestep per modality": (per_modality, nullcontext),
    "compiled": (partial(prepare, compile_mode="default", backend="eager"), as_on_gpus),
}
SLOW_TO_COMPILE = [(case, "compiled") for case in BASE[1:]]  # one is enough


@pytest.mark.parametrize(
    ("case", "way"),
    [(case, way) for case in BASE for way in WAYS if (case, way) not in SLOW_TO_COMPILE],
)
def test_the_network_gives_the_published_figures_in_whatever_way_it_is_run(case, way):
    facts = INDEX[case]
    model = tiny.filled(create_model_and_diffusion(**facts["config"])[0]).eval()
    prepared, place = WAYS[way]
    with place():
        out = run(
            prepared(model),
            *recorded_inputs(case).values(),
            th.tensor(facts["timesteps"]),
            shift=facts["policy"],
        )
    for name, value in zip(("video_out", "audio_out"), out, strict=True):
        wanted = th.from_numpy(golden_data.arrays(case)[name])
        if facts["config"]["learn_sigma"] and name == "audio_out":
            value = value[:, :2]  # the published audio lacks the variances
        th.testing.assert_close(value, wanted, rtol=0, atol=2e-5)
    if not facts["config"]["learn_sigma"]:
        assert sum(p.numel() for p in model.parameters()) == facts["params"]


def cross_attention(config):
    block = CrossAttention(
        config["channels"], config["num_heads"], config["local_window"], config["window_shift"]
    )

    def call(x):
        video = x["video"].transpose(1, 2)  # [B, F, C, H, W] -> [B, C, F, H, W]
        out = block({"video": video, "audio": x["audio"]}, shift=block.draw_shift(video.shape[2]))
        return out["video"].transpose(1, 2), out["audio"]

    return block, call


def residual(config):
    config = dict(config)
    directions = {"down": "downsample", "up": "upsample"}
    resample = [name for flag, name in directions.items() if config.pop(flag, False)]
    in_channels = config.pop("channels")
    shared = BlockConfig(
        in_channels,
        config.pop("out_channels", in_channels),
        config.pop("emb_channels"),
        config.pop("dropout"),
        config.pop("use_scale_shift_norm"),
        *resample,
    )
    block = coupled_block(shared, **config)

    def call(x):
        out = block({"video": x["video"].transpose(1, 2), "audio": x["audio"]}, x["emb"])
        return out["video"].transpose(1, 2), out["audio"]

    return block, call


def self_attention(config):
    block = SelfAttention(config["channels"], config["num_heads"])
    return block, lambda x: (block(x["x"]),)


MAKERS = {
    "CrossAttentionBlock": cross_attention,
    "ResBlock": residual,
    "SingleModalAtten": self_attention,
}


def assert_relative(value, wanted, tolerance, name):
    error = (value - wanted).norm() / wanted.norm()
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_gives_the_published_outputs_and_gradients(case):
    facts, arrays = INDEX[case], golden_data.arrays(case)
    block, call = MAKERS[facts["module"]](facts["config"])
    tiny.filled(block)
    x = {key: value.requires_grad_() for key, value in recorded_inputs(case).items()}
    with window_shift(facts["policy"]):
        outputs = call(x)
    loss = sum(
        (out * golden_data.noise(f"{case}.g{i}", out.shape)).sum() for i, out in enumerate(outputs)
    )
    loss.backward()
    for i, out in enumerate(outputs):
        th.testing.assert_close(out.detach(), th.from_numpy(arrays[f"out{i}"]), rtol=0, atol=2e-5)
    for key, value in x.items():
        assert_relative(value.grad, th.from_numpy(arrays[f"grad_{key}"]), 1e-4, key)
    gradients = published_gradients(block)
    assert gradients.keys() == facts["param_grad_norms"].keys()
    for name, norm in facts["param_grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name


def test_three_steps_of_training_give_the_published_losses_gradients_and_averages():
    facts = INDEX["train_base01"]
    model, diffusion = create_model_and_diffusion(**facts["config"])
    tiny.filled(model).train()
    parameters = dict(model.named_parameters())
    named = {name: parameters[ours] for name, ours in published_names(model).items()}
    initial = {name: p.detach().clone() for name, p in named.items()}
    ema = [p.detach().clone() for p in named.values()]
    optimizer = th.optim.AdamW(
        model.parameters(), lr=facts["lr"], weight_decay=facts["weight_decay"]
    )
    shapes = {"video": (2, 8, 3, 16, 16), "audio": (2, 2, 2304)}
    for number, step in enumerate(facts["steps"]):
        x_start = {
            key: (scale * golden_data.noise(f"train.{key}.{number}", shapes[key])).clamp(-1, 1)
            for key, scale in (("video", 0.5), ("audio", 0.2))
        }
        noise = {
            key: golden_data.noise(f"train.{key[0]}noise.{number}", shapes[key]) for key in shapes
        }
        with window_shift(facts["policy"]):
            terms = diffusion.training_losses(
                lambda x, t: dict(zip(x, model(**x, timesteps=t), strict=True)),
                x_start,
                th.tensor(step["t"]),
                noise,
            )
        for name, values in step["terms"].items():
            th.testing.assert_close(terms[name].detach(), th.tensor(values), rtol=1e-5, atol=1e-5)
        terms["loss"].mean().backward()
        gradients = published_gradients(model)
        total = th.stack([g.norm() for g in gradients.values()]).norm().item()
        assert total == pytest.approx(step["grad_norm"], rel=1e-4)
        for name, norm in step["param_grad_norms"].items():
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4), name
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, [p.detach() for p in named.values()], facts["ema"])
        averages = dict(zip(named, ema, strict=True))
        for name, after in step["after"].items():
            weight, average, start = named[name].detach(), averages[name], initial[name]
            assert weight.flatten()[:3].tolist() == pytest.approx(after["first3"], abs=2e-5), name
            assert weight.double().abs().sum().item() == pytest.approx(
                after["abs_sum"], rel=1e-5
            ), name
            assert average.double().abs().sum().item() == pytest.approx(
                after["ema_abs_sum"], rel=1e-6
            ), name
            assert (weight - start).norm().item() == pytest.approx(after["delta_l2"], rel=2e-3), (
                name
            )


# Names, shapes, structure


def on_meta(flags):
    with th.device("meta"):
        return create_model_and_diffusion(**flags)[0]


@pytest.mark.parametrize("name", ["manifest_base", "manifest_base_mult123"])
def test_the_published_configuration_has_the_published_tensors(name):
    manifest = golden_data.manifest(name)
    state = published_state_dict(on_meta(manifest["flags"]))
    assert {key: list(value.shape) for key, value in state.items()} == manifest["tensors"]
    assert sum(value.numel() for value in state.values()) == manifest["total_params"]


def test_the_defaults_build_the_published_model():
    tensors = golden_data.manifest("manifest_base")["tensors"]
    model = on_meta(model_and_diffusion_defaults())
    assert {key: list(value.shape) for key, value in published_state_dict(model).items()} == tensors
    assert sum(p.numel() for p in model.parameters()) == 133_676_293


def described(name, block):
    if isinstance(block, CrossAttention):
        facts = {"heads": block.num_heads, "window": block.window_frames, "shift": block.shifts}
        return {"name": name, "type": "CrossAttention", "c": len(block.video.norm.weight), **facts}
    attention = [*block.video.attention.values(), *block.audio.attention.values()]
    resample = getattr(block.video.resample, "__name__", None)
    return {
        "name": name,
        "type": "ResBlock",
        "cin": len(block.video.in_norm.weight),
        "cout": len(block.video.out_norm.weight),
        "audio_dilation": block.audio.in_conv.dilation[0],
        "up": resample == "upsample",
        "down": resample == "downsample",
        "video_attention": len(block.video.attention) == 2,
        "audio_attention": len(block.audio.attention) == 1,
        "attn_heads": attention[0].num_heads if attention else None,
    }


@pytest.mark.parametrize(
    ("name", "manifest"), [("base", "manifest_base"), ("base_mult123", "manifest_base_mult123")]
)
def test_dilations_heads_windows_and_attention_are_the_published_ones(name, manifest):
    model = on_meta(golden_data.manifest(manifest)["flags"])
    found = {
        n: described(n, m)
        for n, m in model.named_modules()
        if isinstance(m, ResBlock | CrossAttention)
    }
    assert found == {facts["name"]: facts for facts in golden_data.manifest("structure")[name]}


# Gradients and randomness


def gradients_of(model, seed):
    th.manual_seed(seed)
    video, audio = model(*tiny.inputs())
    (video.square().mean() + audio.square().mean()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def test_recomputed_activations_give_the_gradient_of_the_loss_under_random_shifts_and_dropout():
    """Fault: recomputation drew the shift and the dropout mask again (relative error 1.24)."""
    plain = tiny.build(dropout=0.5)[0].train()
    recomputing = tiny.build(dropout=0.5, use_checkpoint=True)[0].train()
    different = gradients_of(plain, 99)
    for seed in range(3):
        wanted, found = gradients_of(plain, seed), gradients_of(recomputing, seed)
        for name in wanted:
            th.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-7)
    name = "input_blocks.1.0.video.out_conv.weight"
    assert not th.allclose(different[name], wanted[name], rtol=1e-2)


@pytest.mark.parametrize("chosen", ["1", "2", "1,2"])
def test_only_the_chosen_resolutions_are_recomputed_with_the_same_gradient(monkeypatch, chosen):
    widths = set()
    recompute = unet.checkpoint

    def recording(block, h, *rest, **options):
        widths.add(h["video"].shape[-1])
        return recompute(block, h, *rest, **options)

    monkeypatch.setattr(unet, "checkpoint", recording)
    flags = {"use_checkpoint": True, "checkpoint_resolutions": chosen}
    wanted, found = (gradients_of(tiny.build(**options)[0].train(), 1) for options in ({}, flags))
    assert widths == {8 // int(rate) for rate in chosen.split(",")}
    for name in wanted:
        th.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-7)


def test_recomputing_leaves_evaluation_alone(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("recomputes without need")

    monkeypatch.setattr("mm_diffusion.unet.checkpoint", refuse)
    model = tiny.build(use_checkpoint=True)[0]
    run(model.train(), *tiny.inputs())
    model.eval()(*tiny.inputs())


def test_without_use_checkpoint_nothing_is_recomputed(monkeypatch):
    """Fault: attention was recomputed whatever use_checkpoint said."""
    calls = []
    forward = SelfAttention.forward
    monkeypatch.setattr(
        SelfAttention, "forward", lambda self, x: calls.append(1) or forward(self, x)
    )
    model = tiny.build()[0].train()
    gradients_of(model, 0)
    assert len(calls) == sum(isinstance(m, SelfAttention) for m in model.modules())


def test_window_shift_fixes_the_shift_and_puts_back_what_was():
    model, inputs = tiny.build()[0].eval(), tiny.inputs()
    zero, largest = run(model, *inputs, shift="zero"), run(model, *inputs, shift="max")
    assert not th.allclose(zero[0], largest[0], atol=1e-3)
    with window_shift("zero"):
        with pytest.raises(KeyError), window_shift("max"):
            raise KeyError
        with window_shift("max"), window_shift(None):
            outputs = {round(model(*inputs)[0].sum().item(), 2) for _ in range(8)}
        assert th.equal(model(*inputs)[0], zero[0])
    assert len(outputs) > 2
    with pytest.raises(ValueError, match="window shift"), window_shift("some"):
        pass


def test_shifts_cover_all_positions_of_the_window_alike():
    block = CrossAttention(32, 1, window_frames=2)
    counts = th.bincount(th.tensor([block.draw_shift(5) for _ in range(2000)]), minlength=4)
    assert len(counts) == 4
    assert counts.min() > 400
    assert CrossAttention(32, 1, window_frames=2, shifts=False).draw_shift(5) == 0


def test_a_window_of_the_whole_clip_is_the_same_for_every_shift():
    block = tiny.filled(CrossAttention(64, 2, window_frames=3))
    x = {
        "video": golden_data.noise("v", (1, 64, 4, 2, 2)),
        "audio": golden_data.noise("a", (1, 64, 8)),
    }
    whole = {**x, "video": x["video"][:, :, :3], "audio": x["audio"][..., :6]}
    th.testing.assert_close(block(whole, shift=0)["video"], block(whole, shift=2)["video"])
    assert not th.allclose(block(x, shift=0)["video"], block(x, shift=1)["video"], atol=1e-3)


# Shapes


@pytest.mark.parametrize("num_frames", [31, 32, 33])
def test_group_norm_does_not_mind_as_many_frames_as_channels(num_frames):
    """Fault: with 32 frames of 32 channels it normalised over the frames."""
    norm = tiny.filled(GroupNorm32(32))
    x = golden_data.noise("norm", (2, 32, num_frames, 2, 2))
    th.testing.assert_close(
        norm(x), F.group_norm(x, 32, norm.weight, norm.bias), rtol=1e-5, atol=1e-5
    )


def test_a_clip_with_as_many_frames_as_channels_is_treated_like_any_other():
    """Without attention and temporal taps frames meet only in norms: order is free."""
    model, _ = tiny.build(
        video_size="32,3,4,4",
        audio_size="2,128",
        video_attention_resolutions="-1",
        cross_attention_resolutions="-1",
        cross_attention_windows="-1",
    )
    model.middle_blocks.apply(
        lambda m: [th.nn.init.zeros_(p) for p in m.parameters()] if _attends(m) else None
    )
    for module in model.modules():
        if isinstance(module, th.nn.Conv1d) and module.weight.shape[-1] == 3:
            with th.no_grad():
                module.weight[..., [0, 2]] = 0
    with th.no_grad():
        model.out["video"].conv.weight[:, :, [0, 2]] = 0
    video, audio, t = tiny.inputs(1, {"video": (32, 3, 4, 4), "audio": (2, 128)})
    order = th.randperm(32, generator=th.Generator().manual_seed(0))
    out, mixed = run(model, video, audio, t)[0], run(model, video[:, order], audio, t)[0]
    th.testing.assert_close(mixed, out[:, order], rtol=1e-4, atol=1e-4)


def _attends(module):
    return isinstance(module, SelfAttention)


def test_clips_of_other_lengths_may_come_in_any_order():
    """Fault: cached attention indices went stale when lengths changed."""
    model = tiny.build()[0].eval()
    longer = {"video": (6, 3, 8, 8), "audio": (2, 112)}
    fresh = run(copy.deepcopy(model), *tiny.inputs(2, longer))
    first = run(model, *tiny.inputs())
    between = run(model, *tiny.inputs(2, longer))
    again = run(model, *tiny.inputs())
    for a, b in ((between, fresh), (again, first)):
        assert th.equal(a[0], b[0])
        assert th.equal(a[1], b[1])
    assert between[0].shape == (2, 6, 3, 8, 8)
    assert between[1].shape == (2, 2, 112)


def test_a_clip_does_not_depend_on_its_neighbours_in_the_batch():
    model = tiny.build()[0].eval()
    video, audio, t = tiny.inputs()
    both = run(model, video, audio, t)
    for i in range(2):
        alone = run(model, video[i : i + 1], audio[i : i + 1], t[i : i + 1])
        for whole, part in zip(both, alone, strict=True):
            th.testing.assert_close(whole[i : i + 1], part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("video_type", ["2d+1d", "3d"])
def test_learned_sigma_doubles_both_outputs(video_type):
    """Fault: the audio output was not doubled, and learn_sigma crashed the base model."""
    model = tiny.build(learn_sigma=True, video_type=video_type)[0]
    video, audio = run(model, *tiny.inputs())
    assert video.shape == (2, 4, 6, 8, 8)
    assert audio.shape == (2, 4, 64)


def test_a_new_model_predicts_zero():
    model = create_model_and_diffusion(**tiny.FLAGS)[0]
    assert all(out.eq(0).all() for out in run(model, *tiny.inputs()))


@pytest.mark.parametrize("batch", [1, 2])
def test_every_map_between_layers_stays_channels_last(batch):
    """The batch axis of a single clip has other strides; norms write canonical ones."""
    model, odd = tiny.build()[0], []

    def check(module, args, output):
        for out in output.values() if isinstance(output, dict) else [output]:
            if out.ndim > 2 and not tokens(out).is_contiguous():
                odd.append(type(module).__name__)

    layers = (
        ResBlock,
        CrossAttention,
        SelfAttention,
        GroupNorm32,
        FactorizedConv,
        th.nn.Conv2d,
        th.nn.Conv1d,
    )
    for module in model.modules():
        if isinstance(module, layers):
            module.register_forward_hook(check)
    run(model, *(x[:batch] for x in tiny.inputs()))
    assert odd == []


@pytest.mark.parametrize("modality", [VIDEO, AUDIO])
def test_entering_and_leaving_the_networks_is_the_identity(modality):
    x = tiny.clips(0, 2)[modality.name]
    inside = modality.enter(x)
    assert tokens(inside).is_contiguous()
    assert th.equal(modality.leave(inside), x)
    th.testing.assert_close(modality.downsample(modality.upsample(inside)), inside)


def test_bfloat16_is_close_to_float32():
    model = tiny.build()[0].train()
    full, half = (run(prepare(model, precision), *tiny.inputs()) for precision in ("fp32", "bf16"))
    for a, b in zip(full, half, strict=True):
        assert b.dtype == th.float32
        assert (a - b).norm() / a.norm() < 0.05
    assert model.training
    assert all(p.dtype == th.float32 and p.requires_grad for p in model.parameters())


def test_both_directions_couple():
    model = tiny.build()[0].eval()
    video, audio, t = tiny.inputs()
    out = run(model, video, audio, t)
    assert not th.allclose(run(model, video, audio + 1, t)[0], out[0], atol=1e-3)
    assert not th.allclose(run(model, video + 1, audio, t)[1], out[1], atol=1e-3)


def test_the_audio_types_name_one_model_and_weights_move_between_them():
    model = tiny.build(audio_type="linear")[0]
    load_weights(model, published_state_dict(tiny.build(audio_type="1d")[0]))
    out = tree_map(th.Tensor.isfinite, dict(zip("va", run(model, *tiny.inputs()), strict=True)))
    assert all(value.all() for value in out.values())


# What cannot be

IMPOSSIBLE = {
    "cross_attention_windows": [
        {"cross_attention_windows": "1,5"},
        {"cross_attention_windows": "1"},
        {"cross_attention_windows": "0,1"},
    ],
    "video_size": [
        {"video_size": "4,3,8,9"},
        {"video_size": "4,3,7,8"},
        {"video_size": "4,3,8"},
        {"video_size": "4,3,0,8"},
        {"video_size": "4,3,eight,8"},
    ],
    "audio_size": [
        {"audio_size": "2,66"},
        {"audio_size": "2,12"},
        {"audio_size": "64"},
        {"audio_size": "2,-64"},
    ],
    "num_channels": [{"num_channels": 40}, {"num_channels": 0}],
    "num_heads": [{"num_heads": 3}, {"num_heads": 0}],
    "num_head_channels": [
        {"num_head_channels": 48},
        {"num_head_channels": 128},
        {"num_head_channels": -2},
        {"num_head_channels": 0},
    ],
    "num_res_blocks": [{"num_res_blocks": 0}],
    "resblock_updown": [{"resblock_updown": False}],
    "class_cond": [{"class_cond": True}],
    "video_type": [{"video_type": "4d"}],
    "audio_type": [{"audio_type": "2d"}],
    "channel_mult": [
        {"channel_mult": "1,two"},
        {"channel_mult": "", "video_size": "4,3,48,48"},
        {"channel_mult": "0"},
    ],
    "cross_attention_resolutions": [{"cross_attention_resolutions": "1,x"}],
}


@pytest.mark.parametrize(
    ("culprit", "flags"),
    [(culprit, flags) for culprit, cases in IMPOSSIBLE.items() for flags in cases],
)
def test_a_model_that_cannot_be_is_refused_when_built_with_the_flag_named(culprit, flags):
    with pytest.raises(ValueError, match=culprit) as caught:
        create_model_and_diffusion(**{**tiny.FLAGS, **flags})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16])
@pytest.mark.parametrize(("batch", "per_sample"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    "way", [MIN_NATIVE_NORM_POSITIONS - 1, MIN_NATIVE_NORM_POSITIONS, "as on GPUs"]
)  # either side of where the kernel changes
def test_norms_in_half_precision_are_those_of_float32_but_for_rounding(
    dtype, batch, per_sample, way, monkeypatch
):
    th.manual_seed(0)
    length = way
    if way == "as on GPUs":
        length, usual = MIN_NATIVE_NORM_POSITIONS, nn._choose_normalize
        by_dtype = {dtype: nn._moments_normalize}
        monkeypatch.setattr(
            nn, "_choose_normalize", lambda x, dims: by_dtype.get(x.dtype, usual(x, dims))
        )
    norm = GroupNorm32(64)
    x = (3 + th.randn(batch, length, 64)).to(dtype).movedim(-1, 1)
    scale_shift = th.randn(batch, 128) if per_sample else None
    outs, grads = [], []
    for map_ in (x, x.float()):
        map_ = map_.clone().requires_grad_()
        outs.append(norm(map_, scale_shift).float())
        (outs[-1] * th.linspace(-1, 1, length)).sum().backward()
        grads.append(map_.grad.float())
    for half, full in (outs, grads):
        assert (half - full).abs().max() < 1.5 * th.finfo(dtype).eps * full.abs().max()


@pytest.mark.parametrize("dims", [[1], [2], [1, 2]])
def test_norms_in_half_precision_are_taken_over_the_axes_asked_for(dims):
    """Of tokens as long as the native kernel takes them, whichever axes they are on."""
    th.manual_seed(0)
    x = (
        th.randn(1, MIN_NATIVE_NORM_POSITIONS, MIN_NATIVE_NORM_POSITIONS // 256, 32)
        * th.arange(1, 5).view(1, 1, 4, 1)
    ).bfloat16()
    norm = GroupNorm32(32)
    apart = [axis for axis in (1, 2) if axis not in dims]
    moved = x.double().permute(0, *apart, 3, *dims)
    wanted = F.group_norm(moved.reshape(-1, 32, math.prod(x.shape[d] for d in dims)), 32).view(
        moved.shape
    )
    got = norm.over(x, dims).double().permute(0, *apart, 3, *dims)
    assert (got - wanted).abs().max() < 0.03


@pytest.mark.parametrize("keys", [20, 300])
def test_attention_in_bfloat16_is_that_of_float32_but_for_rounding(keys):
    th.manual_seed(0)
    q, k, v = (th.randn(2, 4, n, 16) for n in (50, keys, keys))
    exact = nn.attend_heads(q, k, v)
    half = nn.attend_heads(*(x.bfloat16() for x in (q, k, v)))
    with_gradient = nn.attend_heads(*(x.bfloat16().requires_grad_() for x in (q, k, v)))
    for rough in (half, with_gradient):
        assert (rough.float() - exact).abs().max() < 0.02


def test_long_attention_does_not_keep_its_scores(monkeypatch):
    """Those of audio at full length would take tens of gigabytes."""
    length, largest = 4096, []
    q, k, v = (th.zeros(1, 1, length, 8, dtype=th.bfloat16) for _ in range(3))
    monkeypatch.setattr(th.Tensor, "softmax", lambda x, dim: largest.append(x.numel()) or x)
    nn.attend_heads(q, k, v)
    assert largest == []


@pytest.mark.parametrize("offset", [0, 3, 100])
def test_float32_norms_are_exact_wherever_the_mean_lies(offset):
    th.manual_seed(0)
    x = offset + th.randn(1, 64, 20, 16, 16)
    reference = F.group_norm(x.double(), 32)
    assert (GroupNorm32(64)(x) - reference).abs().max() < 3e-5
