"""Does the sound come from where the object is? One number for clips that show one bright object on a darker ground."""

from __future__ import annotations

import torch as th

from .stereo import SILENT

MAX_SHIFTS = 64  # pairings tried by `mismatched_alignment`
STILL = (
    1e-3  # spread of a place (0..1) or a level difference (-1..1) below which it does not change
)


def horizontal_place(videos: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """[N, F, C, H, W] in [-1, 1] -> (place [N, F] in 0..1, object energy [N, F]).

    With e the brightness (mean over C) above the frame's median, and 0 below it, at the pixel centre x in 0..1:
    energy = sum e^2, place = sum(x e^2) / sum e^2.
    """
    brightness = videos.double().mean(dim=2)
    ground = brightness.flatten(2).median(dim=2).values[..., None, None]
    energy = (brightness - ground).clamp(min=0).square().sum(dim=2)  # over H: [N, F, W]
    x = (th.arange(energy.shape[-1], device=energy.device) + 0.5) / energy.shape[-1]
    total = energy.sum(dim=-1)
    return (energy * x).sum(dim=-1) / total.clamp(min=1e-12), total


def level_difference(audios: th.Tensor, num_frames: int) -> tuple[th.Tensor, th.Tensor]:
    """[N, 2, L] -> (difference [N, F] in -1..1, energy [N, F]) of the sound during each of F frames.

    E is the sum of squares of a channel over the frame's samples; difference = (E_R - E_L) / (E_R + E_L).
    """
    running = th.nn.functional.pad(audios.double().square().cumsum(dim=-1), (1, 0))
    edges = th.linspace(0, audios.shape[-1], num_frames + 1, device=audios.device).round().long()
    left, right = running[..., edges].diff(dim=-1).unbind(dim=1)
    total = left + right
    return (right - left) / total.clamp(min=1e-12), total


def weighted_correlation(x: th.Tensor, y: th.Tensor, weight: th.Tensor) -> float:
    """Pearson correlation of x and y (any one shape) under weights; nan where either does not vary."""
    weight = weight / weight.sum()
    dx, dy = x - (weight * x).sum(), y - (weight * y).sum()
    covariance, var_x, var_y = ((weight * product).sum() for product in (dx * dy, dx * dx, dy * dy))
    return (covariance / (var_x * var_y).sqrt()).item()


def spatial_alignment(videos: th.Tensor, audios: th.Tensor) -> float:
    """[N, F, C, H, W] and [N, 2, L] -> correlation over frames and clips of place and level difference, -1..1.

    A frame's weight is min(v / mean v, 1) * min(a / mean a, 1) with v its object energy and a its sound energy: frames
    that show or sound next to nothing count for next to nothing. nan where nothing shows, sounds or moves.
    """
    return _alignment(videos, audios, shifts=[0])


def mismatched_alignment(videos: th.Tensor, audios: th.Tensor) -> float:
    """As `spatial_alignment`, pictures paired with other clips' sounds (cyclic shifts of the batch, at most 64).

    ValueError for fewer than two clips.
    """
    if len(videos) < 2:
        raise ValueError(f"mismatched pairs need at least 2 clips, got {len(videos)}")
    return _alignment(videos, audios, shifts=range(1, min(len(videos), MAX_SHIFTS + 1)))


def why_unaligned(videos: th.Tensor, audios: th.Tensor) -> str:
    """Why `spatial_alignment` and its mismatched pairs have no meaning; empty if they have."""
    place, shown = horizontal_place(videos)
    level, heard = level_difference(audios, videos.shape[1])
    if audios.double().square().mean().sqrt() < SILENT:
        return "nothing is heard"
    if not shown.any():
        return "nothing stands out in the pictures"
    together = (shown > 0) & (heard > 0)
    if not together.any():
        return "nothing is seen and heard at once"
    spreads = {"object": place[together], "sound": level[together]}
    still = [name for name, x in spreads.items() if x.max() - x.min() < STILL]
    return f"the {still[0]} stays where it is" if still else ""


def _alignment(videos: th.Tensor, audios: th.Tensor, shifts) -> float:
    place, object_energy = horizontal_place(videos)
    level, sound_energy = level_difference(audios, videos.shape[1])
    shown, heard = (e / e.mean().clamp(min=1e-12) for e in (object_energy, sound_energy))
    shown, heard = shown.clamp(max=1), heard.clamp(max=1)
    rolled_level, rolled_heard = (
        th.cat([row.roll(shift, 0) for shift in shifts]) for row in (level, heard)
    )
    repeats = (len(shifts), 1)
    return weighted_correlation(
        place.repeat(repeats), rolled_level, shown.repeat(repeats) * rolled_heard
    )


def show_heard_place(videos: th.Tensor, audios: th.Tensor, share: float = 0.25) -> th.Tensor:
    """[N, F, C, H, W], [N, 2, L] -> [N, F, C, H', W]: below each frame a bar that is lit where its sound comes from."""
    level, energy = level_difference(audios, videos.shape[1])
    width = videos.shape[-1]
    x = (th.arange(width, device=videos.device) + 0.5) / width
    distance = (x - (level[..., None] + 1) / 2) * max(4, width / 4)
    loudness = (energy / energy.max().clamp(min=1e-12)).sqrt()[..., None]
    lit = 2 * loudness * th.exp(-distance.square()) - 1
    rows = max(1, round(share * videos.shape[-2]))
    bar = lit[:, :, None, None, :].expand(*videos.shape[:3], rows, width)
    return th.cat([videos, bar.to(videos.dtype)], dim=-2)


def temporal_alignment(videos: th.Tensor, audios: th.Tensor) -> float:
    """[N, F, C, H, W] and [N, 2, L] -> correlation of object energy and sound energy over the frames, -1..1.

    Both are taken relative to their mean over the clip, so that loud clips of bright objects count for nothing. The
    frames must be dense enough to follow the sound: several for each time it swells. nan where nothing varies.
    """
    _, shown = horizontal_place(videos)
    _, heard = level_difference(audios, videos.shape[1])
    shown, heard = (energy - energy.mean(dim=1, keepdim=True) for energy in (shown, heard))
    return weighted_correlation(shown, heard, th.ones_like(shown))
