"""Decoded frames as RGB images: in BT.709, transparency over black, turned as their matrix asks."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch as th
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorTrc, VideoReformatter

REFERENCE_WHITE = 203  # cd/m2 of the white of SDR within HDR (ITU-R BT.2408)
HLG_PEAK, HLG_GAMMA = 1000, 1.2  # cd/m2 and system gamma of its reference display (BT.2100)
HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
HDR_PRIMARIES = (ColorPrimaries.BT2020, ColorPrimaries.BT709, ColorPrimaries.UNSPECIFIED)
LUMINANCE_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
# Linear RGB of BT.2020 -> of BT.709 (ITU-R BT.2087).
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
# In H.273: RGB, BT.709, unspecified, reserved, FCC, BT.601 (two), SMPTE 240M, BT.2020.
KNOWN_MATRICES = (0, 1, 2, 3, 4, 5, 6, 7, 9)


def to_rgb(frame: Any, converter: VideoReformatter) -> th.Tensor:
    """A decoded frame -> [3, h, w] uint8 as a player shows it, but for the shape of its pixels.

    HDR is mapped so that reference white is white, and brighter clips. ValueError for colours that
    cannot be converted.
    """
    if frame.colorspace not in KNOWN_MATRICES:
        raise ValueError(f"colour matrix {frame.colorspace} of H.273 is not supported")
    is_wide = frame.color_primaries == ColorPrimaries.BT2020
    if is_wide or frame.color_trc in HDR:
        pixels = _tone_mapped(frame, converter)
    elif _has_alpha(frame.format.name):
        pixels = _over_black(converter.reformat(frame, format="rgba", threads=1).to_ndarray())
    else:
        pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    upright = np.ascontiguousarray(_turned(pixels, frame))
    return th.from_numpy(upright).permute(2, 0, 1)


@functools.cache
def _has_alpha(pixel_format: str) -> bool:
    described = av.VideoFormat(pixel_format)
    return described.has_palette or any(part.is_alpha for part in described.components)


def _over_black(rgba: np.ndarray) -> np.ndarray:
    """[h, w, 4] uint8 -> [h, w, 3]."""
    weighted = rgba[..., :3].astype(np.uint16) * rgba[..., 3:]
    return ((weighted + 127) // 255).astype(np.uint8)


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d): the pixel at (x, y) is shown at (a x + c y, b x + d y), but for a shift."""
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    return a, b, c, d


def shown_aspect(frame: Any, pixel_aspect: Fraction) -> Fraction:
    """Width over height of the pixels of `to_rgb(frame)`, given that of the stored ones."""
    return 1 / pixel_aspect if _is_on_its_side(frame) else pixel_aspect


def _is_on_its_side(frame: Any) -> bool:
    """Whether rows are shown as columns."""
    a, b, c, d = _display_matrix(frame)
    return abs(b) + abs(c) > abs(a) + abs(d)


def _turned(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """[h, w, 3], turned and mirrored by the nearest multiple of 90 degrees."""
    a, b, c, d = _display_matrix(frame)
    right, down = a, d
    if _is_on_its_side(frame):
        pixels, right, down = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def _tone_mapped(frame: Any, converter: VideoReformatter) -> np.ndarray:
    """HDR or BT.2020 -> [h, w, 3] uint8 with the primaries of BT.709 and the transfer of sRGB."""
    if frame.color_primaries not in HDR_PRIMARIES:
        raise ValueError(f"HDR with primaries {frame.color_primaries} of H.273 is not supported")
    planar = converter.reformat(frame, format="gbrp16le", threads=1)  # swscale's rgb48 has faults
    light = _light_of_codes(frame.color_trc)[planar.to_ndarray()]
    if frame.color_trc == ColorTrc.ARIB_STD_B67:
        light *= (light @ LUMINANCE_2020)[..., None] ** (HLG_GAMMA - 1)
        light *= HLG_PEAK / REFERENCE_WHITE
    if frame.color_primaries != ColorPrimaries.BT709:
        light = light @ BT2020_TO_BT709.T
    return (_srgb(light.clip(0, 1)) * 255 + 0.5).astype(np.uint8)


@functools.cache
def _light_of_codes(transfer: int) -> np.ndarray:
    """Linear light of each 16-bit code: 1 is reference white; of HLG, the scene's peak."""
    code = np.arange(2**16) / (2**16 - 1)
    if transfer == ColorTrc.SMPTE2084:
        light = _pq_luminance(code) / REFERENCE_WHITE
    elif transfer == ColorTrc.ARIB_STD_B67:
        light = _hlg_scene(code)
    else:  # SDR: greys stay as they are
        light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


def _pq_luminance(code: np.ndarray) -> np.ndarray:
    """The EOTF of SMPTE ST 2084, in cd/m2."""
    m1, m2 = 2610 / 16384, 2523 / 32
    c1, c2, c3 = 107 / 128, 2413 / 128, 2392 / 128
    root = code ** (1 / m2)
    return 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def _hlg_scene(code: np.ndarray) -> np.ndarray:
    """The inverse OETF of ARIB STD-B67: light of the scene, at most 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)


def _srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
