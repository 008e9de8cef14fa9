"""The networks: one U-Net for video and stereo audio together, and one for images.

The coupled U-Net (arXiv 2212.09478, section 4; stereo: arXiv 2412.13462) has a stream per modality:
residual blocks share the timestep embedding, cross-attention couples the streams. The upsampler
(arXiv 2105.05233, section 4.3 and appendix) has a stream of images only. What flows through the
blocks is a dict of feature maps [B, C, *grid] in channels-last memory, keyed by modality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checkpoint import rename_published
from .config import ModelConfig, UpsamplerConfig
from .cross_attention import CrossAttention, window_shift
from .modality import AUDIO, IMAGE, VIDEO, Modality
from .nn import (
    FactorizedConv,
    GroupNorm32,
    PointwiseConv,
    SelfAttention,
    SequenceConv,
    VolumeConv,
    concat_channels,
    timestep_embedding,
    zero_init,
)
from .tree import Tree, append_dims, tree_map

__all__ = ["ImageSuperResModel", "MultimodalUNet", "window_shift"]  # the last defined elsewhere

FeatureMaps = dict[str, Tensor]
Blocks = list[nn.Module]

MakeConv = Callable[[int, int], nn.Module]  # of input and output channels

VIDEO_CONVS: dict[str, MakeConv] = {"2d+1d": FactorizedConv, "3d": VolumeConv}


@dataclass(frozen=True)
class BlockConfig:
    """What the streams of a residual block share."""

    in_channels: int
    out_channels: int
    emb_channels: int
    dropout: float = 0.0
    use_scale_shift_norm: bool = True  # else the embedding is added before the second norm
    resample: str | None = None  # "downsample" or "upsample"


class ResStream(nn.Module):
    """The branch of one modality in a residual block: [B, I, *grid] -> [B, O, *resampled grid].

    Resamples after the first convolution, or before it with `resample_first`; ends with the blocks
    of `attention`.
    """

    def __init__(
        self,
        modality: Modality,
        config: BlockConfig,
        in_conv: nn.Module,
        out_conv: nn.Module,
        attention: dict[str, nn.Module] | None = None,
        resample_first: bool = False,
    ) -> None:
        super().__init__()
        in_channels, out_channels = config.in_channels, config.out_channels
        self.use_scale_shift_norm = config.use_scale_shift_norm
        self.resample_first = resample_first
        self.resample = getattr(modality, config.resample) if config.resample else nn.Identity()
        self.in_norm = GroupNorm32(in_channels)
        self.in_conv = in_conv
        self.out_norm = GroupNorm32(out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.out_conv = zero_init(out_conv)
        self.skip: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.skip = PointwiseConv(in_channels, out_channels, len(modality.stride))
        self.attention = nn.ModuleDict(attention)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`emb`: [B, 2 O] as scale and shift, or [B, O]."""
        h = self.in_norm(x, silu=True)
        if self.resample_first:
            h = self.in_conv(self.resample(h))
        else:
            h = self.resample(self.in_conv(h))
        if self.use_scale_shift_norm:
            h = self.out_norm(h, emb, silu=True)
        else:
            h = self.out_norm(h + append_dims(emb, h), silu=True)
        h = self.skip(self.resample(x)) + self.out_conv(self.dropout(h))
        for block in self.attention.values():
            h = block(h)
        return h


class ResBlock(nn.Module):
    """A residual block of all streams; they share one projection of the timestep embedding.

    `emb`: [B, E], or one per stream.
    """

    def __init__(self, emb: nn.Linear, **streams: ResStream) -> None:
        super().__init__()
        self.emb = emb
        for name, stream in streams.items():
            self.add_module(name, stream)

    def forward(self, x: FeatureMaps, emb: Tree, shift: int = 0) -> FeatureMaps:
        emb = tree_map(self._project, emb)
        of = emb if isinstance(emb, dict) else dict.fromkeys(x, emb)
        return {name: getattr(self, name)(h, of[name]) for name, h in x.items()}

    def _project(self, emb: Tensor) -> Tensor:
        return self.emb(F.silu(emb))


def _emb_projection(config: BlockConfig) -> nn.Linear:
    factor = 2 if config.use_scale_shift_norm else 1
    return nn.Linear(config.emb_channels, factor * config.out_channels)


