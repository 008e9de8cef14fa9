"""Clips that are spoiled on purpose: what metrics should notice, and what they should not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch as th

from ..data import images
from .clips import Clip

IMAGE_NOISE = 0.2  # standard deviation, of frames in [-1, 1]
DARKER = 0.6  # share of the brightness that is left
Frames = Callable[[th.Tensor], th.Tensor]  # [F, 3, H, W] in [-1, 1] -> the same shape
Audio = Callable[[th.Tensor], th.Tensor]  # [2, L] -> the same shape


def mirror_frames(frames: th.Tensor) -> th.Tensor:
    """Left and right of the image swapped."""
    return frames.flip(-1)


def swap_channels(audio: th.Tensor) -> th.Tensor:
    """Left and right channel swapped."""
    return audio.flip(0)


def make_mono(audio: th.Tensor) -> th.Tensor:
    """The mean of both channels in each."""
    return audio.mean(dim=0, keepdim=True).expand(2, -1).contiguous()


def add_image_noise(frames: th.Tensor) -> th.Tensor:
    """White noise that differs from frame to frame; the same in every call."""
    generator = th.Generator().manual_seed(0)
    return (frames + IMAGE_NOISE * th.randn(frames.shape, generator=generator)).clamp(-1, 1)


def add_audio_noise(audio: th.Tensor) -> th.Tensor:
    """White noise as strong as the audio, another in each channel; the same in every call."""
    generator = th.Generator().manual_seed(0)
    noise = th.randn(audio.shape, generator=generator)
    return (audio + audio.square().mean().sqrt() * noise).clamp(-1, 1)


def darken(frames: th.Tensor) -> th.Tensor:
    """Brightness, from black on, times 0.6."""
    return (frames + 1) * DARKER - 1


def reverse_frames(frames: th.Tensor) -> th.Tensor:
    """The last frame first."""
    return frames.flip(0)


def reverse_audio(audio: th.Tensor) -> th.Tensor:
    """The last sample first."""
    return audio.flip(-1)


def keep(x: th.Tensor) -> th.Tensor:
    """Unchanged."""
    return x


@dataclasses.dataclass(frozen=True)
class Change:
    """What is done to a clip; `delay_frames` is by how much the audio is late, cyclically."""

    frames: Frames = keep
    audio: Audio = keep
    delay_frames: int = 0
    has_other_audio: bool = False  # that of another clip


CHANGES = {
    "unchanged": Change(),
    "image mirrored": Change(frames=mirror_frames),
    "channels swapped": Change(audio=swap_channels),
    "both mirrored": Change(frames=mirror_frames, audio=swap_channels),
    "audio 1 frame late": Change(delay_frames=1),
    "audio 4 frames late": Change(delay_frames=4),
    "mono": Change(audio=make_mono),
    "other audio": Change(has_other_audio=True),
    "image noise": Change(frames=add_image_noise),
    "audio noise": Change(audio=add_audio_noise),
    "darker": Change(frames=darken),
    "time reversed": Change(frames=reverse_frames, audio=reverse_audio),
}


@dataclasses.dataclass(frozen=True)
class ChangedClip(Clip):
    """A clip under a change, at whatever rate and size it is read."""

    true: Clip
    other: Clip  # whose audio it has
    change: Change

    def frames_at(self, fps: float, num_frames: int) -> th.Tensor:
        return self.change.frames(self.true.frames_at(fps, num_frames))

    def audio_at(self, sample_rate: int, num_samples: int) -> th.Tensor:
        return self._changed_audio(self.other.audio_at(sample_rate, num_samples), sample_rate)

    def original_frames(self) -> Iterator[th.Tensor]:
        frames = th.stack([*self.true.original_frames()])
        yield from images.to_uint8(self.change.frames(images.to_float(frames)))

    def _changed_audio(self, audio: th.Tensor, sample_rate: int) -> th.Tensor:
        delay = round(self.change.delay_frames / self.fps * sample_rate)
        return self.change.audio(audio.roll(delay, dims=-1))


def change_clip(true: Clip, other: Clip, change: Change) -> Clip:
    """The clip under a change; `other` is the clip whose audio it may get."""
    other = other if change.has_other_audio else true
    fields = {field.name: getattr(true, field.name) for field in dataclasses.fields(Clip)}
    clip = ChangedClip(**fields, true=true, other=other, change=change)
    audio = clip._changed_audio(other.audio, clip.sample_rate)
    return dataclasses.replace(clip, video=change.frames(true.video), audio=audio)
