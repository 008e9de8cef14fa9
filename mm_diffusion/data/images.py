"""Images: reading, writing and fitting them. Frames are [C, H, W] uint8."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blobfile
import numpy as np
import torch as th
import torchvision.io
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as picture_functional
from torchvision.utils import make_grid, save_image

from ..files import write_atomically
from . import MediaError

warnings.filterwarnings(
    "ignore", module=r"PIL\."
)  # of odd EXIF and large pictures, once for each file
END_OF_JPEG = b"\xff\xd9"
EXIF_ORIENTATION = 0x0112
FLIPS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TRANSPOSITIONS = dict(
    enumerate((Image.Transpose[name] for name in FLIPS.split()), 2)
)  # by the orientation they mend


def fit_image(image: th.Tensor, height: int, width: int) -> th.Tensor:
    """[C, h, w] uint8 -> [C, height, width]: bicubic, aspect ratio kept, centred on black (pad // 2 first)."""
    h, w = image.shape[-2:]
    scale = min(height / h, width / w)
    size = [min(height, max(1, round(h * scale))), min(width, max(1, round(w * scale)))]
    if size != [h, w]:
        image = picture_functional.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
    down, across = height - size[0], width - size[1]
    return picture_functional.pad(
        image, [across // 2, down // 2, across - across // 2, down - down // 2]
    )


@contextmanager
def _opened_image(path: str | os.PathLike) -> Iterator[tuple[Any, Image.Image]]:
    """(file, image whose header is read) of a JPEG or PNG, local or remote; what is wrong with it as MediaError."""
    try:
        with (
            blobfile.BlobFile(os.fspath(path), "rb") as file,
            Image.open(file, formats=("JPEG", "PNG")) as image,
        ):
            yield file, image
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: is neither a JPEG nor a PNG image") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        blobfile.Error,
    ) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise MediaError(f"{path}: cannot be read as an image ({reason})") from error


def check_image(path: str | os.PathLike) -> None:
    """MediaError for a PNG with a wrong checksum, or a JPEG without its header or end: damage between stays unseen.

    Decodes only a JPEG that ends in something else.
    """
    with _opened_image(path) as (file, image):
        if image.format == "PNG":
            image.verify()
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 64))
        whole = file.read().rstrip(b"\0").endswith(END_OF_JPEG)
        file.seek(0)
        if not whole:
            image.load()


def read_image(path: str | os.PathLike) -> th.Tensor:
    """A JPEG or PNG of any kind -> [3, h, w] uint8 RGB, upright as its EXIF asks, transparency over black.

    MediaError where it cannot be read to its end.
    """
    with _opened_image(path) as (_, image):
        image.load()
        upright = TRANSPOSITIONS.get(_orientation(image))
        flat = _flat_rgb(image)
        return picture_functional.pil_to_tensor(
            flat if upright is None else flat.transpose(upright)
        )


def _orientation(image: Image.Image) -> Any:
    """What the EXIF of a loaded image says of it; None where there is none, or it cannot be read."""
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except (
        Exception
    ):  # PIL's parser raises whatever it stumbles over; the picture is good all the same
        return None


def _flat_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip
        return Image.fromarray(
            ((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8)
        ).convert("RGB")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_uint8(images: th.Tensor) -> th.Tensor:
    """[-1, 1] floats -> 0..255, the inverse of `uint8 / 127.5 - 1`; uint8 passes through."""
    return (
        images
        if images.dtype == th.uint8
        else ((images.float() + 1) * 127.5).round().clamp(0, 255).to(th.uint8)
    )


def to_float(images: th.Tensor) -> th.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return (
        images.to(th.float32, copy=True).div_(127.5).sub_(1)
    )  # in place: fresh memory costs more than the sums


def write_image(path: str | os.PathLike, image: th.Tensor, jpeg_quality: int = 95) -> None:
    """Write [3, H, W] uint8, as its suffix says: a lossless .png, or a .jpg of that quality and unsubsampled colour."""
    kinds: dict[str, dict[str, Any]] = {
        ".png": {
            "format": "PNG",
            "compress_level": 1,
        },  # twice as fast as the usual 6, and 3 % larger
        ".jpg": {"format": "JPEG", "quality": jpeg_quality, "subsampling": 0},
    }
    kind = kinds.get(Path(path).suffix.lower())
    if kind is None or image.ndim != 3 or len(image) != 3 or image.dtype != th.uint8:
        raise ValueError(
            f"{path}: need .png or .jpg and [3, H, W] uint8, got {[*image.shape]} {image.dtype}"
        )
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    write_atomically(path, lambda temporary: picture.save(temporary, **kind))


def jpeg_round_trip(image: th.Tensor, quality: int) -> th.Tensor:
    """[3, h, w] uint8 -> the same as a JPEG of that quality (1..100) shows it."""
    return torchvision.io.decode_jpeg(torchvision.io.encode_jpeg(image.contiguous(), quality))


def enlarge(images: th.Tensor, min_side: int = 64) -> th.Tensor:
    """[..., H, W] smaller than `min_side` pixels, larger by a whole number, so that pixels stay square and sharp."""
    factor = max(1, -(-min_side // min(images.shape[-2:])))
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def save_contact_sheet(
    path: str | os.PathLike, videos: th.Tensor | Sequence[th.Tensor], min_side: int = 64
) -> None:
    """Write a PNG of [N, F, 3, H, W] in [-1, 1] (or uint8): a clip's frames in a row, clips below each other.

    Small frames are `enlarge`.
    """
    images = enlarge(th.stack([to_uint8(video.detach().cpu()) for video in videos]), min_side)
    grid = make_grid(
        images.flatten(0, 1).float() / 255, nrow=images.shape[1], padding=2, pad_value=1.0
    )
    write_atomically(path, lambda temporary: save_image(grid, temporary, format="png"))