def coupled_block(
    config: BlockConfig,
    *,
    video_attention: bool = False,
    audio_attention: bool = False,
    num_heads: int = 4,
    audio_dilation: int = 1,
    video_type: str = "2d+1d",
) -> ResBlock:
    """A residual block of video and audio, with self-attention at its end where asked for."""

    def stream(modality: Modality, make_conv: MakeConv, attention: dict[str, str]) -> ResStream:
        out = config.out_channels
        out_conv = PointwiseConv(out, out, len(modality.stride))
        blocks: dict[str, nn.Module] = {}
        for name, among in attention.items():
            blocks[name] = SelfAttention(out, num_heads, modality.grid, among)
        in_conv = make_conv(config.in_channels, out)
        return ResStream(modality, config, in_conv, out_conv, blocks)

    emb = _emb_projection(config)
    on_video = {"spatial": "h w", "temporal": "f"} if video_attention else {}
    on_audio = {"audio": "l"} if audio_attention else {}
    video = stream(VIDEO, VIDEO_CONVS[video_type], on_video)
    audio = stream(AUDIO, partial(SequenceConv, dilation=audio_dilation), on_audio)
    return ResBlock(emb, video=video, audio=audio)


def image_block(config: BlockConfig) -> ResBlock:
    """A residual block of images: two 3x3 convolutions, resampled before the first."""
    out = config.out_channels
    emb = _emb_projection(config)
    in_conv = nn.Conv2d(config.in_channels, out, 3, padding=1)
    out_conv = nn.Conv2d(out, out, 3, padding=1)
    return ResBlock(emb, image=ResStream(IMAGE, config, in_conv, out_conv, resample_first=True))


class ImageSelfAttention(nn.Module):
    """Self-attention among the pixels of an image, as a block of its own; qkv has heads first."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        grid = IMAGE.grid
        self.image = SelfAttention(channels, num_heads, grid, grid, layout="heads qkv dim")

    def forward(self, x: FeatureMaps, emb: Tree, shift: int = 0) -> FeatureMaps:
        return {"image": self.image(x["image"])}


class Downsample(nn.Module):
    """Images at half the size, by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: FeatureMaps, emb: Tree, shift: int = 0) -> FeatureMaps:
        return {"image": self.op(x["image"])}


