"""Rotary time positions in cross-attention."""

import math

import golden_data
import pytest
import tiny
import torch as th

from mm_diffusion import cross_attention, unet
from mm_diffusion.checkpoint import load_weights, published_state_dict
from mm_diffusion.cross_attention import CrossAttention, rotate, token_times
from mm_diffusion.sampling import prepare

FRAMES, CHANNELS, HEADS = 4, 32, 2


def block(window, audio_tokens=18):
    """A block of random weights, and feature maps for it; 18 tokens are not 4 frames' worth."""
    attention = CrossAttention(CHANNELS, HEADS, window, rope=True)
    with th.no_grad():
        for name, weight in attention.named_parameters():
            weight.copy_(0.3 * golden_data.noise(f"rope {name}", weight.shape))
    x = {
        "video": golden_data.noise("rope video", (2, CHANNELS, FRAMES, 2, 3)),
        "audio": golden_data.noise("rope audio", (2, CHANNELS, audio_tokens)),
    }
    return attention, x


def turned(vectors, times):
    """[T, D] float64, the first half as complex numbers times e^(i frequency time)."""
    pairs = vectors.shape[-1] // 4
    frequencies = th.tensor([2 * 64 ** (-k / (pairs - 1)) for k in range(pairs)]).double()
    numbers = th.complex(vectors[:, :pairs], vectors[:, pairs : 2 * pairs])
    numbers = numbers * th.exp(1j * times[:, None] * frequencies)
    return th.cat([numbers.real, numbers.imag, vectors[:, 2 * pairs :]], dim=-1)


def seen(own, other, window, shift):
    """[own, other] bool: a token sees a window of frames, the last frame having what remains."""
    mask = th.zeros(own, other, dtype=th.bool)
    per_frame, other_per_frame = own // FRAMES, other // FRAMES
    for token in range(own):
        first = (min(token // per_frame, FRAMES - 1) + shift) * other_per_frame
        mask[token, [(first + k) % other for k in range(window * other_per_frame)]] = True
    return mask if window * other_per_frame < other else th.ones_like(mask)


def expected(attention, x, window, shift):
    """The block in float64, with a mask over all tokens and each token's own time."""
    times = {
        "video": (th.arange(FRAMES).double() + 0.5).repeat_interleave(6),
        "audio": (th.arange(x["audio"].shape[2]).double() + 0.5) * FRAMES / x["audio"].shape[2],
    }
    qkv = {}
    for name, h in x.items():
        stream = getattr(attention, name)
        tokens = stream.norm(h).flatten(2).transpose(1, 2)
        qkv[name] = stream.qkv.on_tokens(tokens).double().chunk(3, dim=-1)
    out = {}
    for name, other in (("video", "audio"), ("audio", "video")):
        mask = seen(len(times[name]), len(times[other]), window, shift)
        results = []
        for q, k, v in zip(qkv[name][0], *qkv[other][1:], strict=True):
            heads = []
            for head in range(HEADS):
                part = slice(head * CHANNELS // HEADS, (head + 1) * CHANNELS // HEADS)
                scores = turned(q[:, part], times[name]) @ turned(k[:, part], times[other]).T
                scores = (scores / math.sqrt(CHANNELS // HEADS)).masked_fill(~mask, -math.inf)
                heads.append(scores.softmax(dim=-1) @ v[:, part])
            results.append(th.cat(heads, dim=-1))
        y = th.stack(results).transpose(1, 2).reshape(x[name].shape).float()
        out[name] = x[name] + getattr(attention, name).proj(y)
    return out


@pytest.mark.parametrize(("window", "shift"), [(1, 0), (1, 2), (2, 1), (3, 1), (4, 0)])
def test_a_token_is_turned_by_its_own_time_whatever_the_shift_shows_it(window, shift):
    attention, x = block(window)
    with th.no_grad():
        found, wanted = attention(x, shift=shift), expected(attention, x, window, shift)
    for name in x:
        th.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)
    attention.rope = False
    with th.no_grad():
        plain = attention(x, shift=shift)
    assert all((plain[name] - found[name]).abs().max() > 0.01 for name in x)


@pytest.mark.parametrize("window", [1, 4])
def test_both_streams_later_by_whole_frames_give_the_same(window, monkeypatch):
    attention, x = block(window)
    with th.no_grad():
        now = attention(x, shift=0)
        monkeypatch.setattr(cross_attention, "token_times", lambda h, f: token_times(h, f) + 5)
        later = attention(x, shift=0)
        monkeypatch.setattr(
            cross_attention, "token_times", lambda h, f: token_times(h, f) + h.shape[2] / 10
        )
        apart = attention(x, shift=0)
    for name in x:
        th.testing.assert_close(now[name], later[name], rtol=1e-4, atol=1e-4)
        assert (now[name] - apart[name]).abs().max() > 0.01


def test_turning_keeps_lengths_and_the_second_half_of_every_head():
    x = golden_data.noise("turn", (1, 6, CHANNELS))
    y = rotate(x, th.arange(6) * 1.5, HEADS)
    per_head = CHANNELS // HEADS
    heads, turned_heads = x.view(1, 6, HEADS, per_head), y.view(1, 6, HEADS, per_head)
    assert th.equal(heads[..., per_head // 2 :], turned_heads[..., per_head // 2 :])
    th.testing.assert_close(heads.norm(dim=-1), turned_heads.norm(dim=-1))
    assert th.equal(x[:, 0], y[:, 0])


def test_frames_and_samples_have_one_clock():
    audio, video = th.zeros(1, 1, 32), th.zeros(1, 1, FRAMES, 2, 2)
    assert token_times(video, FRAMES).tolist() == [f + 0.5 for f in range(FRAMES) for _ in range(4)]
    per_frame = token_times(audio, FRAMES).view(FRAMES, 8)
    assert per_frame.mean(dim=1).tolist() == [f + 0.5 for f in range(FRAMES)]


def test_rotary_positions_have_no_parameters_and_take_published_weights():
    model, _ = tiny.build()
    video, audio, t = tiny.inputs()
    rotary, _ = tiny.build(as_built=True, cross_attention_rope=True)
    assert load_weights(rotary, published_state_dict(model)) == []
    with unet.window_shift("zero"), th.no_grad():
        assert not th.equal(model(video, audio, t)[1], rotary(video, audio, t)[1])


def test_half_precision_is_near():
    model, _ = tiny.build(cross_attention_rope=True)
    video, audio, t = tiny.inputs()
    with unet.window_shift("max"), th.no_grad():
        exact, half = model(video, audio, t), prepare(model, "bf16")(video, audio, t)
    for one, two in zip(exact, half, strict=True):
        assert (one - two).norm() < 0.05 * one.norm()


def test_heads_too_narrow_to_turn_are_refused():
    with pytest.raises(ValueError, match=r"cross_attention_rope.*num_head_channels"):
        tiny.build(as_built=True, cross_attention_rope=True, num_head_channels=2)
