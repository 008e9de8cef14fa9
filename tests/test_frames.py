"""Images and videos as training pairs of the upsampler, and videos extracted to image files."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch as th
from media_files import MEDIA, grey_frames, make_clip, make_gif, noise, real_media
from PIL import Image

from mm_diffusion.config import FrameDataConfig
from mm_diffusion.data import DataError, MediaError, decode, images
from mm_diffusion.data.cache import DiskCache
from mm_diffusion.data.extract import RECORD, ExtractSettings, extract_videos
from mm_diffusion.data.frames import (
    FrameDataset,
    degrade,
    find_frames,
    find_images,
    load_frames,
    opencv_cubic,
)
from mm_diffusion.data.loader import GlobalOrder
from mm_diffusion.data.probing import FINGERPRINT_BYTES
from mm_diffusion.data.workers import ReaderPool
from mm_diffusion.dist_util import World


def config(data_dir="", **changes):
    """A config of small images."""
    sizes = {"large_size": 32, "small_size": 8, "num_workers": 0}
    return FrameDataConfig(data_dir=str(data_dir), **sizes | changes)


def dataset_of(data_dir, **changes):
    return FrameDataset(find_images(str(data_dir)), config(**changes))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MM_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))


def smooth(seed, height=40, width=40):
    """[3, h, w] uint8, soft enough to survive a JPEG."""
    coarse = np.random.default_rng(seed).integers(20, 236, (3, 5, 5), np.uint8)
    return images.fit_image(th.from_numpy(coarse), max(height, width), max(height, width))[
        :, :height, :width
    ]


def write_images(folder, count, suffix=".png"):
    for k in range(count):
        images.write_image(folder / f"{k}{suffix}", smooth(k))
    return folder


def write_video(path, seconds=2, seed=0, **options):
    """A video of slowly changing colours at 10 fps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = [smooth(seed + k, 32, 48).permute(1, 2, 0).numpy().astype(float) for k in range(2)]
    shares = np.linspace(0, 1, int(10 * seconds))
    return make_clip(
        path,
        np.stack([(1 - s) * ends[0] + s * ends[1] for s in shares]).astype(np.uint8),
        **options,
    )


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != RECORD)


# ---------------------------------------------------------------- images


def grey_ramp():
    return np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1))


def save_grey(path, mode):
    """A horizontal ramp of grey in an image mode of PIL."""
    grey = grey_ramp()
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif mode == "P":
        Image.fromarray(grey).convert("RGB").quantize(colors=256).save(path)
    elif mode == "P with transparency":
        Image.fromarray(grey).quantize(colors=256).save(path, transparency=bytes([255] * 256))
    elif mode == "CMYK":
        Image.fromarray(grey).convert("RGB").convert("CMYK").save(path, quality=100, subsampling=0)
    else:
        Image.fromarray(grey).convert("RGBA").convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    "mode", ["L", "LA", "RGB", "RGBA", "P", "P with transparency", "I;16", "CMYK"]
)
def test_every_image_mode_gives_the_same_rgb(tmp_path, mode):
    path = save_grey(tmp_path / ("a.jpg" if mode == "CMYK" else "a.PNG"), mode)
    image = images.read_image(path)
    assert (image.shape, image.dtype) == ((3, 16, 24), th.uint8)
    error = (image.int() - th.from_numpy(grey_ramp()).int()).abs().max()
    assert error <= (3 if path.suffix == ".jpg" else 0)


def test_one_bit_images_are_black_and_white(tmp_path):
    bits = th.from_numpy(grey_ramp() > 128)
    Image.fromarray(bits.numpy()).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png").equal(bits.to(th.uint8).expand(3, -1, -1) * 255)