class Upsample(nn.Module):
    """Images at twice the size, by nearest neighbour and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: FeatureMaps, emb: Tree, shift: int = 0) -> FeatureMaps:
        return {"image": self.conv(IMAGE.upsample(x["image"]))}


class InputConv(nn.Module):
    """The first convolution of every stream."""

    def __init__(self, convs: dict[str, nn.Module]) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(convs)

    def forward(self, x: FeatureMaps, emb: Tree, shift: int = 0) -> FeatureMaps:
        return {name: conv(x[name]) for name, conv in self.conv.items()}


class OutputConv(nn.Module):
    """Norm, SiLU and the last convolution of one stream, which starts at zero."""

    def __init__(self, channels: int, conv: nn.Module) -> None:
        super().__init__()
        self.norm = GroupNorm32(channels)
        self.conv = zero_init(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x, silu=True))


class UNet(nn.Module):
    """What all networks share: the way down, the middle, and the way up with skip connections.

    A network defines its blocks: `_stage` (a residual block and what follows it at its level),
    `_resampled` (the block that changes the resolution) and `_middle`. `depth` numbers the blocks
    on the way down and runs backwards on the way up.
    """

    middle = "middle_blocks"  # its published name

    def __init__(self, config: Any, emb_channels: int, input_conv: nn.Module) -> None:
        super().__init__()
        self.config, self.emb_channels = config, emb_channels
        self.use_checkpoint = config.use_checkpoint
        self.runners: Mapping[nn.Module, Callable] = {}
        self.widths = [int(config.num_channels * mult) for mult in config.channel_mult]
        into_emb = nn.Linear(config.num_channels, emb_channels)
        self.time_embed = nn.Sequential(into_emb, nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        self.input_blocks = nn.ModuleList([nn.ModuleList([input_conv])])
        skips = self._add_input_blocks()
        self.add_module(self.middle, nn.ModuleList(self._middle(skips[-1], len(skips))))
        self.output_blocks = nn.ModuleList()
        self._add_output_blocks(skips)
        self.register_load_state_dict_pre_hook(rename_published)

    def _stage(self, in_width: int, width: int, level: int, depth: int, way: str) -> Blocks:
        raise NotImplementedError

    def _resampled(self, width: int, depth: int, direction: str) -> nn.Module:
        raise NotImplementedError

    def _middle(self, width: int, depth: int) -> Blocks:
        raise NotImplementedError

    def _block_config(self, in_width: int, width: int, resample: str | None) -> BlockConfig:
        dropout, use_scale_shift_norm = self.config.dropout, self.config.use_scale_shift_norm
        shared = (self.emb_channels, dropout, use_scale_shift_norm)
        return BlockConfig(in_width, width, *shared, resample)

    def _add_input_blocks(self) -> list[int]:
        """The way down -> the width of every skip."""
        skips = [self.widths[0]]
        for level, width in enumerate(self.widths):
            for _ in range(self.config.num_res_blocks):
                blocks = self._stage(skips[-1], width, level, len(skips), "down")
                self.input_blocks.append(nn.ModuleList(blocks))
                skips.append(width)
            if level < len(self.widths) - 1:
                downsample = self._resampled(width, len(skips), "downsample")
                self.input_blocks.append(nn.ModuleList([downsample]))
                skips.append(width)
        return skips

    def _add_output_blocks(self, skips: list[int]) -> None:
        """The way up, which ends with the first width."""
        width = skips[-1]
        for level, out in reversed(list(enumerate(self.widths))):
            for i in range(self.config.num_res_blocks + 1):
                in_width = width + skips.pop()
                blocks = self._stage(in_width, out, level, len(skips), "up")
                width = out
                if level and i == self.config.num_res_blocks:
                    blocks.append(self._resampled(width, len(skips) - 1, "upsample"))
                self.output_blocks.append(nn.ModuleList(blocks))

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks that run in turn, all but the last convolutions."""
        for stage in (*self.input_blocks, getattr(self, self.middle), *self.output_blocks):
            yield from stage.children()

    @contextmanager
    def running(self, runners: Mapping[nn.Module, Callable]) -> Iterator[None]:
        """Within it `runners[block](h, emb, shift)` runs instead of each block of `blocks`."""
        before, self.runners = self.runners, runners
        try:
            yield
        finally:
            self.runners = before

    def draw_shifts(self, num_frames: int) -> list[int]:
        """The window shift of each cross-attention, in the order in which they run."""
        blocks = [block for block in self.modules() if isinstance(block, CrossAttention)]
        return [block.draw_shift(num_frames) for block in blocks]

    def _embed(self, timesteps: Tensor) -> Tensor:
        """[B] -> [B, E]"""
        emb = timestep_embedding(timesteps, self.config.num_channels)
        return self.time_embed(emb.to(next(self.parameters()).dtype))

    def _walk(self, h: FeatureMaps, timesteps: Tree, shifts: Iterable[Any] = ()) -> FeatureMaps:
        """Inputs of the first convolutions -> inputs of the last ones.

        The shifts are drawn outside: nothing that is recomputed for the gradient, or compiled, may
        draw them.
        """
        shifts = iter(shifts)
        emb = tree_map(self._embed, timesteps)
        # Inputs have gradients in guided sampling.
        has_gradient = self.training or any(x.requires_grad for x in h.values())
        recomputes = self.use_checkpoint and th.is_grad_enabled() and has_gradient
        full_width = _width(h) if recomputes else 0
        skips = []
        for blocks in self.input_blocks:
            h = self._run(blocks, h, emb, full_width, shifts)
            skips.append(h)
        h = self._run(getattr(self, self.middle), h, emb, full_width, shifts)
        for blocks in self.output_blocks:
            skip = skips.pop()
            h = {name: concat_channels(x, skip[name]) for name, x in h.items()}
            h = self._run(blocks, h, emb, full_width, shifts)
        return h

    def _run(
        self, blocks: nn.Module, h: FeatureMaps, emb: Tree, full_width: int, shifts: Iterator[Any]
    ) -> FeatureMaps:
        """Blocks in turn, recomputed for the gradient at the chosen resolutions (0: nowhere)."""
        for block in blocks.children():
            shift = next(shifts) if isinstance(block, CrossAttention) else 0
            run = self.runners[block] if self.runners else block
            factor = full_width // _width(h)
            if factor and factor in (self.config.checkpoint_resolutions or (factor,)):
                h = checkpoint(run, h, emb, shift, use_reentrant=False)
            else:
                h = run(h, emb, shift)
        return h


def _width(h: FeatureMaps) -> int:
    """In pixels; video or image comes first."""
    return next(iter(h.values())).shape[-1]


