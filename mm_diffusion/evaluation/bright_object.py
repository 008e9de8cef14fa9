"""Alignment of video and audio in clips that show one bright object on a darker ground (toy data).

No weights are needed: the object's position is the centre of its brightness.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch as th
import torch.nn.functional as F
from einops import repeat

from .stereo import TINY, is_audible

MAX_SHIFTS = 64  # pairings tried by `mismatched_alignment`
# Spread of a position (0..1) or a level difference (-1..1) below which it counts as constant.
STILL = 1e-3
TOY_FRAMES = 8  # of a clip, evenly chosen
TOY_GRID = (2, 2, 2)  # cells in time, height, width


def horizontal_position(videos: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """[N, F, C, H, W] in [-1, 1] -> (position [N, F] in 0..1, object energy [N, F]).

    With e the brightness (mean over C) above the frame's median, and x in 0..1 the pixel centre:
    energy = sum e^2, position = sum(x e^2) / sum e^2.
    """
    brightness = videos.double().mean(dim=2)
    ground = brightness.flatten(2).median(dim=2).values[..., None, None]
    energy = (brightness - ground).clamp(min=0).square().sum(dim=2)  # over H: [N, F, W]
    x = (th.arange(energy.shape[-1], device=energy.device) + 0.5) / energy.shape[-1]
    total = energy.sum(dim=-1)
    return (energy * x).sum(dim=-1) / total.clamp(min=TINY), total


def level_difference(audios: th.Tensor, num_frames: int) -> tuple[th.Tensor, th.Tensor]:
    """[N, 2, L] -> (relative level difference [N, F] in -1..1, energy [N, F]) of each video frame.

    (E_R - E_L) / (E_R + E_L), E the sum of squares of a channel over the frame's samples.
    """
    running = F.pad(audios.double().square().cumsum(dim=-1), (1, 0))
    edges = th.linspace(0, audios.shape[-1], num_frames + 1, device=audios.device).round().long()
    left, right = running[..., edges].diff(dim=-1).unbind(dim=1)
    total = left + right
    return (right - left) / total.clamp(min=TINY), total


def weighted_correlation(x: th.Tensor, y: th.Tensor, weight: th.Tensor) -> float:
    """Pearson correlation of x and y (same shape) under weights; NaN where either is constant."""
    weight = weight / weight.sum()
    dx = x - (weight * x).sum()
    dy = y - (weight * y).sum()
    covariance = (weight * (dx * dy)).sum()
    variances = (weight * dx.square()).sum() * (weight * dy.square()).sum()
    return (covariance / variances.sqrt()).item()


def spatial_alignment(videos: th.Tensor, audios: th.Tensor) -> float:
    """[N, F, C, H, W], [N, 2, L] -> correlation of object position and level difference, -1..1.

    It is taken over frames and clips. A frame's weight is min(v / mean v, 1) * min(a / mean a, 1)
    with v its object energy and a its audio energy: frames that are nearly dark or silent count
    little. NaN where there is no object or audio, or nothing moves.
    """
    return _alignment(videos, audios, shifts=[0])


def mismatched_alignment(videos: th.Tensor, audios: th.Tensor) -> float:
    """`spatial_alignment` of videos with other clips' audio, as a baseline.

    Pairs are cyclic shifts of the batch, at most 64. ValueError for fewer than two clips.
    """
    if len(videos) < 2:
        raise ValueError(f"mismatched pairs need at least 2 clips, got {len(videos)}")
    return _alignment(videos, audios, shifts=range(1, min(len(videos), MAX_SHIFTS + 1)))


def _alignment(videos: th.Tensor, audios: th.Tensor, shifts: Sequence[int]) -> float:
    position, object_energy = horizontal_position(videos)
    level, audio_energy = level_difference(audios, videos.shape[1])
    object_weight, audio_weight = _relative(object_energy), _relative(audio_energy)
    weight = th.cat([object_weight * audio_weight.roll(shift, 0) for shift in shifts])
    level = th.cat([level.roll(shift, 0) for shift in shifts])
    return weighted_correlation(position.repeat(len(shifts), 1), level, weight)


def _relative(energy: th.Tensor) -> th.Tensor:
    """Energy relative to its mean, at most 1."""
    return (energy / energy.mean().clamp(min=TINY)).clamp(max=1)


def why_unaligned(videos: th.Tensor, audios: th.Tensor) -> str:
    """Why `spatial_alignment` and its mismatched pairs are undefined; empty if they are defined."""
    position, object_energy = horizontal_position(videos)
    level, audio_energy = level_difference(audios, videos.shape[1])
    if not is_audible(audios.double()).any():
        return "the audio is silent"
    if not object_energy.any():
        return "no object stands out in the frames"
    both = (object_energy > 0) & (audio_energy > 0)
    return why_uncorrelated(position[both], level[both])


def why_uncorrelated(position: th.Tensor, level: th.Tensor) -> str:
    """Why these values [K] of all frames with object and audio have no correlation, or ""."""
    if not len(position):
        return "no frame has both object and audio"
    for name, x in {"object": position, "audio": level}.items():
        if x.max() - x.min() < STILL:
            return f"the {name} does not move"
    return ""


def temporal_alignment(videos: th.Tensor, audios: th.Tensor) -> float:
    """[N, F, C, H, W], [N, 2, L] -> correlation over frames of object and audio energy, -1..1.

    Both are relative to their mean over the clip, so that loud clips of bright objects count for
    nothing. Frames must be dense enough to follow the audio: several for each burst. NaN where
    either is constant.
    """
    _, object_energy = horizontal_position(videos)
    _, audio_energy = level_difference(audios, videos.shape[1])
    x = object_energy - object_energy.mean(dim=1, keepdim=True)
    y = audio_energy - audio_energy.mean(dim=1, keepdim=True)
    return weighted_correlation(x, y, th.ones_like(x))


def draw_audio_position(videos: th.Tensor, audios: th.Tensor) -> th.Tensor:
    """[N, F, C, H, W], [N, 2, L] -> [N, F, C, 5/4 H, W]: a bar below each frame.

    The bar is bright at the horizontal position of the audio.
    """
    level, energy = level_difference(audios, videos.shape[1])
    height, width = videos.shape[-2:]
    x = (th.arange(width, device=videos.device) + 0.5) / width
    distance = (x - (level[..., None] + 1) / 2) * max(4, width / 4)
    loudness = (energy / energy.max().clamp(min=TINY)).sqrt()[..., None]
    brightness = 2 * loudness * th.exp(-distance.square()) - 1
    bar = repeat(brightness, "n f w -> n f c h w", c=videos.shape[2], h=max(1, round(height / 4)))
    return th.cat([videos, bar.to(videos.dtype)], dim=-2)


def toy_features(videos: th.Tensor, audios: th.Tensor) -> dict[str, th.Tensor]:
    """[N, F, C, H, W], [N, 2, L] -> {"video", "audio", "joint"}: a few features of each clip.

    video [N, 8 C]: colours on a coarse grid. audio [N, 2 f + 2]: level difference and loudness at
    f <= 8 frames, and the roughness of each channel. joint [N, 4 f]: position and brightness of
    the object, level difference and loudness; its covariance shows whether video and audio fit.
    The features are few, so that few clips suffice for their covariance.
    """
    num_frames = videos.shape[1]
    chosen = th.linspace(0, num_frames - 1, min(num_frames, TOY_FRAMES)).round().long()
    position, object_energy = horizontal_position(videos)
    level, audio_energy = level_difference(audios, num_frames)
    object_part = th.cat([position[:, chosen], object_energy[:, chosen].sqrt()], 1)
    audio_part = th.cat([level[:, chosen], audio_energy[:, chosen].sqrt()], 1)
    colours = F.adaptive_avg_pool3d(videos.double().transpose(1, 2), TOY_GRID).flatten(1)
    roughness = audios.double().diff(dim=-1).square().mean(dim=-1).sqrt()
    audio, joint = th.cat([audio_part, roughness], 1), th.cat([object_part, audio_part], 1)
    return {"video": colours, "audio": audio, "joint": joint}
