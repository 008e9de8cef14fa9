"""The coupled U-Net for video and stereo audio (arXiv 2212.09478, section 4; stereo: arXiv 2412.13462).

One stream per modality runs through the same U-Net; residual blocks share the timestep embedding, cross-attention
couples the streams. A map is a dict of [B, C, *grid] tensors in channels-last memory, keyed by modality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from .modality import AUDIO, VIDEO, Modality, from_tokens, tokens
from .nn import (
    FactorizedConv,
    GroupNorm32,
    PointwiseConv,
    SelfAttention,
    SequenceConv,
    VolumeConv,
    attend,
    concat_channels,
    timestep_embedding,
    zero_init,
)

Maps = dict[str, th.Tensor]
Shift = str | th.Generator | None

_window_shift: Shift = None

VIDEO_CONVS: dict[str, Callable[[int, int], nn.Module]] = {"2d+1d": FactorizedConv, "3d": VolumeConv}
AUDIO_TYPES = ("1d", "linear")  # two published names of one convolution


@contextmanager
def window_shift(shift: Shift) -> Iterator[None]:
    """Fix the random shift of the cross-attention windows.

    "zero", "max" (clip length - window), a generator to draw from, or None: drawn from torch's global state.
    """
    global _window_shift
    if isinstance(shift, str) and shift not in ("zero", "max"):
        raise ValueError(f"window shift {shift!r}: use 'zero', 'max', a generator or None")
    before, _window_shift = _window_shift, shift
    try:
        yield
    finally:
        _window_shift = before


def _draw_shift(largest: int) -> int:
    """Uniform in {0 .. largest}, on the host, so that no device waits for it."""
    if isinstance(_window_shift, str):
        return largest if _window_shift == "max" else 0
    return int(th.randint(largest + 1, (), generator=_window_shift))


class ResStream(nn.Module):
    """The branch of one modality in a residual block: [B, I, *grid], [B, E] -> [B, O, *resampled grid]."""

    def __init__(
        self,
        modality: Modality,
        in_channels: int,
        out_channels: int,
        in_conv: nn.Module,
        dropout: float,
        scale_shift: bool,
        resample: str | None,
        attention: nn.ModuleDict,
    ) -> None:
        super().__init__()
        grid_axes = len(modality.stride)
        self.scale_shift = scale_shift
        self.resample = getattr(modality, resample) if resample else None
        self.in_norm = GroupNorm32(in_channels)
        self.in_conv = in_conv
        self.out_norm = GroupNorm32(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.out_conv = zero_init(PointwiseConv(out_channels, out_channels, grid_axes))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else PointwiseConv(in_channels, out_channels, grid_axes)
        self.attention = attention

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        h = self.in_conv(F.silu(self.in_norm(x)))
        if self.resample:
            h, x = self.resample(h), self.resample(x)
        if self.scale_shift:
            h = self.out_norm(h, emb)
        else:
            h = self.out_norm(h + emb.view(*emb.shape, *(1,) * (h.ndim - 2)))
        h = self.skip(x) + self.out_conv(self.dropout(F.silu(h)))
        for block in self.attention.values():
            h = block(h)
        return h


class ResBlock(nn.Module):
    """A residual block of all streams; they share one projection of the timestep embedding."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        *,
        use_scale_shift_norm: bool = True,
        video_attention: bool = False,
        audio_attention: bool = False,
        num_heads: int = 4,
        audio_dilation: int = 1,
        video_type: str = "2d+1d",
        resample: str | None = None,
    ) -> None:
        super().__init__()
        out = out_channels or channels
        self.emb = nn.Linear(emb_channels, 2 * out if use_scale_shift_norm else out)
        convs = {
            VIDEO: VIDEO_CONVS[video_type](channels, out),
            AUDIO: SequenceConv(channels, out, dilation=audio_dilation),
        }
        attention: dict[Modality, dict[str, str]] = {
            VIDEO: {"spatial": "h w", "temporal": "f"} if video_attention else {},
            AUDIO: {"audio": "l"} if audio_attention else {},
        }
        for modality, conv in convs.items():
            blocks = {
                k: SelfAttention(out, num_heads, modality.grid, among) for k, among in attention[modality].items()
            }
            stream = ResStream(
                modality, channels, out, conv, dropout, use_scale_shift_norm, resample, nn.ModuleDict(blocks)
            )
            self.add_module(modality.name, stream)

    def forward(self, x: Maps, emb: th.Tensor, shift: int = 0) -> Maps:
        emb = self.emb(F.silu(emb))
        return {name: getattr(self, name)(h, emb) for name, h in x.items()}