class MultimodalUNet(UNet):
    """`model(video [B, F, C, H, W], audio [B, C, L], timesteps [B]) -> (video, audio)`.

    `timesteps` may also be {"video": [B], "audio": [B]}: the noise level of each modality.
    `shifts`: one per cross-attention, numbers or 0-d tensors; None: drawn by `draw_shifts`.
    """

    def __init__(self, config: ModelConfig, learn_sigma: bool = False) -> None:
        video_channels, audio_channels = config.video_size[1], config.audio_size[0]
        width = int(config.num_channels * config.channel_mult[0])
        video = VIDEO_CONVS[config.video_type](video_channels, width)
        audio = SequenceConv(audio_channels, width)
        super().__init__(config, config.num_channels, InputConv({"video": video, "audio": audio}))
        self.video_size, self.audio_size = config.video_size, config.audio_size
        # With learned sigma both outputs double their channels; the published audio does not.
        scale = 2 if learn_sigma else 1
        video_out = OutputConv(width, VolumeConv(width, scale * video_channels))
        audio_out = OutputConv(width, SequenceConv(width, scale * audio_channels))
        self.out = nn.ModuleDict({"video": video_out, "audio": audio_out})

    def _middle(self, width: int, depth: int) -> Blocks:
        first = self._res(width, width, depth, attention=(True, True))
        second = self._res(width, width, depth, attention=(True, True))
        if tuple(self.config.cross_attention_windows) != (1, 4, 8):  # as published
            return [first, second]
        return [first, self._cross(width, self.config.video_size[0], shifts=False), second]

    def _stage(self, in_width: int, width: int, level: int, depth: int, way: str) -> Blocks:
        config, factor = self.config, 2**level
        on_video = factor in config.video_attention_resolutions
        on_audio = factor in config.audio_attention_resolutions
        blocks: Blocks = [self._res(in_width, width, depth, attention=(on_video, on_audio))]
        if factor in config.windows:
            window, shifts = config.windows[factor], config.cross_attention_shift
            blocks.append(self._cross(width, window, shifts))
        return blocks

    def _resampled(self, width: int, depth: int, direction: str) -> nn.Module:
        return self._res(width, width, depth, resample=direction)

    def _res(
        self,
        in_width: int,
        width: int,
        depth: int,
        attention: tuple[bool, bool] = (False, False),
        resample: str | None = None,
    ) -> ResBlock:
        return coupled_block(
            self._block_config(in_width, width, resample),
            video_attention=attention[0],
            audio_attention=attention[1],
            num_heads=self.config.num_heads,
            audio_dilation=2 ** (depth % 10),
            video_type=self.config.video_type,
        )

    def _cross(self, channels: int, window: int, shifts: bool) -> CrossAttention:
        per_head = self.config.num_head_channels
        heads = self.config.num_heads if per_head == -1 else channels // per_head
        return CrossAttention(channels, heads, window, shifts, self.config.cross_attention_rope)

    def forward(
        self, video: Tensor, audio: Tensor, timesteps: Tree, shifts: Iterable[Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = next(self.parameters()).dtype
        shifts = self.draw_shifts(video.shape[1]) if shifts is None else shifts
        h = {"video": VIDEO.enter(video.to(dtype)), "audio": AUDIO.enter(audio.to(dtype))}
        h = self._walk(h, timesteps, shifts)
        video, audio = self.out["video"](h["video"]), self.out["audio"](h["audio"])
        return VIDEO.leave(video), AUDIO.leave(audio)


class ImageSuperResModel(UNet):
    """guided-diffusion's upsampler: `model(x [B, 3, H, W], timesteps [B], low_res=[B, 3, h, w])`
    -> [B, 3, H, W], 6 channels with `learn_sigma`.

    The low-res image, enlarged bilinearly, is concatenated with x.
    """

    middle = "middle_block"

    def __init__(self, config: UpsamplerConfig, learn_sigma: bool = True) -> None:
        width = int(config.num_channels * config.channel_mult[0])
        first = nn.Conv2d(2 * 3, width, 3, padding=1)
        super().__init__(config, 4 * config.num_channels, InputConv({"image": first}))
        self.large_size, self.small_size = config.large_size, config.small_size
        last = nn.Conv2d(width, 6 if learn_sigma else 3, 3, padding=1)
        self.out = nn.ModuleDict({"image": OutputConv(width, last)})

    def activation_bytes_per_image(self) -> int:
        """About what one image takes in a forward pass without gradients.

        The skips, and the largest feature maps of a block, four of them in float32 for its norm.
        """
        skips = 0
        for level, width in enumerate(self.widths):
            pixels = (self.large_size // 2**level) ** 2
            skips += (self.config.num_res_blocks + 1) * width * pixels
        largest = 2 * self.widths[0] * self.large_size**2
        return next(self.parameters()).element_size() * (skips + 2 * largest) + 4 * 4 * largest

    def _middle(self, width: int, depth: int) -> Blocks:
        attention = ImageSelfAttention(width, self.config.heads(width, "down"))
        return [self._res(width, width), attention, self._res(width, width)]

    def _stage(self, in_width: int, width: int, level: int, depth: int, way: str) -> Blocks:
        blocks: Blocks = [self._res(in_width, width)]
        if 2**level in self.config.attention_resolutions:
            blocks.append(ImageSelfAttention(width, self.config.heads(width, way)))
        return blocks

    def _resampled(self, width: int, depth: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return self._res(width, width, direction)
        return Downsample(width) if direction == "downsample" else Upsample(width)

    def _res(self, in_width: int, width: int, resample: str | None = None) -> ResBlock:
        return image_block(self._block_config(in_width, width, resample))

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor) -> Tensor:
        size, dtype = x.shape[-2:], next(self.parameters()).dtype
        enlarged = F.interpolate(low_res.to(x.dtype), size, mode="bilinear", align_corners=False)
        h = IMAGE.enter(th.cat([x, enlarged], dim=1).to(dtype))
        return IMAGE.leave(self.out["image"](self._walk({"image": h}, timesteps)["image"]))