def test_what_is_transparent_lies_over_black(tmp_path):
    layers = {"LA": (200, 51), "RGBA": (200, 200, 200, 51)}
    for mode, value in layers.items():
        Image.new(mode, (8, 8), value).save(tmp_path / "a.png")
        assert (images.read_image(tmp_path / "a.png") == 40).all()
    Image.new("P", (8, 8), 3).save(tmp_path / "a.png", transparency=3)
    assert (images.read_image(tmp_path / "a.png") == 0).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_images_are_upright_as_their_exif_asks(tmp_path, suffix):
    upright = smooth(1, 24, 40)
    stored = Image.fromarray(upright.permute(1, 2, 0).contiguous().numpy()).transpose(
        Image.Transpose.ROTATE_90
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    stored.save(
        tmp_path / f"a{suffix}",
        exif=exif,
        **({"quality": 98, "subsampling": 0} if suffix == ".jpg" else {}),
    )
    image = images.read_image(tmp_path / f"a{suffix}")
    assert image.shape == upright.shape
    assert (image.int() - upright.int()).abs().max() <= (8 if suffix == ".jpg" else 0)


ODD_EXIF = {
    "no TIFF": b"Exif\0\0no TIFF at all",
    "empty": b"Exif\0\0",
    "cut": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
    "far away": b"Exif\0\0II*\0\xff\xff\xff\x7f\x01\0",
}
quiet_exif = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL.TiffImagePlugin"
)  # pytest undoes what media.py does


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("exif", ODD_EXIF.values(), ids=ODD_EXIF)
@quiet_exif
def test_exif_that_makes_no_sense_turns_nothing(tmp_path, suffix, exif):
    image = smooth(1, 24, 40)
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(
        tmp_path / f"a{suffix}", exif=exif, quality=98
    )
    assert not find_images(str(tmp_path)).bad
    assert (images.read_image(tmp_path / f"a{suffix}").int() - image.int()).abs().float().mean() < 3


@quiet_exif
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_images_are_upright_whatever_else_is_corrupt_in_their_exif(tmp_path, suffix):
    image, exif, generator = Image.new("RGB", (16, 8)), Image.Exif(), np.random.default_rng(0)
    exif.update({0x0112: 6, 0x011A: 72.0, 0x0132: "2020:01:01 00:00:00"})
    after_orientation = len(b"Exif\0\0") + 8 + 2 + 12  # header, number of entries, first entry
    for _ in range(300):
        corrupt = np.frombuffer(exif.tobytes(), np.uint8).copy()
        corrupt[generator.integers(after_orientation, len(corrupt), 4)] = generator.integers(
            0, 256, 4
        )
        image.save(tmp_path / f"a{suffix}", exif=corrupt.tobytes())
        assert images.read_image(tmp_path / f"a{suffix}").shape == (3, 16, 8)


def test_odd_exif_makes_no_noise(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=ODD_EXIF["cut"])
    read = "import sys; from mm_diffusion.data.images import check_image, read_image"
    read += "; check_image(sys.argv[1]); read_image(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", read, tmp_path / "a.jpg"], capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("", "")


def test_a_png_corrupt_anywhere_is_left_out(tmp_path):
    intact = (write_images(tmp_path, 1) / "0.png").read_bytes()
    for k, where in enumerate(np.linspace(8, intact.index(b"IEND") - 5, 40).astype(int)):
        corrupt = bytearray(intact)
        corrupt[where] ^= 4
        (tmp_path / f"corrupt_{k}.png").write_bytes(corrupt)
    index = find_images(str(tmp_path))
    assert [os.path.basename(path) for path, _ in index.clips] == ["0.png"]
    assert len(index.bad) == 40


def test_png_is_lossless_and_jpeg_nearly_and_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    image = smooth(3)
    errors = {}
    for name, quality in {"a.png": 1, "a.jpg": 95, "b.jpg": 20}.items():
        images.write_image(tmp_path / name, image, quality)
        errors[name] = (images.read_image(tmp_path / name).int() - image.int()).abs().float().mean()
    assert errors["a.png"] == 0
    assert errors["a.jpg"] < 1.5 < errors["b.jpg"]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        images.write_image(tmp_path / "c.png", image)
    with pytest.raises(ValueError, match=r"c\.bmp: need \.png or \.jpg"):
        images.write_image(tmp_path / "c.bmp", image)
    assert names_in(tmp_path) == ["a.jpg", "a.png", "b.jpg"]


def bad_images(folder):
    """One of each kind of bad image -> what its reason must say."""
    intact = {
        suffix: write_images(folder / "intact", 1, suffix) / f"0{suffix}"
        for suffix in (".png", ".jpg")
    }
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.JPEG").write_text("no image\n" * 100)
    for suffix, path in intact.items():
        (folder / f"cut{suffix}").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "cut.mp4").write_bytes(b"\0" * 100)
    return {
        "empty.png": "0 bytes",
        "text.JPEG": "neither",
        "cut.png": "read",
        "cut.jpg": "truncated",
        "cut.mp4": "",
    }


