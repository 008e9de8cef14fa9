"""Still images: reading, checking, writing, fitting. An image is [3, H, W] uint8 RGB."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import blobfile
import numpy as np
import torch as th
import torchvision.io
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as image_functional
from torchvision.utils import make_grid, save_image

from ..files import write_atomically
from . import MediaError

warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd EXIF and large images, in each file
END_OF_JPEG = b"\xff\xd9"
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # raised by PIL
# Compression level 1 is twice as fast as the default 6, and 3 % larger.
IMAGE_FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG", "compress_level": 1},
    ".jpg": {"format": "JPEG", "subsampling": 0},
}

Resize = Callable[[th.Tensor, list[int]], th.Tensor]  # [C, h, w] uint8, [height, width] -> resized
_bicubic = functools.partial(image_functional.resize, interpolation=InterpolationMode.BICUBIC)
published_bicubic: Resize = functools.partial(_bicubic, antialias=False)  # of clips
antialiased_bicubic: Resize = functools.partial(_bicubic, antialias=True)


def fit_image(
    image: th.Tensor,
    height: int,
    width: int,
    resize: Resize = antialiased_bicubic,
    pixel_aspect: float | Fraction = 1,
) -> th.Tensor:
    """[C, h, w] uint8 -> [C, height, width]: resized, aspect kept, centred on black (pad // 2).

    pixel_aspect: width over height of a pixel of `image`.
    """
    h, w = image.shape[-2], image.shape[-1] * float(pixel_aspect)
    scale = min(height / h, width / w)
    size = [max(1, round(h * scale)), max(1, round(w * scale))]
    if size != [*image.shape[-2:]]:
        image = resize(image, size)
    down, across = height - size[0], width - size[1]
    borders = [across // 2, down // 2, across - across // 2, down - down // 2]
    return image_functional.pad(image, borders)


def square_pixels(image: th.Tensor, pixel_aspect: Fraction) -> th.Tensor:
    """[C, h, w] uint8 with pixels of this width over height -> [C, h, w * pixel_aspect]."""
    height, width = shown_size(image, pixel_aspect)
    scale = Fraction(width, image.shape[-1])
    return fit_image(image, height, width, pixel_aspect=scale)


def shown_size(image: th.Tensor, pixel_aspect: Fraction) -> tuple[int, int]:
    """(height, width) with square pixels of an image [C, h, w] with pixels of this aspect."""
    height, width = image.shape[-2:]
    return height, max(1, round(width * pixel_aspect))


@contextmanager
def _opened_image(path: str | os.PathLike) -> Iterator[tuple[Any, Image.Image]]:
    """(file, image with its header read) of a local or remote JPEG or PNG; errors as MediaError."""
    try:
        with (
            blobfile.BlobFile(os.fspath(path), "rb") as file,
            Image.open(file, formats=("JPEG", "PNG")) as image,
        ):
            yield file, image
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: is neither a JPEG nor a PNG image") from error
    except (*UNREADABLE, blobfile.Error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise MediaError(f"{path}: cannot be read as an image ({reason})") from error


def check_image(path: str | os.PathLike) -> None:
    """MediaError for a PNG with a wrong checksum, or a JPEG without its header or end.

    Decodes only a JPEG that ends in something else; damage inside a JPEG stays undetected.
    """
    with _opened_image(path) as (file, image):
        if image.format == "PNG":
            image.verify()
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 64))
        has_end = file.read().rstrip(b"\0").endswith(END_OF_JPEG)
        file.seek(0)
        if not has_end:
            image.load()


def read_image(path: str | os.PathLike) -> th.Tensor:
    """A JPEG or PNG -> [3, h, w] uint8 RGB, upright as its EXIF asks, transparency over black.

    MediaError if it cannot be read to its end.
    """
    with _opened_image(path) as (_, image):
        image.load()
        with suppress(Exception):  # of PIL's parser of EXIF: the image is good all the same
            ImageOps.exif_transpose(image, in_place=True)
        return image_functional.pil_to_tensor(_flat_rgb(image))


def _flat_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip
        grey = (np.asarray(image).astype(np.int64) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_uint8(images: th.Tensor) -> th.Tensor:
    """Floats in [-1, 1] -> 0..255; uint8 passes through."""
    if images.dtype == th.uint8:
        return images
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(th.uint8)


def to_float(images: th.Tensor) -> th.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    # In place: new memory costs more than the arithmetic.
    return images.to(th.float32, copy=True).div_(127.5).sub_(1)


def write_image(path: str | os.PathLike, image: th.Tensor, jpeg_quality: int = 95) -> None:
    """Write [3, H, W] uint8 as a lossless .png, or a .jpg of that quality with full colour."""
    options = IMAGE_FORMATS.get(Path(path).suffix.lower())
    if options is None or image.ndim != 3 or len(image) != 3 or image.dtype != th.uint8:
        found = f"{[*image.shape]} {image.dtype}"
        raise ValueError(f"{path}: need .png or .jpg and [3, H, W] uint8, got {found}")
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    write_atomically(path, functools.partial(pixels.save, quality=jpeg_quality, **options))


def jpeg_round_trip(image: th.Tensor, quality: int) -> th.Tensor:
    """[3, h, w] uint8 -> the same, compressed as a JPEG of that quality (1..100)."""
    return torchvision.io.decode_jpeg(torchvision.io.encode_jpeg(image.contiguous(), quality))


def enlarge(images: th.Tensor, min_side: int = 64) -> th.Tensor:
    """[..., H, W], repeated by the whole factor that gives at least `min_side` pixels a side."""
    factor = max(1, -(-min_side // min(images.shape[-2:])))
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def save_contact_sheet(
    path: str | os.PathLike, videos: th.Tensor | Sequence[th.Tensor], min_side: int = 64
) -> None:
    """Write a PNG of [N, F, 3, H, W] in [-1, 1] (or uint8): one row a clip, frames `enlarge`d."""
    frames = enlarge(th.stack([to_uint8(video.detach().cpu()) for video in videos]), min_side)
    pixels = frames.flatten(0, 1).float() / 255
    grid = make_grid(pixels, nrow=frames.shape[1], padding=2, pad_value=1.0)
    write_atomically(path, functools.partial(save_image, grid, format="png"))
