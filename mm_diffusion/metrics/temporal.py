"""Is the sound loud when the object is bright? One number for clips that show one bright object on a darker ground."""

from __future__ import annotations

import torch as th

from .spatial import horizontal_place, level_difference, weighted_correlation


def temporal_alignment(videos: th.Tensor, audios: th.Tensor) -> float:
    """[N, F, C, H, W] and [N, 2, L] -> correlation of object energy and sound energy over the frames, -1..1.

    Both are taken relative to their mean over the clip, so that loud clips of bright objects count for nothing. The
    frames must be dense enough to follow the sound: several for each time it swells. nan where nothing varies.
    """
    _, shown = horizontal_place(videos)
    _, heard = level_difference(audios, videos.shape[1])
    shown, heard = (energy - energy.mean(dim=1, keepdim=True) for energy in (shown, heard))
    return weighted_correlation(shown, heard, th.ones_like(shown))