def test_bad_images_are_named_with_their_reason_and_left_out(tmp_path):
    reasons = bad_images(tmp_path)
    index = find_images(str(tmp_path))
    assert [os.path.basename(path) for path, _ in index.clips] == ["0.jpg", "0.png"]
    assert {os.path.basename(path) for path in index.bad} == set(reasons)
    for path, reason in index.bad.items():
        assert reasons[os.path.basename(path)] in reason
        assert reason.startswith(path)
        assert "\n" not in reason
        with pytest.raises(MediaError, match=os.path.basename(path)):
            images.read_image(path)
    with pytest.raises(DataError, match=r"5 of 7 files cannot be used .*--max_bad_share"):
        find_frames(config(tmp_path))
    assert find_frames(config(tmp_path, max_bad_share=0.8)) == index


def test_an_image_with_something_behind_its_end_is_still_good(tmp_path):
    path = write_images(tmp_path, 1, ".jpg") / "0.jpg"
    before = images.read_image(path)
    path.write_bytes(path.read_bytes() + b"a video that a camera appended" * 20)
    assert not find_images(str(tmp_path)).bad
    assert images.read_image(path).equal(before)


def test_an_image_that_breaks_during_training_is_named(tmp_path):
    settings = config(write_images(tmp_path, 1), batch_size=1)
    stream = load_frames(find_frames(settings), settings)
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    with pytest.raises(DataError, match=r"0\.png: cannot be read"):
        next(stream)


def test_a_folder_without_images_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"holds no images or videos .*py_scripts/extract_video\.py"
    ):
        find_frames(config(tmp_path))
    with pytest.raises(DataError, match="no such data folder"):
        find_frames(config(tmp_path / "nowhere"))


