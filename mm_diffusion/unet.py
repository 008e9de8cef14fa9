"""The networks: one U-Net, walked by video and stereo audio together, or by pictures.

The coupled U-Net (arXiv 2212.09478, section 4; stereo: arXiv 2412.13462) has one stream per modality; residual blocks
share the timestep embedding, cross-attention couples the streams. The upsampler (arXiv 2105.05233, section 4.3 and
appendix) has a stream of pictures only. A map is a dict of [B, C, *grid] tensors in channels-last memory, keyed by
modality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch as th
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from .modality import AUDIO, IMAGE, VIDEO, Modality, from_tokens, tokens
from .nn import (
    Dropout,
    FactorizedConv,
    GroupNorm32,
    PointwiseConv,
    SelfAttention,
    SequenceConv,
    VolumeConv,
    attend,
    concat_channels,
    require_heads,
    timestep_embedding,
    zero_init,
)

Maps = dict[str, th.Tensor]
Shift = str | th.Generator | None

_window_shift: Shift = None

VIDEO_CONVS: dict[str, Callable[[int, int], nn.Module]] = {
    "2d+1d": FactorizedConv,
    "3d": VolumeConv,
}
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
    """The branch of one modality in a residual block: [B, I, *grid], [B, E] -> [B, O, *resampled grid].

    `resample` names what happens to the grid after the first convolution, or before it with `resample_first`.
    """

    def __init__(
        self,
        modality: Modality,
        in_channels: int,
        out_channels: int,
        in_conv: nn.Module,
        out_conv: nn.Module,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
        resample_first: bool = False,
        attention: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample_first = scale_shift, resample_first
        self.resample = getattr(modality, resample) if resample else nn.Identity()
        self.in_norm = GroupNorm32(in_channels)
        self.in_conv = in_conv
        self.out_norm = GroupNorm32(out_channels)
        self.dropout = Dropout(dropout)
        self.out_conv = zero_init(out_conv)
        same = in_channels == out_channels
        self.skip = (
            nn.Identity()
            if same
            else PointwiseConv(in_channels, out_channels, len(modality.stride))
        )
        self.attention = attention or nn.ModuleDict()

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        h = F.silu(self.in_norm(x))
        h = (
            self.in_conv(self.resample(h))
            if self.resample_first
            else self.resample(self.in_conv(h))
        )
        if self.scale_shift:
            h = self.out_norm(h, emb)
        else:
            h = self.out_norm(h + emb.view(*emb.shape, *(1,) * (h.ndim - 2)))
        h = self.skip(self.resample(x)) + self.out_conv(self.dropout(F.silu(h)))
        for block in self.attention.values():
            h = block(h)
        return h


class ResBlock(nn.Module):
    """A residual block of all streams; they share one projection of the timestep embedding."""

    def __init__(
        self,
        emb_channels: int,
        out_channels: int,
        scale_shift: bool,
        streams: Mapping[str, Callable[[], ResStream]],
    ) -> None:
        super().__init__()
        self.emb = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        for name, stream in streams.items():
            self.add_module(name, stream())

    def forward(self, x: Maps, emb: th.Tensor, shift: int = 0) -> Maps:
        emb = self.emb(F.silu(emb))
        return {name: getattr(self, name)(h, emb) for name, h in x.items()}


def coupled_block(
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
) -> ResBlock:
    """A residual block of video and audio, which ends with self-attention where asked for."""
    out = out_channels or channels
    convs: dict[Modality, Callable[[], nn.Module]] = {
        VIDEO: lambda: VIDEO_CONVS[video_type](channels, out),
        AUDIO: lambda: SequenceConv(channels, out, dilation=audio_dilation),
    }
    attention: dict[Modality, dict[str, str]] = {
        VIDEO: {"spatial": "h w", "temporal": "f"} if video_attention else {},
        AUDIO: {"audio": "l"} if audio_attention else {},
    }

    def stream(modality: Modality) -> ResStream:
        last = PointwiseConv(out, out, len(modality.stride))
        blocks: dict[str, nn.Module] = {
            k: SelfAttention(out, num_heads, modality.grid, among)
            for k, among in attention[modality].items()
        }
        return ResStream(
            modality,
            channels,
            out,
            convs[modality](),
            last,
            dropout,
            use_scale_shift_norm,
            resample,
            attention=nn.ModuleDict(blocks),
        )

    streams = {modality.name: partial(stream, modality) for modality in convs}
    return ResBlock(emb_channels, out, use_scale_shift_norm, streams)


def picture_block(
    channels: int,
    out: int,
    emb_channels: int,
    dropout: float,
    scale_shift: bool,
    resample: str | None = None,
) -> ResBlock:
    """A residual block of pictures: two 3x3 convolutions, resampled before the first."""

    def stream() -> ResStream:
        convs = (nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1))
        return ResStream(
            IMAGE, channels, out, *convs, dropout, scale_shift, resample, resample_first=True
        )

    return ResBlock(emb_channels, out, scale_shift, {IMAGE.name: stream})


class PictureAttention(nn.Module):
    """Self-attention among the pixels of a picture, as a block of its own; qkv is laid out head by head."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.image = SelfAttention(
            channels, num_heads, IMAGE.grid, IMAGE.grid, layout="heads qkv dim"
        )

    def forward(self, x: Maps, emb: th.Tensor, shift: int = 0) -> Maps:
        return {"image": self.image(x["image"])}


