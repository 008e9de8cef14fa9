"""Frames against their reference: PSNR, SSIM, and flicker. Frames are [F, 3, H, W] in [-1, 1]."""

from __future__ import annotations

import torch as th
import torch.nn.functional as F
from einops import rearrange

from .. import rng

LUMA = (0.299, 0.587, 0.114)
# SSIM of Wang et al. (2004): Gaussian window of 11 pixels, sigma 1.5, and two constants.
WINDOW_PIXELS, WINDOW_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
GREY_LEVELS = 127.5  # per unit of a frame
PATCH_PIXELS, MOST_PATCHES = 8, 1024  # side of a patch; patches of a clip
LEAST_ERROR = 4e-10  # mean square; PSNR is 100 dB at most


def psnr(frames: th.Tensor, reference: th.Tensor) -> float:
    """Peak signal to noise ratio in dB, of the error over all frames; at most 100."""
    error = (frames - reference).double().square().mean().clamp(min=LEAST_ERROR)
    return (10 * (4 / error).log10()).item()


def ssim(frames: th.Tensor, reference: th.Tensor) -> float:
    """Structural similarity of the luma, -1..1, mean over frames and windows inside the image.

    ValueError for frames smaller than the window.
    """
    if min(frames.shape[-2:]) < WINDOW_PIXELS:
        height, width = frames.shape[-2:]
        raise ValueError(
            f"SSIM needs {WINDOW_PIXELS} x {WINDOW_PIXELS} pixels, got {height} x {width}"
        )
    x, y = _luma(frames), _luma(reference)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x.square()
    variance_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (2 * SSIM_K1) ** 2, (2 * SSIM_K2) ** 2  # 2: the range of values
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean().item()


def _luma(frames: th.Tensor) -> th.Tensor:
    """[F, 3, H, W] in [-1, 1] -> [F, 1, H, W] in 0..2."""
    weights = th.tensor(LUMA, dtype=th.float64).view(3, 1, 1)
    return ((frames.double() + 1) * weights).sum(dim=1, keepdim=True)


def _blur(x: th.Tensor) -> th.Tensor:
    """[F, 1, H, W] -> [F, 1, H - 10, W - 10]: weighted means in windows."""
    offsets = th.arange(WINDOW_PIXELS, dtype=x.dtype) - WINDOW_PIXELS // 2
    weights = (-0.5 * (offsets / WINDOW_SIGMA).square()).exp()
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def flicker(frames: th.Tensor, reference: th.Tensor) -> float:
    """mean |x_{t+1} - x_t| - mean |y_{t+1} - y_t| in grey levels of 255; NaN for one frame.

    Above 0 the frames flicker more than the reference, below 0 they smear its motion.
    """
    change = frames.double().diff(dim=0).abs().mean() - reference.double().diff(dim=0).abs().mean()
    return (GREY_LEVELS * change).item()


def patches(frames: th.Tensor) -> th.Tensor:
    """Luma of patches of 8 x 8 pixels side by side -> [N, 64]: at most 1,024 of all frames.

    In grey levels over 8, so that squared distances are mean squares over the pixels of a patch. A
    Frechet distance of such points compares local contrast and texture and needs no weights. The
    choice of patches depends on the shape alone. What is left over at the edges is not used.
    """
    height, width = (size - size % PATCH_PIXELS for size in frames.shape[-2:])
    luma = _luma(frames[..., :height, :width])
    side = PATCH_PIXELS
    rows = rearrange(luma, "f 1 (h p) (w q) -> (f h w) (p q)", p=side, q=side)
    order = th.randperm(len(rows), generator=rng.generator(0, "patches"))
    return GREY_LEVELS / side * rows[order[:MOST_PATCHES]]