class CrossStream(nn.Module):
    """Norm, projections to query, key and value, and the way back, of one modality in a cross-attention block."""

    def __init__(self, channels: int, grid_axes: int) -> None:
        super().__init__()
        self.norm = GroupNorm32(channels)
        self.qkv = PointwiseConv(channels, 3 * channels, 1)
        self.proj = zero_init(PointwiseConv(channels, channels, grid_axes))


class CrossAttention(nn.Module):
    """Random-shift multi-modal attention, RS-MMA (arXiv 2212.09478, section 4.3), both ways at once.

    Each modality has n = tokens // frames tokens per frame. The tokens of frame i (the last frame takes what remains)
    attend to the other modality's tokens `(i + shift) n' + [0 .. window n')`, modulo all of its tokens.
    """

    def __init__(self, channels: int, num_heads: int, window_frames: int, shifts: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"{channels} channels do not split into {num_heads} heads: change num_head_channels")
        self.num_heads, self.window_frames, self.shifts = num_heads, window_frames, shifts
        self.video = CrossStream(channels, len(VIDEO.stride))
        self.audio = CrossStream(channels, len(AUDIO.stride))

    def draw_shift(self, num_frames: int) -> int:
        return _draw_shift(num_frames - self.window_frames) if self.shifts else 0

    def forward(self, x: Maps, emb: th.Tensor | None = None, shift: int = 0) -> Maps:
        num_frames = x["video"].shape[2]
        qkv = {}
        for name, h in x.items():
            stream = getattr(self, name)
            qkv[name] = stream.qkv.on_tokens(tokens(stream.norm(h)).flatten(1, -2)).chunk(3, dim=-1)
        out = {}
        for name, other in (("video", "audio"), ("audio", "video")):
            query, (_, key, value) = qkv[name][0], qkv[other]
            y = self._attend(query, key, value, num_frames, shift)
            out[name] = x[name] + getattr(self, name).proj(from_tokens(y.view_as(tokens(x[name]))))
        return out

    def _attend(self, query: th.Tensor, key: th.Tensor, value: th.Tensor, num_frames: int, shift: int) -> th.Tensor:
        """[B, T, C] on [B, T', C] -> [B, T, C]"""
        total = key.shape[1]
        per_frame, window = query.shape[1] // num_frames, self.window_frames * (total // num_frames)
        if window == total:  # every frame sees every token, in some order that does not matter
            return attend(query, key, value, self.num_heads)
        first = (th.arange(num_frames, device=query.device) + shift) * (total // num_frames)
        index = (first[:, None] + th.arange(window, device=query.device)) % total
        key, value = (x.index_select(1, index.flatten()) for x in (key, value))
        frames = query[:, : num_frames * per_frame]
        frames, key, value = (rearrange(x, "b (f t) c -> (b f) t c", f=num_frames) for x in (frames, key, value))
        out = rearrange(attend(frames, key, value, self.num_heads), "(b f) t c -> b (f t) c", f=num_frames)
        if num_frames * per_frame == query.shape[1]:
            return out
        rest = query[:, num_frames * per_frame :]
        key, value = (x[num_frames - 1 :: num_frames] for x in (key, value))
        return th.cat([out, attend(rest, key, value, self.num_heads)], dim=1)


class InputConv(nn.Module):
    """The first convolution of every stream."""

    def __init__(self, convs: dict[str, nn.Module]) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(convs)

    def forward(self, x: Maps, emb: th.Tensor, shift: int = 0) -> Maps:
        return {name: conv(x[name]) for name, conv in self.conv.items()}


class OutputConv(nn.Module):
    """Norm, SiLU and the last convolution of one stream, which starts at zero."""

    def __init__(self, channels: int, conv: nn.Module) -> None:
        super().__init__()
        self.norm = GroupNorm32(channels)
        self.conv = zero_init(conv)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.conv(F.silu(self.norm(x)))


@dataclass(frozen=True)
class UNetConfig:
    """What a coupled U-Net is like. Resolutions are downsample rates of the picture (2 is half size)."""

    video_size: tuple[int, int, int, int]  # F, C, H, W
    audio_size: tuple[int, int]  # C, L
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    num_heads: int = 4
    num_head_channels: int = 64
    cross_attention_resolutions: tuple[int, ...] = (2, 4, 8)
    cross_attention_windows: tuple[int, ...] = (1, 4, 8)
    cross_attention_shift: bool = True
    video_attention_resolutions: tuple[int, ...] = (2, 4, 8)
    audio_attention_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    use_checkpoint: bool = False
    use_scale_shift_norm: bool = True
    learn_sigma: bool = False
    video_type: str = "2d+1d"

    @property
    def widths(self) -> list[int]:
        return [int(self.num_channels * mult) for mult in self.channel_mult]

    @property
    def windows(self) -> dict[int, int]:
        """Downsample rate -> window of its cross-attention, in frames."""
        return dict(zip(self.cross_attention_resolutions, self.cross_attention_windows, strict=True))


class MultimodalUNet(nn.Module):
    """`model(video [B, F, C, H, W], audio [B, C, L], timesteps [B]) -> (video, audio)`, in the same layouts.

    Takes the fields of UNetConfig. With `learn_sigma` both outputs have twice the channels (the published model forgets
    the audio). Raises ValueError for sizes the network cannot hold.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.config = config = UNetConfig(**options)
        check_sizes(config)
        self.video_size, self.audio_size = config.video_size, config.audio_size
        self.use_checkpoint = config.use_checkpoint
        width = config.num_channels
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.input_blocks = nn.ModuleList()
        skips, depth = self._add_input_blocks()
        self.middle_blocks = nn.ModuleList(self._middle(skips[-1], depth))
        self.output_blocks = nn.ModuleList()
        width = self._add_output_blocks(skips, depth - 1)
        scale = 2 if config.learn_sigma else 1
        self.out = nn.ModuleDict(
            {
                "video": OutputConv(width, VolumeConv(width, scale * self.video_size[1])),
                "audio": OutputConv(width, SequenceConv(width, scale * self.audio_size[0])),
            }
        )

    def _add_input_blocks(self) -> tuple[list[int], int]:
        """The way down -> (width of every skip, depth reached); the depth sets the dilation of the audio."""
        config, widths = self.config, self.config.widths
        video = VIDEO_CONVS[config.video_type](self.video_size[1], widths[0])
        self.input_blocks.append(
            nn.ModuleList([InputConv({"video": video, "audio": SequenceConv(self.audio_size[0], widths[0])})])
        )
        skips, depth = [widths[0]], 1
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(nn.ModuleList(self._stage(skips[-1], width, level, depth)))
                skips, depth = [*skips, width], depth + 1
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([self._res(width, width, depth, resample="downsample")]))
                skips, depth = [*skips, width], depth + 1
        return skips, depth

    def _middle(self, width: int, depth: int) -> list[nn.Module]:
        blocks: list[nn.Module] = [self._res(width, width, depth, attention=(True, True)) for _ in range(2)]
        if tuple(self.config.cross_attention_windows) == (1, 4, 8):  # the published model couples the middle only then
            blocks.insert(1, self._cross(width, window=self.video_size[0], shifts=False))
        return blocks

    def _add_output_blocks(self, skips: list[int], depth: int) -> int:
        """The way up -> its last width."""
        config, width = self.config, skips[-1]
        for level, out in reversed(list(enumerate(config.widths))):
            for i in range(config.num_res_blocks + 1):
                blocks = self._stage(width + skips.pop(), out, level, depth)
                width, depth = out, depth - 1
                if level and i == config.num_res_blocks:
                    blocks.append(self._res(width, width, depth, resample="upsample"))
                self.output_blocks.append(nn.ModuleList(blocks))
        return width

    def _stage(self, in_channels: int, out_channels: int, level: int, depth: int) -> list[nn.Module]:
        """A residual block and, where the resolution asks for it, the cross-attention that follows it."""
        config, rate = self.config, 2**level
        attention = (rate in config.video_attention_resolutions, rate in config.audio_attention_resolutions)
        blocks: list[nn.Module] = [self._res(in_channels, out_channels, depth, attention)]
        if rate in config.windows:
            blocks.append(self._cross(out_channels, config.windows[rate], config.cross_attention_shift))
        return blocks

    def _res(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        attention: tuple[bool, bool] = (False, False),
        resample: str | None = None,
    ) -> ResBlock:
        return ResBlock(
            in_channels,
            self.config.num_channels,
            self.config.dropout,
            out_channels,
            use_scale_shift_norm=self.config.use_scale_shift_norm,
            video_attention=attention[0],
            audio_attention=attention[1],
            num_heads=self.config.num_heads,
            audio_dilation=2 ** (depth % 10),
            video_type=self.config.video_type,
            resample=resample,
        )

    def _cross(self, channels: int, window: int, shifts: bool) -> CrossAttention:
        per_head = self.config.num_head_channels
        heads = self.config.num_heads if per_head == -1 else channels // per_head
        return CrossAttention(channels, heads, window, shifts)

    def forward(self, video: th.Tensor, audio: th.Tensor, timesteps: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        dtype = next(self.parameters()).dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.config.num_channels).to(dtype))
        h = {"video": VIDEO.enter(video.to(dtype)), "audio": AUDIO.enter(audio.to(dtype))}
        skips = []
        for blocks in self.input_blocks:
            h = self._run(blocks, h, emb)
            skips.append(h)
        h = self._run(self.middle_blocks, h, emb)
        for blocks in self.output_blocks:
            skip = skips.pop()
            h = self._run(blocks, {name: concat_channels(x, skip[name]) for name, x in h.items()}, emb)
        return VIDEO.leave(self.out["video"](h["video"])), AUDIO.leave(self.out["audio"](h["audio"]))

    def _run(self, blocks: nn.Module, h: Maps, emb: th.Tensor) -> Maps:
        """Run blocks in order; shifts are drawn here, outside whatever is recomputed for the gradient."""
        for block in blocks.children():
            shift = block.draw_shift(h["video"].shape[2]) if isinstance(block, CrossAttention) else 0
            if self.use_checkpoint and self.training and th.is_grad_enabled():
                h = checkpoint(block, h, emb, shift, use_reentrant=False)
            else:
                h = block(h, emb, shift)
        return h


def check_sizes(config: UNetConfig) -> None:
    """ValueError, naming the flag, where the clip does not fit the network."""
    for name in ("num_channels", "num_res_blocks", "num_heads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)}: need at least 1")
    if config.num_head_channels < 1 and config.num_head_channels != -1:
        raise ValueError(f"num_head_channels {config.num_head_channels}: need at least 1, or -1 for num_heads heads")
    resolutions, windows = config.cross_attention_resolutions, config.cross_attention_windows
    num_levels = len(config.channel_mult)
    num_frames, _, height, width = config.video_size
    length, deepest = config.audio_size[1], num_levels - 1
    for_levels = f"which {num_levels} levels of channel_mult need"
    if len(resolutions) != len(windows):
        raise ValueError(
            f"cross_attention_windows: {len(windows)} windows for {len(resolutions)} cross_attention_resolutions; "
            "give one for each"
        )
    if any(not 1 <= window <= num_frames for window in windows):
        raise ValueError(
            f"cross_attention_windows {','.join(map(str, windows))}: the clip has {num_frames} frames (video_size), "
            f"windows must be from 1 to {num_frames}"
        )
    for axis, size in (("height", height), ("width", width)):
        if size % 2**deepest:
            raise ValueError(f"video_size: {axis} {size} is not a multiple of {2**deepest}, {for_levels}")
    if length % 4**deepest:
        raise ValueError(f"audio_size: {length} samples are not a multiple of {4**deepest}, {for_levels}")
    if length // 4**deepest < num_frames:
        raise ValueError(
            f"audio_size: {length} samples are too few for {num_frames} frames; "
            f"{num_frames * 4**deepest} is the least for {num_levels} levels of channel_mult"
        )
