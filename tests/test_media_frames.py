"""Frames come out as players show them: turned, in shape, in their colours, from their own time."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch as th
from av.video.reformatter import ColorPrimaries, ColorTrc
from media_files import MEDIA, make_clip, noise, real_media, write_frames
from PIL import Image

from mm_diffusion.data import MediaError, decode
from mm_diffusion.data.extract import ExtractSettings, extract_videos

CORNERS = [[(220, 30, 30), (30, 200, 30)], [(30, 30, 220), (230, 230, 230)]]
PATTERN = np.uint8(CORNERS).repeat(16, axis=0).repeat(24, axis=1)  # [32, 48, 3]
IDENTITY = (1, 0, 0, 1)
# (a, b, c, d) of a display matrix -> the pattern as shown: (x, y) goes to (a x + c y, b x + d y)
SHOWN = {
    IDENTITY: lambda image: image,
    (-1, 0, 0, 1): lambda image: image[:, ::-1],
    (1, 0, 0, -1): lambda image: image[::-1],
    (-1, 0, 0, -1): lambda image: image[::-1, ::-1],
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),  # clockwise
    (0, -1, 1, 0): lambda image: np.rot90(image),
    (0, 1, 1, 0): lambda image: image.swapaxes(0, 1),
    (0, -1, -1, 0): lambda image: np.rot90(image, 2).swapaxes(0, 1),
}


def set_matrix(path, matrix):
    """Replace the display matrix of the video track of an mp4."""

    def as_bytes(a, b, c, d):
        values = [a << 16, b << 16, 0, c << 16, d << 16]
        return b"".join((value & 0xFFFFFFFF).to_bytes(4, "big") for value in values)

    data = path.read_bytes()
    track = data.index(b"tkhd")
    path.write_bytes(data[:track] + data[track:].replace(as_bytes(*IDENTITY), as_bytes(*matrix), 1))
    return path


def first_frame(path):
    """[h, w, 3] uint8."""
    return next(decode.read_frames(path, 0, 1, 4)).permute(1, 2, 0).numpy()


def corners(image):
    """The colours of [h, w, 3] near its corners, [2, 2, 3]."""
    image = np.asarray(image).astype(int)
    return image[[4, -5]][:, [4, -5]]


@pytest.mark.parametrize("matrix", SHOWN)
def test_every_flip_and_quarter_turn_is_shown_as_players_do(tmp_path, matrix):
    path = make_clip(tmp_path / "a.mp4", PATTERN[None], fps=4, audio=noise(4000))
    image, expected = first_frame(set_matrix(path, matrix)), SHOWN[matrix](PATTERN)
    assert image.shape == expected.shape
    np.testing.assert_allclose(corners(image), corners(expected), atol=4)
    height, width = expected.shape[:2]
    frames, _ = decode.read_window(path, 0, 1, 4, height, width, 16000, 16)
    np.testing.assert_array_equal(frames[0], image)
    info = decode.probe(path)
    assert (info.height, info.width) == (height, width)


@real_media
def test_the_mirrored_file_is_mirrored():
    image = first_frame(MEDIA / "odd" / "matrix_hflip.mp4")
    np.testing.assert_allclose(corners(image), np.array(CORNERS)[:, ::-1], atol=4)


# ---------------------------------------------------------------- shape and time


@pytest.mark.parametrize(
    ("aspect", "turned", "shown", "filled"),
    [
        ("4/3", False, (32, 64), (32, 64)),
        ("1/2", False, (32, 24), (64, 48)),
        ("4/3", True, (48, 24), (64, 32)),
    ],
)
def test_pixels_that_are_not_square_are_shown_in_their_shape(
    tmp_path, aspect, turned, shown, filled
):
    path = tmp_path / "a.mp4"
    write_frames(path, [PATTERN], sample_aspect_ratio=Fraction(aspect))
    if turned:
        set_matrix(path, (0, 1, -1, 0))
    assert first_frame(path).shape[:2] == shown
    extract_videos([str(path)], str(tmp_path / "frames"), ExtractSettings())
    with Image.open(tmp_path / "frames" / "image_a_000000.png") as image:
        assert image.size == shown[::-1]
    path = make_clip(tmp_path / "b.mkv", PATTERN[None], 4, noise(4000), aspect=Fraction(aspect))
    if not turned:
        info = decode.probe(path)
        assert (info.height, info.width) == shown
        frames, _ = decode.read_window(path, 0, 1, 4, 64, 64, 16000, 16)
        lit = frames[0].amax(dim=-1) > 20
        assert (int(lit.any(dim=1).sum()), int(lit.any(dim=0).sum())) == filled


def test_a_pixel_aspect_that_no_display_could_show_is_an_error(tmp_path):
    path = write_frames(tmp_path / "a.mkv", [PATTERN], sample_aspect_ratio=Fraction(1, 16))
    with pytest.raises(MediaError, match=r"a\.mkv: corrupt pixel aspect ratio \(1:16\)"):
        first_frame(path)


def test_a_frame_is_shown_from_its_own_time_where_the_tick_is_as_long_as_a_frame(tmp_path):
    values = [20, 60, 100, 140, 180, 220]
    frames = [np.full((32, 48, 3), value, np.uint8) for value in values]
    path = write_frames(tmp_path / "a.avi", frames, codec="mpeg4", rate=2)
    shown = [float(image.float().mean()) for image in decode.read_frames(path, 0, 12, 4)]
    np.testing.assert_allclose(shown, np.repeat(values, 2), atol=5)


def test_a_cover_is_no_video(tmp_path):
    path = write_frames(tmp_path / "a.mp4", [PATTERN], "mjpeg", "yuvj420p", disposition=1024)
    for read in (decode.probe, decode.video_duration, first_frame):
        with pytest.raises(MediaError, match=r"a\.mp4: has no video stream"):
            read(path)


# ---------------------------------------------------------------- transparency


@pytest.mark.parametrize(
    ("suffix", "codec", "pixel_format"),
    [
        (".webm", "libvpx-vp9", "yuva420p"),
        (".webm", "libvpx", "yuva420p"),
        (".mov", "qtrle", "argb"),
        (".mov", "prores_ks", "yuva444p10le"),
    ],
)
def test_transparency_is_over_black(tmp_path, suffix, codec, pixel_format):
    rgba = np.full((32, 48, 4), (200, 100, 50, 255), np.uint8)
    rgba[:, :24, 3], rgba[:16, 24:, 3] = 0, 128
    options = {"auto-alt-ref": "0"} if "vpx" in codec else {}
    path = write_frames(
        tmp_path / f"a{suffix}", [rgba] * 3, codec, pixel_format, options=options, rate=4
    )
    for frame in decode.read_frames(path, 0, 3, 4):
        found = corners(frame.permute(1, 2, 0))
        expected = [[(0, 0, 0), (100, 50, 25)], [(0, 0, 0), (200, 100, 50)]]
        np.testing.assert_allclose(found, expected, atol=3)


def test_colours_hidden_in_a_gif_stay_hidden(tmp_path):
    rgba = np.full((32, 48, 4), (200, 100, 50, 255), np.uint8)
    rgba[:, :24, 3] = 0
    images = [Image.fromarray(rgba) for _ in range(3)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], disposal=2)
    found = corners(first_frame(tmp_path / "a.gif"))
    np.testing.assert_array_equal(found, [[(0, 0, 0), (200, 100, 50)]] * 2)


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize(
    ("matrix", "red", "blue"), [(6, 0.299, 0.114), (1, 0.2126, 0.0722), (9, 0.2627, 0.0593)]
)
@pytest.mark.parametrize("is_full", [False, True])
def test_matrix_and_range_are_those_of_the_file(tmp_path, matrix, red, blue, is_full):
    rgb = PATTERN / 255
    luma = rgb @ [red, 1 - red - blue, blue]
    chroma = [(rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)]
    sizes = (255, 255, 0) if is_full else (219, 224, 16)
    yuv = [sizes[2] + sizes[0] * luma, *(128 + sizes[1] * part for part in chroma)]
    frame = av.VideoFrame.from_ndarray(
        np.stack(yuv).round().astype(np.uint8), format="yuv444p", channel_last=False
    )
    tags = {"colorspace": matrix, "color_range": 2 if is_full else 1}
    path = write_frames(tmp_path / "a.mkv", [frame], "ffv1", "yuv444p", **tags)
    np.testing.assert_allclose(first_frame(path), PATTERN, atol=2)


def test_a_matrix_that_cannot_be_converted_is_an_error(tmp_path):
    path = write_frames(tmp_path / "a.mkv", [PATTERN], "ffv1", "yuv444p", colorspace=14)
    with pytest.raises(MediaError, match=r"a\.mkv: .*colour matrix 14"):
        first_frame(path)


def rgb_to_xyz(*chromaticities):
    """The matrix of primaries (x, y) and white D65."""
    xyz = np.array([(x / y, 1, (1 - x - y) / y) for x, y in chromaticities]).T
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    return xyz * np.linalg.solve(xyz, white)


BT709 = rgb_to_xyz((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
BT2020 = rgb_to_xyz((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))


def pq_code(light):
    powered = (light * 203 / 10000) ** (1305 / 8192)
    return ((0.8359375 + 18.8515625 * powered) / (1 + 18.6875 * powered)) ** 78.84375


def hlg_code(light):
    """Of a display with 1000 cd/m2."""
    luminance = (light @ BT2020[1])[..., None] * 0.203
    scene = light * 0.203 * luminance ** (1 / 1.2 - 1)
    logarithmic = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithmic)


def sdr_code(light):
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


WIDE = [
    (ColorTrc.SMPTE2084, pq_code),
    (ColorTrc.ARIB_STD_B67, hlg_code),
    (ColorTrc.BT2020_10, sdr_code),
]


def write_wide(path, light, transfer, code, primaries=ColorPrimaries.BT2020):
    """Write linear light [h, w, 3] in BT.2020, 1 for reference white, as 16-bit RGB."""
    codes = (code(light).clip(0, 1) * 65535).round().astype(np.uint16)
    frame = av.VideoFrame.from_ndarray(codes, format="gbrp16le")
    tags = {"color_trc": transfer, "color_primaries": primaries, "colorspace": 0}
    return write_frames(path, [frame], "ffv1", "gbrp16le", **tags)


@pytest.mark.parametrize(("transfer", "code"), WIDE)
def test_hdr_and_wide_gamut_come_out_in_bt709(tmp_path, transfer, code):
    rgb = PATTERN / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    light = (linear @ BT709.T @ np.linalg.inv(BT2020).T).clip(0)
    path = write_wide(tmp_path / "a.mkv", light, transfer, code)
    np.testing.assert_allclose(first_frame(path), PATTERN, atol=2)


@pytest.mark.parametrize(("transfer", "code"), WIDE[:2])
def test_light_above_reference_white_clips(tmp_path, transfer, code):
    bright = np.full((32, 48, 3), 3.0)
    assert (first_frame(write_wide(tmp_path / "a.mkv", bright, transfer, code)) == 255).all()


def test_hdr_with_other_primaries_is_an_error(tmp_path):
    grey = np.full((32, 48, 3), 0.5)
    path = write_wide(tmp_path / "a.mkv", grey, *WIDE[0], ColorPrimaries.SMPTE432)
    with pytest.raises(MediaError, match=r"a\.mkv: .*HDR with primaries 12"):
        first_frame(path)


@real_media
def test_the_hdr_file_has_the_colours_of_its_pattern():
    image = first_frame(MEDIA / "odd" / "hdr_pq.mp4")
    np.testing.assert_allclose(corners(image), CORNERS, atol=4)
    assert th.from_numpy(image[60:, 70:90]).float().mean() == pytest.approx(96, abs=2)