class PictureResample(nn.Module):
    """Half the size by a strided convolution, or twice the size by repetition and a convolution."""

    def __init__(self, channels: int, direction: str) -> None:
        super().__init__()
        if direction == "downsample":
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Maps, emb: th.Tensor, shift: int = 0) -> Maps:
        h = x["image"]
        return {"image": self.op(h) if hasattr(self, "op") else self.conv(IMAGE.upsample(h))}


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

    def __init__(
        self, channels: int, num_heads: int, window_frames: int, shifts: bool = True
    ) -> None:
        super().__init__()
        require_heads(channels, num_heads)
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

    def _attend(
        self, query: th.Tensor, key: th.Tensor, value: th.Tensor, num_frames: int, shift: int
    ) -> th.Tensor:
        """[B, T, C] on [B, T', C] -> [B, T, C]"""
        total = key.shape[1]
        per_frame, window = query.shape[1] // num_frames, self.window_frames * (total // num_frames)
        if window == total:  # every frame sees every token, in some order that does not matter
            return attend(query, key, value, self.num_heads)
        first = (th.arange(num_frames, device=query.device) + shift) * (total // num_frames)
        index = (first[:, None] + th.arange(window, device=query.device)) % total
        key, value = (x.index_select(1, index.flatten()) for x in (key, value))
        frames = query[:, : num_frames * per_frame]
        frames, key, value = (
            rearrange(x, "b (f t) c -> (b f) t c", f=num_frames) for x in (frames, key, value)
        )
        out = rearrange(
            attend(frames, key, value, self.num_heads), "(b f) t c -> b (f t) c", f=num_frames
        )
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


def _width(h: Maps) -> int:
    return next(iter(h.values())).shape[-1]  # of the picture, which comes first


def _joined(h: Maps, skip: Maps) -> Maps:
    return {name: concat_channels(x, skip[name]) for name, x in h.items()}


class UNet(nn.Module):
    """The way down, through the middle and up again, which all networks share.

    A network says what its blocks are: `_stage` (a residual block and what follows it at its level), `_resampled`
    (the block that changes the resolution) and the blocks of the middle; `depth` counts them on the way.
    """

    middle = "middle_blocks"  # its published name

    def __init__(self, config: Any, emb_channels: int) -> None:
        super().__init__()
        self.config, self.emb_channels, self.use_checkpoint = (
            config,
            emb_channels,
            config.use_checkpoint,
        )
        self.widths = [int(config.num_channels * mult) for mult in config.channel_mult]

    def _build(self, input_conv: nn.Module) -> int:
        """Make all blocks but the last; returns the width at the end of the way up."""
        num_channels, emb = self.config.num_channels, self.emb_channels
        self.time_embed = nn.Sequential(
            nn.Linear(num_channels, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        self.input_blocks = nn.ModuleList([nn.ModuleList([input_conv])])
        skips, depth = self._add_input_blocks()
        self.add_module(self.middle, nn.ModuleList(self._middle(skips[-1], depth)))
        self.output_blocks = nn.ModuleList()
        return self._add_output_blocks(skips, depth - 1)

    def _stage(
        self, in_channels: int, out_channels: int, level: int, depth: int, way: str
    ) -> list[nn.Module]:
        raise NotImplementedError

    def _resampled(self, width: int, depth: int, direction: str) -> nn.Module:
        raise NotImplementedError

    def _middle(self, width: int, depth: int) -> list[nn.Module]:
        raise NotImplementedError

    def _add_input_blocks(self) -> tuple[list[int], int]:
        """The way down -> (width of every skip, depth reached)."""
        skips, depth = [self.widths[0]], 1
        for level, width in enumerate(self.widths):
            for _ in range(self.config.num_res_blocks):
                self.input_blocks.append(
                    nn.ModuleList(self._stage(skips[-1], width, level, depth, "down"))
                )
                skips, depth = [*skips, width], depth + 1
            if level < len(self.widths) - 1:
                self.input_blocks.append(
                    nn.ModuleList([self._resampled(width, depth, "downsample")])
                )
                skips, depth = [*skips, width], depth + 1
        return skips, depth

    def _add_output_blocks(self, skips: list[int], depth: int) -> int:
        """The way up -> its last width."""
        width = skips[-1]
        for level, out in reversed(list(enumerate(self.widths))):
            for i in range(self.config.num_res_blocks + 1):
                blocks = self._stage(width + skips.pop(), out, level, depth, "up")
                width, depth = out, depth - 1
                if level and i == self.config.num_res_blocks:
                    blocks.append(self._resampled(width, depth, "upsample"))
                self.output_blocks.append(nn.ModuleList(blocks))
        return width

    def draw_shifts(self, num_frames: int) -> list[int]:
        """The window shift of each cross-attention, in the order in which they are walked."""
        return [
            block.draw_shift(num_frames)
            for block in self.modules()
            if isinstance(block, CrossAttention)
        ]

    def _walk(self, h: Maps, timesteps: th.Tensor, shifts: Iterable[Any] = ()) -> Maps:
        """Maps as the input convolution takes them -> maps as the output convolutions take them.

        The shifts are drawn outside, as nothing that is recomputed for the gradient, or compiled, may draw them.
        """
        shifts = iter(shifts)
        emb = timestep_embedding(timesteps, self.config.num_channels)
        emb = self.time_embed(emb.to(next(self.parameters()).dtype))
        wanted = self.training or any(
            x.requires_grad for x in h.values()
        )  # the latter in guided sampling
        recomputes = self.use_checkpoint and th.is_grad_enabled() and wanted
        full_width = _width(h) if recomputes else 0
        skips = []
        for blocks in self.input_blocks:
            h = self._run(blocks, h, emb, full_width, shifts)
            skips.append(h)
        h = self._run(getattr(self, self.middle), h, emb, full_width, shifts)
        for blocks in self.output_blocks:
            h = _joined(h, skips.pop())
            h = self._run(blocks, h, emb, full_width, shifts)
        return h

    def _run(
        self, blocks: nn.Module, h: Maps, emb: th.Tensor, full_width: int, shifts: Iterator[Any]
    ) -> Maps:
        """Blocks one after the other, recomputed for the gradient at the chosen rates; full_width 0: nowhere."""
        for block in blocks.children():
            shift = next(shifts) if isinstance(block, CrossAttention) else 0
            rate = full_width // _width(h)
            if rate and rate in (self.config.checkpoint_resolutions or (rate,)):
                h = checkpoint(block, h, emb, shift, use_reentrant=False)
            else:
                h = block(h, emb, shift)
        return h


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
    checkpoint_resolutions: tuple[
        int, ...
    ] = ()  # where activations are recomputed; none: everywhere
    use_scale_shift_norm: bool = True
    learn_sigma: bool = False
    video_type: str = "2d+1d"

    @property
    def windows(self) -> dict[int, int]:
        """Downsample rate -> window of its cross-attention, in frames."""
        return dict(
            zip(self.cross_attention_resolutions, self.cross_attention_windows, strict=True)
        )


class MultimodalUNet(UNet):
    """`model(video [B, F, C, H, W], audio [B, C, L], timesteps [B]) -> (video, audio)`, in the same layouts.

    `shifts`: one per cross-attention, numbers or tensors without axes; drawn (`draw_shifts`) unless given.
    Takes the fields of UNetConfig. With `learn_sigma` both outputs have twice the channels (the published model forgets
    the audio). Raises ValueError for sizes the network cannot hold.
    """

    def __init__(self, **options: Any) -> None:
        config = UNetConfig(**options)
        check_sizes(config)
        super().__init__(config, emb_channels=config.num_channels)
        self.video_size, self.audio_size = config.video_size, config.audio_size
        video = VIDEO_CONVS[config.video_type](self.video_size[1], self.widths[0])
        audio = SequenceConv(self.audio_size[0], self.widths[0])
        width = self._build(InputConv({"video": video, "audio": audio}))
        scale = 2 if config.learn_sigma else 1
        self.out = nn.ModuleDict(
            {
                "video": OutputConv(width, VolumeConv(width, scale * self.video_size[1])),
                "audio": OutputConv(width, SequenceConv(width, scale * self.audio_size[0])),
            }
        )

    def _middle(self, width: int, depth: int) -> list[nn.Module]:
        blocks: list[nn.Module] = [
            self._res(width, width, depth, attention=(True, True)) for _ in range(2)
        ]
        if tuple(self.config.cross_attention_windows) == (
            1,
            4,
            8,
        ):  # the published model couples the middle only then
            blocks.insert(1, self._cross(width, window=self.video_size[0], shifts=False))
        return blocks

    def _stage(
        self, in_channels: int, out_channels: int, level: int, depth: int, way: str
    ) -> list[nn.Module]:
        config, rate = self.config, 2**level
        attention = (
            rate in config.video_attention_resolutions,
            rate in config.audio_attention_resolutions,
        )
        blocks: list[nn.Module] = [self._res(in_channels, out_channels, depth, attention)]
        if rate in config.windows:
            blocks.append(
                self._cross(out_channels, config.windows[rate], config.cross_attention_shift)
            )
        return blocks

    def _resampled(self, width: int, depth: int, direction: str) -> nn.Module:
        return self._res(width, width, depth, resample=direction)

    def _res(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        attention: tuple[bool, bool] = (False, False),
        resample: str | None = None,
    ) -> ResBlock:
        return coupled_block(
            in_channels,
            self.emb_channels,
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

    def forward(
        self,
        video: th.Tensor,
        audio: th.Tensor,
        timesteps: th.Tensor,
        shifts: Iterable[Any] | None = None,
    ) -> tuple[th.Tensor, th.Tensor]:
        dtype = next(self.parameters()).dtype
        shifts = self.draw_shifts(video.shape[1]) if shifts is None else shifts
        maps = {"video": VIDEO.enter(video.to(dtype)), "audio": AUDIO.enter(audio.to(dtype))}
        h = self._walk(maps, timesteps, shifts)
        return VIDEO.leave(self.out["video"](h["video"])), AUDIO.leave(
            self.out["audio"](h["audio"])
        )


@dataclass(frozen=True)
class UpsamplerConfig:
    """What an upsampler is like. Resolutions are downsample rates of the large picture."""

    large_size: int  # pixels
    small_size: int
    num_channels: int
    num_res_blocks: int
    channel_mult: tuple[float, ...]
    num_heads: int
    num_head_channels: int
    num_heads_upsample: int
    attention_resolutions: tuple[int, ...]
    dropout: float
    use_checkpoint: bool
    checkpoint_resolutions: tuple[int, ...]
    use_scale_shift_norm: bool
    resblock_updown: bool
    learn_sigma: bool

    def heads(self, channels: int, way: str) -> int:
        """Heads of the attention at this width, on the way "down" or "up"."""
        if self.num_head_channels != -1:
            return channels // self.num_head_channels
        return (
            self.num_heads_upsample
            if way == "up" and self.num_heads_upsample != -1
            else self.num_heads
        )


class ImageSuperResModel(UNet):
    """`model(x [B, 3, H, W], timesteps [B], low_res=[B, 3, h, w]) -> [B, 3, H, W]`: guided-diffusion's upsampler.

    The low-res picture, enlarged bilinearly, is given beside x. Takes the fields of UpsamplerConfig; with `learn_sigma`
    the output has 6 channels. Raises ValueError for sizes the network cannot hold.
    """

    middle = "middle_block"

    def __init__(self, **options: Any) -> None:
        config = UpsamplerConfig(**options)
        check_upsampler_sizes(config)
        super().__init__(config, emb_channels=4 * config.num_channels)
        self.large_size, self.small_size = config.large_size, config.small_size
        width = self._build(InputConv({"image": nn.Conv2d(2 * 3, self.widths[0], 3, padding=1)}))
        last = nn.Conv2d(width, 6 if config.learn_sigma else 3, 3, padding=1)
        self.out = nn.ModuleDict({"image": OutputConv(width, last)})

    def bytes_per_picture(self) -> int:
        """About what one picture takes on its way through without gradients.

        The skips, and the widest maps while a block works on them, four of them in float32 for its norm.
        """
        sides = [self.large_size // 2**level for level in range(len(self.widths))]
        skips = sum(
            (self.config.num_res_blocks + 1) * width * side**2
            for width, side in zip(self.widths, sides, strict=True)
        )
        widest = 2 * self.widths[0] * self.large_size**2
        return next(self.parameters()).element_size() * (skips + 2 * widest) + 4 * 4 * widest

    def _middle(self, width: int, depth: int) -> list[nn.Module]:
        attention = PictureAttention(width, self.config.heads(width, "down"))
        return [self._res(width, width), attention, self._res(width, width)]

    def _stage(
        self, in_channels: int, out_channels: int, level: int, depth: int, way: str
    ) -> list[nn.Module]:
        blocks: list[nn.Module] = [self._res(in_channels, out_channels)]
        if 2**level in self.config.attention_resolutions:
            blocks.append(PictureAttention(out_channels, self.config.heads(out_channels, way)))
        return blocks

    def _resampled(self, width: int, depth: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return self._res(width, width, direction)
        return PictureResample(width, direction)

    def _res(self, in_channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        config = self.config
        return picture_block(
            in_channels,
            out_channels,
            self.emb_channels,
            config.dropout,
            config.use_scale_shift_norm,
            resample,
        )

    def forward(self, x: th.Tensor, timesteps: th.Tensor, low_res: th.Tensor) -> th.Tensor:
        enlarged = F.interpolate(
            low_res.to(x.dtype), x.shape[-2:], mode="bilinear", align_corners=False
        )
        dtype = next(self.parameters()).dtype
        h = IMAGE.enter(th.cat([x, enlarged], dim=1).to(dtype))
        return IMAGE.leave(self.out["image"](self._walk({"image": h}, timesteps)["image"]))


def check_sizes(config: UNetConfig) -> None:
    """ValueError, naming the flag, where the clip does not fit the network."""
    for name in ("num_channels", "num_res_blocks", "num_heads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)}: need at least 1")
    if config.num_head_channels < 1 and config.num_head_channels != -1:
        raise ValueError(
            f"num_head_channels {config.num_head_channels}: need at least 1, or -1 for num_heads heads"
        )
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
            raise ValueError(
                f"video_size: {axis} {size} is not a multiple of {2**deepest}, {for_levels}"
            )
    if length % 4**deepest:
        raise ValueError(
            f"audio_size: {length} samples are not a multiple of {4**deepest}, {for_levels}"
        )
    if length // 4**deepest < num_frames:
        raise ValueError(
            f"audio_size: {length} samples are too few for {num_frames} frames; "
            f"{num_frames * 4**deepest} is the least for {num_levels} levels of channel_mult"
        )


def check_factor(large_size: int, small_size: int) -> None:
    """ValueError, naming the flag, unless the upsampler enlarges by a whole number."""
    for name, size in (("large_size", large_size), ("small_size", small_size)):
        if size < 1:
            raise ValueError(f"{name} {size}: need at least 1")
    if large_size % small_size:
        raise ValueError(f"large_size {large_size} is not a multiple of small_size {small_size}")


def check_upsampler_sizes(config: UpsamplerConfig) -> None:
    """ValueError, naming the flag, where the pictures do not fit the upsampler."""
    check_factor(config.large_size, config.small_size)
    for name in ("num_channels", "num_res_blocks", "num_heads"):
        if getattr(config, name) < 1:
            raise ValueError(f"sr_{name} {getattr(config, name)}: need at least 1")
    for name in ("num_head_channels", "num_heads_upsample"):
        if getattr(config, name) < 1 and getattr(config, name) != -1:
            raise ValueError(
                f"sr_{name} {getattr(config, name)}: need at least 1, or -1 for sr_num_heads heads"
            )
    deepest = len(config.channel_mult) - 1
    if config.large_size % 2**deepest:
        raise ValueError(
            f"large_size {config.large_size} is not a multiple of {2**deepest}, which {deepest + 1} levels of"
            " sr_channel_mult need"
        )