def test_unchanged_images_are_not_probed_again(tmp_path, monkeypatch):
    first = find_images(str(write_images(tmp_path, 3)))
    monkeypatch.setattr(ReaderPool, "call", lambda *_: pytest.fail("probed again"))
    assert find_images(str(tmp_path)) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"small_size": 12}, "large_size 32 is not a multiple of small_size 12"),
        ({"large_size": 0}, "large_size"),
        ({"small_size": 0}, "small_size"),
        ({"batch_size": 0}, "--batch_size"),
        ({"video_fps": 0}, "--video_fps"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_read(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_the_folder_is_logged_when_it_is_searched(tmp_path, capsys):
    write_video(write_images(tmp_path, 3) / "video.mp4", seconds=1.5)
    (tmp_path / "empty.png").write_bytes(b"")
    index = find_frames(config(tmp_path, max_bad_share=0.5))
    logged = capsys.readouterr().out.splitlines()
    assert len(logged) == 2
    assert logged[0].endswith(f"{tmp_path}: 3 images and 1 videos (1.5 s), 1 files left out:")
    assert "empty.png: is empty" in logged[1]
    assert find_frames(config(tmp_path, max_bad_share=0.5)) == index
    assert capsys.readouterr().out.splitlines() == logged
    settings = config(batch_size=9, random_flip=False)
    batch = next(load_frames(index, settings))
    displayed = FrameDataset(index, settings)
    assert len(displayed) == 9
    assert sorted(x.sum().item() for x in batch[0]) == sorted(
        displayed[k][0].sum().item() for k in range(9)
    )
    assert not capsys.readouterr().out


def test_the_cache_is_refused_in_the_data_folder(tmp_path):
    settings = config(write_images(tmp_path / "a/b", 1).parent, cache_dir=str(tmp_path / "a/cache"))
    index = find_frames(settings)
    with pytest.raises(ValueError, match="lies in the data folder"):
        load_frames(index, settings)


# ---------------------------------------------------------------- pairs


def test_large_images_keep_their_aspect_on_centred_black(tmp_path):
    images.write_image(tmp_path / "a.png", th.full((3, 27, 64), 255, dtype=th.uint8))
    large = dataset_of(tmp_path, large_size=64, small_size=16)[0][0]
    assert (large.dtype, large.shape) == (th.float32, (3, 64, 64))
    assert (large[:, 18:45] == 1).all()  # 37 rows of black: 18 above, 19 below
    assert (large[:, :18] == -1).all()
    assert (large[:, 45:] == -1).all()


def degraded(count):
    """(plain small image, its degraded versions) of a grey square, over as many seeds."""
    large = th.full((3, 64, 64), 128, dtype=th.uint8)
    return images.fit_image(large, 16, 16, opencv_cubic), [
        degrade(large, 16, np.random.default_rng(seed)) for seed in range(count)
    ]


def test_without_noise_and_jpeg_the_small_image_is_the_large_one_resized(tmp_path):
    dataset = dataset_of(write_images(tmp_path, 20))
    plain = 0
    for large, cond in (dataset[epoch, k] for epoch in range(5) for k in range(20)):
        resized = images.fit_image(images.to_uint8(large), 8, 8, opencv_cubic)
        plain += images.to_uint8(cond["low_res"]).equal(resized)
    assert 10 < plain < 40  # a quarter of 100


def test_noise_and_jpeg_come_in_half_of_the_cases_each(monkeypatch):
    qualities = []
    monkeypatch.setattr(
        "mm_diffusion.data.images.jpeg_round_trip",
        lambda image, quality: qualities.append(quality) or image,
    )
    plain, small = degraded(1000)
    noisy = [(image.float() - plain).std().item() for image in small if not image.equal(plain)]
    assert 440 < len(noisy) < 560
    assert 440 < len(qualities) < 560
    assert (min(qualities), max(qualities)) == (20, 80)
    assert 45 < np.mean(qualities) < 55
    assert max(noisy) < 21
    assert 0.4 < np.mean(np.array(noisy) < 10) < 0.6  # sigma is uniform in 0..20


def test_jpeg_comes_after_the_noise_and_loses_more_at_lower_quality(monkeypatch):
    image = smooth(2, 64, 64)
    errors = [
        (images.jpeg_round_trip(image, q).int() - image.int()).abs().float().mean()
        for q in (20, 50, 80)
    ]
    assert errors == sorted(errors, reverse=True)
    monkeypatch.setattr("mm_diffusion.data.images.jpeg_round_trip", lambda image, _: image // 2)
    plain, small = degraded(100)
    assert all(image.float().mean() < 70 or image.float().mean() > 120 for image in small)
    assert any(image.float().std() > 5 and image.float().mean() < 70 for image in small)
    assert any(image.equal(plain // 2) for image in small)


def same(one, other):
    return one[0].equal(other[0]) and one[1]["low_res"].equal(other[1]["low_res"])


def test_a_pair_depends_on_seed_epoch_and_index_only(tmp_path):
    index = find_images(str(write_images(tmp_path, 12)))
    one, two = FrameDataset(index, config()), FrameDataset(index, config())
    forth = [one[1, k] for k in range(12)]
    back = [two[1, k] for k in reversed(range(12))][::-1]
    assert all(map(same, forth, back))
    assert not all(same(one[2, k], pair) for k, pair in enumerate(forth))
    other_seed = FrameDataset(index, config(seed=43))
    assert not all(same(other_seed[1, k], pair) for k, pair in enumerate(forth))


def test_half_of_the_pairs_are_mirrored_both_images_together(tmp_path):
    index = find_images(str(write_images(tmp_path, 20)))
    plain = FrameDataset(index, config(random_flip=False))
    flipped = FrameDataset(index, config())
    count = 0
    for key in [(epoch, k) for epoch in range(5) for k in range(20)]:
        (straight, _), (large, cond) = plain[key], flipped[key]
        is_mirrored = not large.equal(straight)
        assert large.equal(straight.flip(-1) if is_mirrored else straight)
        own, other = (
            images.to_float(images.fit_image(images.to_uint8(x), 8, 8))
            for x in (large, large.flip(-1))
        )
        assert (cond["low_res"] - own).square().mean() < (cond["low_res"] - other).square().mean()
        count += is_mirrored
    assert 30 < count < 70


def test_two_ranks_share_the_batch_of_one_and_a_restart_continues(tmp_path):
    index = find_frames(config(write_images(tmp_path, 10)))
    single = load_frames(index, config(batch_size=4))
    ranks = [load_frames(index, config(batch_size=2), World(rank, 2)) for rank in range(2)]
    batches = [next(single) for _ in range(6)]
    for large, cond in batches:
        parts = [next(rank) for rank in ranks]
        assert large.equal(th.cat([part[0] for part in parts]))
        assert cond["low_res"].equal(th.cat([part[1]["low_res"] for part in parts]))
    assert same(next(load_frames(index, config(batch_size=4), start_sample=5 * 4)), batches[5])
    assert (batches[0][0].shape, batches[0][1]["low_res"].shape) == ((4, 3, 32, 32), (4, 3, 8, 8))
    assert {part.dtype for part in (batches[0][0], batches[0][1]["low_res"])} == {th.float32}


def test_the_seed_of_the_stream_is_that_of_its_pairs(tmp_path):
    settings = config(write_images(tmp_path, 5), batch_size=8, seed=7)
    index = find_frames(settings)
    large, cond = next(load_frames(index, settings))
    pairs = [(large[k], {"low_res": cond["low_res"][k]}) for k in range(8)]
    dataset, order = FrameDataset(index, settings), GlobalOrder(5, 8, seed=7)
    assert all(same(pair, dataset[key]) for pair, key in zip(pairs, next(iter(order)), strict=True))


def test_worker_processes_give_the_same_batches(tmp_path):
    index = find_frames(config(write_images(tmp_path, 5)))
    one, other = (
        next(load_frames(index, config(batch_size=3, num_workers=workers))) for workers in (0, 1)
    )
    assert same(one, other)


def test_cached_images_give_the_same_bits_and_are_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mm_diffusion.data.cache.SPARE_BYTES", 0)
    write_images(tmp_path / "a", 3, ".jpg")
    write_video(tmp_path / "a/video.mp4", seconds=1)
    index = find_images(str(tmp_path / "a"))
    plain = FrameDataset(index, config())
    disk = DiskCache(str(tmp_path / "cache"), str(tmp_path / "a"))
    cached = FrameDataset(index, config(), disk)
    assert len(cached) == 7
    assert all(same(cached[epoch, k], plain[epoch, k]) for k in range(7) for epoch in range(2))
    monkeypatch.setattr(FrameDataset, "image", lambda *_: pytest.fail("decoded again"))
    again = FrameDataset(index, config(), disk)
    assert all(same(again[2, k], cached[2, k]) for k in range(7))
    settings = config(batch_size=7, cache_dir=str(tmp_path / "cache"))
    next(load_frames(index, settings))
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        next(load_frames(index, dataclasses.replace(settings, large_size=16)))
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        next(load_frames(index, dataclasses.replace(settings, antialias=True)))


# ---------------------------------------------------------------- videos


def test_frames_of_videos_equal_their_extraction_whatever_their_audio(tmp_path):
    write_video(tmp_path / "videos/silent.mp4", audio=None)
    write_video(tmp_path / "videos/deep/mono.mkv", audio=noise(32000, channels=1), seed=5)
    write_video(tmp_path / "videos/sparse.webm", seconds=3, seed=9)
    extract_videos([str(tmp_path / "videos")], str(tmp_path / "frames"), ExtractSettings())
    on_the_fly, extracted = (dataset_of(tmp_path / name) for name in ("videos", "frames"))
    assert len(on_the_fly) == len(extracted) == 28
    read = {
        name: images.read_image(tmp_path / "frames" / name)
        for name in names_in(tmp_path / "frames")
    }
    order = {"mono": 0, "silent": 8, "sparse": 16}  # videos/deep comes first
    for name, image in read.items():
        _, clip, number = Path(name).stem.split("_")
        assert on_the_fly.image(order[clip] + int(number)).equal(image)


def test_images_and_videos_mix(tmp_path):
    write_video(tmp_path / "a/video.mp4")
    write_images(tmp_path / "b", 3, ".jpg")
    dataset = dataset_of(f"{tmp_path / 'a'},{tmp_path / 'b'}", video_fps=2)
    assert len(dataset) == 7
    assert len({dataset[k][0].sum().item() for k in range(7)}) == 7


def test_a_gif_is_a_video_of_the_sum_of_its_frame_durations(tmp_path):
    make_gif(tmp_path / "a.gif", grey_frames([10, 200, 90]), [250, 500, 2250])
    assert decode.video_duration(tmp_path / "a.gif") == pytest.approx(3, abs=0.02)
    images = list(decode.read_frames(tmp_path / "a.gif", 0, 12, 4))
    dataset = dataset_of(tmp_path)
    assert all(dataset.image(k).equal(image) for k, image in enumerate(images))
    displayed = [image.float().mean().item() for image in images]
    assert displayed == pytest.approx([10] + [200] * 2 + [90] * 9, abs=2)


def test_extraction_writes_the_frames_displayed_at_its_rate_and_a_rerun_nothing(
    tmp_path, monkeypatch
):
    write_video(tmp_path / "videos/a.b.mp4")
    write_video(tmp_path / "videos/sub/c.mkv", seconds=1)
    target = tmp_path / "frames"
    frames, bad = extract_videos([str(tmp_path / "videos")], str(target), ExtractSettings(fps=4))
    assert (frames, bad) == ({"a.b": 8, "c": 4}, {})
    assert names_in(target) == [f"image_a.b_{k:06d}.png" for k in range(8)] + [
        f"image_c_{k:06d}.png" for k in range(4)
    ]
    read, _ = decode.read_window(
        write_video(tmp_path / "s.mp4", audio=noise(32000)), 0, 8, 4, 32, 48, 16000, 16
    )
    for k, name in enumerate(names_in(target)[:8]):
        assert (
            images.read_image(target / name).int() - read[k].permute(2, 0, 1).int()
        ).abs().float().mean() < 1
    monkeypatch.setattr(
        "mm_diffusion.data.images.write_image", lambda *_: pytest.fail("written again")
    )
    assert extract_videos(
        [str(tmp_path / "videos/sub"), str(tmp_path / "videos/a.b.mp4")],
        str(target),
        ExtractSettings(),
    )


@pytest.mark.parametrize("antialias", [False, True])
def test_images_are_resized_by_opencv_or_with_antialiasing(tmp_path, antialias):
    """An image twice as large as large_size, and that once more to small_size."""
    coarse = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    images.write_image(tmp_path / "a.png", th.from_numpy(coarse).permute(2, 0, 1))
    expected = []
    for side in (32, 8):
        if antialias:
            coarse = np.asarray(Image.fromarray(coarse).resize((side, side), Image.BICUBIC))
        else:
            coarse = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        expected.append(th.from_numpy(coarse.copy()).permute(2, 0, 1))
    dataset = dataset_of(tmp_path, random_flip=False, antialias=antialias)
    assert (images.to_uint8(dataset[0][0]).int() - expected[0].int()).abs().max() <= antialias
    plain = [images.to_uint8(dataset[epoch, 0][1]["low_res"]).int() for epoch in range(20)]
    assert min((small - expected[1].int()).abs().max() for small in plain) <= 2 * antialias
    settings = ExtractSettings(size=16, antialias=antialias)
    write_video(tmp_path / "videos/a.mp4", seconds=1)
    frames, _ = extract_videos([str(tmp_path / "videos")], str(tmp_path / "frames"), settings)
    assert frames == {"a": 4}
    other = dataclasses.replace(settings, antialias=not antialias)
    with pytest.raises(DataError, match=f"extracted with .*--antialias {antialias}"):
        extract_videos([str(tmp_path / "videos")], str(tmp_path / "frames"), other)


@pytest.mark.parametrize("size", [0, 24])
def test_extraction_can_fit_frames_into_a_square_and_write_jpeg(tmp_path, size):
    source = write_video(tmp_path / "a.mp4", seconds=1)
    settings = ExtractSettings(fps=2, format="jpg", quality=90, size=size)
    extract_videos([str(source)], str(tmp_path / "frames"), settings)
    assert names_in(tmp_path / "frames") == ["image_a_000000.jpg", "image_a_000001.jpg"]
    image = images.read_image(tmp_path / "frames/image_a_000000.jpg")
    assert image.shape == ((3, size, size) if size else (3, 32, 48))
    with Image.open(tmp_path / "frames/image_a_000000.jpg") as image:
        assert image.layer[1][1:3] == image.layer[0][1:3] == (1, 1)  # colour is not subsampled


def test_only_clips_that_are_incomplete_are_extracted_again(tmp_path, monkeypatch):
    for k in range(3):
        write_video(tmp_path / f"videos/{k}.mp4", seed=k)
    arguments = [str(tmp_path / "videos")], str(tmp_path / "frames"), ExtractSettings(), 1
    written, write = [], images.write_image

    def note(path, *rest, until=None):
        written.append(path.name.removeprefix("."))
        if written[-1] == until:
            raise OSError("disk full")
        write(path, *rest)

    monkeypatch.setattr(
        "mm_diffusion.data.images.write_image",
        lambda *rest: note(*rest, until="image_1_000005.png"),
    )
    with pytest.raises(OSError, match="disk full"):
        extract_videos(*arguments)
    monkeypatch.setattr("mm_diffusion.data.images.write_image", note)
    for missing in ("image_1_*", "image_0_000003.png"):
        for path in (tmp_path / "frames").glob(missing):
            path.unlink()
        done = {
            name
            for name in map(str, range(3))
            if len(list((tmp_path / "frames").glob(f"image_{name}_*"))) == 8
        }
        written.clear()
        assert extract_videos(*arguments) == ({str(k): 8 for k in range(3)}, {})
        assert sorted(written) == [
            f"image_{k}_{n:06d}.png" for k in range(3) if str(k) not in done for n in range(8)
        ]
        assert len(names_in(tmp_path / "frames")) == 24


def test_an_interrupted_clip_is_extracted_again_though_its_record_was_cut_short(tmp_path):
    write_video(tmp_path / "a.mp4")
    arguments = [str(tmp_path / "a.mp4")], str(tmp_path / "frames"), ExtractSettings()
    extract_videos(*arguments)
    record = tmp_path / "frames" / RECORD
    record.write_text(record.read_text()[:-5])
    for expected in (2, 2):
        assert extract_videos(*arguments) == ({"a": 8}, {})
        read = [line for line in record.read_text().splitlines() if line.endswith("}")]
        assert len(read) == expected  # the settings and the clip, once


def test_other_clips_are_extracted_beside_one_of_an_unknown_codec(tmp_path):
    write_video(tmp_path / "videos/good.mp4")
    odd = write_video(tmp_path / "videos/odd.mp4")
    odd.write_bytes(odd.read_bytes().replace(b"avc1", b"zzzz"))
    frames, bad = extract_videos(
        [str(tmp_path / "videos")], str(tmp_path / "frames"), ExtractSettings()
    )
    assert (frames, bad) == (
        {"good": 8},
        {str(odd): f"{odd}: its video stream has an unknown codec"},
    )


def test_a_failure_stops_the_other_clips_and_leaves_no_frames_of_them(tmp_path, monkeypatch):
    for name in ("long", "bad"):
        write_video(tmp_path / f"videos/{name}.mp4", seconds=20)
    written, long_began, write = [], threading.Event(), images.write_image

    def slowly(path, *rest):
        if "bad" in path.name:
            assert long_began.wait(60)
            raise OSError("disk full")
        write(path, *rest)
        written.append(path)
        long_began.set()
        time.sleep(0.05)

    monkeypatch.setattr("mm_diffusion.data.images.write_image", slowly)
    with pytest.raises(OSError, match="disk full"):
        extract_videos(
            [str(tmp_path / "videos")],
            str(tmp_path / "frames"),
            ExtractSettings(fps=10),
            num_workers=2,
        )
    assert 1 <= len(written) < 200
    assert not names_in(tmp_path / "frames")


def test_frames_of_a_clip_that_was_killed_are_no_images_and_go_with_the_rerun(tmp_path):
    kill = """
import os, sys
from mm_diffusion.data import extract, images
write = images.write_image
images.write_image = lambda path, *rest: os._exit(9) if "005" in path.name else write(path, *rest)
extract.extract_videos([sys.argv[1]], sys.argv[2], extract.ExtractSettings())
"""
    source, target = str(write_video(tmp_path / "a.mp4")), str(tmp_path / "frames")
    assert (
        subprocess.run(
            [sys.executable, "-c", kill, source, target], timeout=120, check=False
        ).returncode
        == 9
    )
    assert len(names_in(target)) == 5
    with pytest.raises(DataError, match="holds no images"):
        find_images(target)
    assert extract_videos([source], target, ExtractSettings()) == ({"a": 8}, {})
    assert names_in(target) == [f"image_a_{k:06d}.png" for k in range(8)]


def test_a_video_replaced_by_a_shorter_one_leaves_no_old_frames(tmp_path):
    arguments = [str(tmp_path / "videos")], str(tmp_path / "frames"), ExtractSettings()
    write_video(tmp_path / "videos/a.mp4")
    extract_videos(*arguments)
    write_video(tmp_path / "videos/a.mp4", seconds=1)
    assert extract_videos(*arguments) == ({"a": 4}, {})
    assert len(names_in(tmp_path / "frames")) == 4


def test_two_sources_of_one_name_are_refused(tmp_path):
    one, other = write_video(tmp_path / "a/x.mp4"), write_video(tmp_path / "b/x.mkv", seed=4)
    target = str(tmp_path / "frames")
    with pytest.raises(DataError, match=r"a/x\.mp4 and .*b/x\.mkv: .* rename one"):
        extract_videos([str(tmp_path)], target, ExtractSettings())
    assert not os.path.exists(target)
    extract_videos([str(one)], target, ExtractSettings())
    before = names_in(target)
    with pytest.raises(DataError, match=r"a/x\.mp4 and .*b/x\.mkv: .* rename one"):
        extract_videos([str(other)], target, ExtractSettings())
    assert names_in(target) == before


@pytest.mark.parametrize("minutes_later", [0, 10])
@pytest.mark.parametrize("pad_bytes", [0, 3 * FINGERPRINT_BYTES])
def test_a_video_copied_elsewhere_is_the_same_but_another_of_its_size_is_not(
    tmp_path, monkeypatch, minutes_later, pad_bytes
):
    here, there = write_video(tmp_path / "a/x.mp4"), tmp_path / "b/x.mp4"
    data = (
        here.read_bytes()
        + (pad_bytes.to_bytes(4, "big") + b"free").ljust(pad_bytes, b"\0")[:pad_bytes]
    )
    here.write_bytes(data)
    arguments = str(tmp_path / "frames"), ExtractSettings()
    extract_videos([str(here)], *arguments)
    monkeypatch.setattr(
        "mm_diffusion.data.images.write_image", lambda *_: pytest.fail("written again")
    )
    there.parent.mkdir()
    there.write_bytes(data)
    os.utime(there, (0, here.stat().st_mtime + 60 * minutes_later))
    assert extract_videos([str(there)], *arguments) == ({"x": 8}, {})
    for changed in (10, len(data) // 2, len(data) - 1):
        there.write_bytes(
            data[:changed] + b"inserted" + data[changed + (8 if changed == 10 else 0) :]
        )
        with pytest.raises(DataError, match=r"a/x\.mp4 and .*b/x\.mp4: .* rename one"):
            extract_videos([str(there)], *arguments)


def test_one_folder_holds_frames_of_one_kind(tmp_path):
    source, target = str(write_video(tmp_path / "a.mp4")), str(tmp_path / "frames")
    extract_videos([source], target, ExtractSettings(fps=4))
    for other in ({"fps": 2}, {"format": "jpg"}, {"size": 16}):
        with pytest.raises(
            DataError, match=r"extracted with --fps 4 --format png --size 0; .*another folder"
        ):
            extract_videos([source], target, ExtractSettings(**other))
    assert extract_videos([source], target, ExtractSettings(quality=50)) == (
        {"a": 8},
        {},
    )  # png has no quality
    extract_videos([source], f"{target}_jpg", ExtractSettings(format="jpg", quality=90))
    with pytest.raises(DataError, match=r"extracted with .*--format jpg --quality 90 --size 0; "):
        extract_videos([source], f"{target}_jpg", ExtractSettings(format="jpg"))
    (tmp_path / "frames" / RECORD).unlink()
    with pytest.raises(DataError, match=f"no record .{RECORD}. of their source"):
        extract_videos([source], target, ExtractSettings())


@pytest.mark.parametrize(
    "change",
    [{"fps": 0}, {"fps": float("nan")}, {"fps": float("inf")}]
    + [{"quality": 0}, {"quality": 101}, {"format": "gif"}, {"size": -1}],
)
def test_impossible_settings_are_refused_by_name(change):
    with pytest.raises(ValueError, match=f"--{next(iter(change))}"):
        ExtractSettings(**change)


def run_extract_video(*arguments):
    script = Path(__file__).resolve().parents[1] / "py_scripts" / "extract_video.py"
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_script_extracts_what_it_can_and_names_the_rest(tmp_path):
    write_video(tmp_path / "videos/good.mp4")
    intact = write_video(tmp_path / "videos/cut.mkv", seconds=20).read_bytes()
    (tmp_path / "videos/cut.mkv").write_bytes(intact[: len(intact) // 2])
    (tmp_path / "videos/empty.mov").write_bytes(b"")
    result = run_extract_video("-s", tmp_path / "videos", "-t", tmp_path / "frames")
    assert result.returncode == 1
    assert "8 frames of 1 videos" in result.stdout
    assert "cut.mkv: is truncated" in result.stderr
    assert "empty.mov: " in result.stderr
    assert {name[:10] for name in names_in(tmp_path / "frames")} == {"image_good"}


def test_the_script_reports_a_missing_folder_in_one_line(tmp_path):
    result = run_extract_video("-s", tmp_path / "nowhere", "-t", tmp_path / "frames")
    assert result.returncode == 1
    assert (
        result.stderr.strip() == f"error: {tmp_path / 'nowhere'}: no such file or folder; check -s"
    )


@real_media
def test_the_two_real_videos_give_four_frames_a_second(tmp_path):
    sources = [str(path) for path in MEDIA.glob("*.[mw][pe][4b]*")]
    frames, bad = extract_videos(sources, str(tmp_path), ExtractSettings(format="jpg", size=64))
    assert (sorted(frames.values()), bad) == ([52, 120], {})
