"""The settings of each subject, each field with its default and help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .flags import (
    CUDA_GRAPH_MODES,
    SR,
    Config,
    Floats,
    Ints,
    Texts,
    as_text,
    at_least,
    channel_multipliers,
    compile_mode,
    decimals,
    factors,
    flag,
    one_of,
    path,
    paths,
    positive,
    shares_of,
    sizes,
    stream_indices,
)

VIDEO_TYPES = ("2d+1d", "3d")
AUDIO_TYPES = ("1d", "linear")  # two published names of one convolution
SAMPLE_FNS = ("ddpm", "ddim", "dpm_solver", "dpm_solver++")
AUDIO_CODECS = ("flac", "aac")
PRECISIONS = ("fp32", "bf16", "fp16")
TASKS = {"joint": "", "video2audio": "video", "audio2video": "audio"}  # -> what is known
CONDITIONINGS = ("auto", "clean", "replacement")
NORM_KERNELS = ("auto", "triton", "torch")


@dataclass(frozen=True)
class ClipConfig(Config):
    """Size of a clip."""

    video_size: Ints = flag("20,3,64,64", "frames, channels, height, width of a clip", sizes(4))
    audio_size: Ints = flag("2,80000", "channels, samples of a clip", sizes(2))


@dataclass(frozen=True)
class ReadingConfig(Config):
    """Reading of video files."""

    video_fps: int = flag(4, "frames per second", positive)
    num_workers: int = flag(4, "files that are decoded side by side", at_least(0))
    antialias: bool = flag(False, "resize frames with antialiasing: better, but not as published")
    max_bad_share: float = flag(0.1, "stop if a larger share of the files is unusable", at_least(0))


@dataclass(frozen=True)
class ClipReadingConfig(ReadingConfig, ClipConfig):
    """Reading of clips."""

    audio_fps: int = flag(16000, "samples per second", positive)

    def check(self) -> None:
        if self.video_size[1] != 3 or self.audio_size[0] not in (1, 2):
            raise ValueError(
                f"clips are RGB, and stereo or mono: --video_size {as_text(self.video_size)} needs"
                f" C 3, --audio_size {as_text(self.audio_size)} C 2 or 1"
            )

    def duration_mismatch(self) -> str:
        """How the durations of video and audio differ, by more than half a frame; else empty."""
        video_seconds = self.video_size[0] / self.video_fps
        audio_seconds = self.audio_size[1] / self.audio_fps
        if abs(video_seconds - audio_seconds) * self.video_fps <= 0.5:
            return ""
        video = f"--video_size {as_text(self.video_size)} at --video_fps {self.video_fps}"
        audio = f"--audio_size {as_text(self.audio_size)} at --audio_fps {self.audio_fps}"
        return f"{video} lasts {video_seconds:g} s, but {audio} {audio_seconds:g} s"

    def check_durations(self) -> None:
        """ValueError, with flags that would fit, where video and audio differ in duration."""
        if mismatch := self.duration_mismatch():
            video_seconds = self.video_size[0] / self.video_fps
            channels, samples = self.audio_size
            audio_fps = f"--audio_fps {max(1, round(samples / video_seconds))}"
            fitting = max(1, round(video_seconds * self.audio_fps))
            audio_size = f"--audio_size {as_text((channels, fitting))}"
            raise ValueError(f"{mismatch}; set {audio_size} or {audio_fps}, or change the video's")


@dataclass(frozen=True)
class BatchConfig(Config):
    """Batches and randomness."""

    batch_size: int = flag(4, "clips per rank at a time", at_least(1))
    seed: int = flag(42, "of all randomness", at_least(0))


@dataclass(frozen=True)
class DeviceConfig(Config):
    """Devices and precision."""

    devices: str = flag("", "GPUs: empty (what is visible), G8 (up to 8 a host) or 0,1")


@dataclass(frozen=True)
class ComputeConfig(DeviceConfig):
    """Devices and precision."""

    precision: str = flag("", "fp32, bf16 or fp16; empty: as use_fp16", one_of(("", *PRECISIONS)))
    compile: str = flag(
        "auto",
        "compile the network first, for minutes: True (as one graph), blocks (each by itself),"
        " reduce-overhead, max-autotune or False; auto: on checked GPUs, for long runs",
        compile_mode,
    )
    norm_kernel: str = flag(
        "auto",
        "norms on GPUs: our Triton kernel if it works (auto), in any case (triton), or torch",
        one_of(NORM_KERNELS),
    )
    deterministic: bool = flag(
        False, "the same results every time on GPUs, as far as torch can; slower"
    )


@dataclass(frozen=True)
class NetworkConfig(Config):
    """What both networks have; the timestep embedding scales and shifts, or is added."""

    num_res_blocks: int = flag(2, "residual blocks per level", at_least(1))
    num_heads: int = flag(4, "heads of self-attention", at_least(1))
    num_heads_upsample: int = flag(
        -1, "heads on the way up, of the upsampler only; -1: num_heads", at_least(1, -1)
    )
    dropout: float = flag(0.0, "dropout in the residual blocks", at_least(0))
    class_cond: bool = flag(False, "condition on a class; not defined here")
    use_scale_shift_norm: bool = flag(
        True, "the timestep scales and shifts the second norm, else is added"
    )
    resblock_updown: bool = flag(
        True, "residual blocks change the resolution, else single convolutions"
    )
    use_checkpoint: bool = flag(
        False, "recompute activations: less memory, about a third more time"
    )
    checkpoint_resolutions: Ints = flag(
        "", "downsampling factors where use_checkpoint recomputes; empty: all", factors
    )
    use_fp16: bool = flag(False, "half precision: bfloat16 where the device has it, else float16")

    def check(self) -> None:
        if self.class_cond:
            raise ValueError(f"--{self.prefix}class_cond True: there are no classes")


@dataclass(frozen=True)
class ModelConfig(NetworkConfig, ClipConfig):
    """The coupled U-Net."""

    num_channels: int = flag(128, "width of the first level", at_least(1))
    num_head_channels: int = flag(
        64, "channels per head of cross-attention; -1: num_heads heads", at_least(1, -1)
    )
    channel_mult: Floats = flag("", "width of each level in num_channels; empty: by image size")
    cross_attention_resolutions: Ints = flag(
        "2,4,8", "downsampling factors with cross-attention", factors
    )
    cross_attention_windows: Ints = flag(
        "1,4,8", "windows of cross-attention in frames, one per factor", factors
    )
    cross_attention_shift: bool = flag(True, "shift the windows at random")
    cross_attention_rope: bool = flag(
        False, "rotate queries and keys of cross-attention by the time of their tokens"
    )
    video_attention_resolutions: Ints = flag(
        "2,4,8", "downsampling factors with spatial and temporal attention; -1: none", factors
    )
    audio_attention_resolutions: Ints = flag(
        "-1", "downsampling factors with audio self-attention; -1: none", factors
    )
    video_type: str = flag("2d+1d", "video convolutions: 2d+1d or 3d", one_of(VIDEO_TYPES))
    audio_type: str = flag("1d", "audio convolutions: 1d (linear is the same)", one_of(AUDIO_TYPES))

    @property
    def windows(self) -> dict[int, int]:
        """Downsampling factor -> window of its cross-attention, in frames."""
        windows = self.cross_attention_windows
        return dict(zip(self.cross_attention_resolutions, windows, strict=True))

    def check(self) -> None:
        super().check()
        if not self.resblock_updown:
            raise ValueError("--resblock_updown False: not defined for the base model")
        multipliers = channel_multipliers(self.channel_mult, self.video_size[3])
        object.__setattr__(self, "channel_mult", multipliers)
        windows, places = self.cross_attention_windows, self.cross_attention_resolutions
        num_frames, _, height, width = self.video_size
        if len(windows) != len(places) or max(windows, default=0) > num_frames:
            raise ValueError(
                f"--cross_attention_windows {as_text(windows)}: need one for each of the"
                f" cross_attention_resolutions {as_text(places)}, from 1 to {num_frames} frames"
            )
        stride, length = 2 ** (len(multipliers) - 1), self.audio_size[1]
        _require_multiple("video_size: height", height, stride, "channel_mult")
        _require_multiple("video_size: width", width, stride, "channel_mult")
        _require_multiple("audio_size: samples", length, stride**2, "channel_mult")
        if length < num_frames * stride**2:
            raise ValueError(
                f"--audio_size: {length} samples are too few for {num_frames} frames;"
                f" {num_frames * stride**2} is the least for this channel_mult"
            )


def _require_multiple(name: str, size: int, stride: int, flag: str) -> None:
    if size % stride:
        raise ValueError(f"--{name} {size} is not a multiple of {stride}, as {flag} needs")


@dataclass(frozen=True)
class ImageSizeConfig(Config):
    """Sizes of the upsampler's images."""

    large_size: int = flag(256, "side of the upsampled images, pixels", at_least(1))
    small_size: int = flag(64, "side of the low-res images, pixels", at_least(1))

    def check(self) -> None:
        if self.large_size % self.small_size:
            raise ValueError(
                f"--large_size {self.large_size} is not a multiple of small_size {self.small_size}"
            )


@dataclass(frozen=True)
class UpsamplerConfig(NetworkConfig, ImageSizeConfig):
    """The upsampler."""

    prefix = SR
    num_channels: int = flag(192, "width of the first level", at_least(1))
    num_head_channels: int = flag(-1, "channels per head; -1: sr_num_heads heads", at_least(1, -1))
    channel_mult: Floats = flag("", "width of each level in sr_num_channels; empty: by large_size")
    attention_resolutions: Ints = flag(
        "8,16,32", "downsampling factors with attention; -1: none", factors
    )
    sr_use_fp16: bool | None = flag(None, "use_fp16 of the upsampler; None: as use_fp16", kind=bool)

    def check(self) -> None:
        NetworkConfig.check(self)
        ImageSizeConfig.check(self)
        multipliers = channel_multipliers(self.channel_mult, self.large_size, SR)
        object.__setattr__(self, "channel_mult", multipliers)
        stride = 2 ** (len(multipliers) - 1)
        _require_multiple("large_size", self.large_size, stride, "sr_channel_mult")

    @property
    def half_precision(self) -> bool:
        """Whether the upsampler runs in half precision."""
        return self.use_fp16 if self.sr_use_fp16 is None else self.sr_use_fp16

    def heads(self, channels: int, way: str) -> int:
        """Heads of the attention at this width, on the way "down" or "up"."""
        if self.num_head_channels != -1:
            return channels // self.num_head_channels
        if way == "up" and self.num_heads_upsample != -1:
            return self.num_heads_upsample
        return self.num_heads


@dataclass(frozen=True)
class FilesConfig(ReadingConfig, BatchConfig):
    """Files on disk."""

    data_dir: str = flag("", "folders of data, searched recursively")
    random_flip: bool = flag(True, "mirror half of the data, stereo included")
    cache_dir: str = flag("", "local folder for decoded data; empty: decode every time")


@dataclass(frozen=True)
class FrameDataConfig(FilesConfig, ImageSizeConfig):
    """Images on disk."""


@dataclass(frozen=True)
class DataConfig(FilesConfig, ClipReadingConfig):
    """Clips on disk."""

    clip_stride: int = flag(1, "frames between the windows of a long file", positive)
    video_stream: int | None = flag(None, "index of the video stream; None: the best", kind=int)
    audio_stream: int | Ints | None = flag(
        None,
        "index of the audio stream; None: the best; 1,2: mono streams for left and right",
        stream_indices,
        kind=str,
    )


@dataclass(frozen=True)
class TrainConfig(ComputeConfig, BatchConfig):
    """The trainer."""

    schedule_sampler: str = flag("uniform", "timesteps to train on: uniform or loss-second-moment")
    lr: float = flag(2e-4, "learning rate", at_least(0))
    weight_decay: float = flag(0.0, "of AdamW", at_least(0))
    lr_anneal_steps: int = flag(
        0, "anneal lr linearly to 0 over this many steps and stop; 0: constant", at_least(0)
    )
    lr_warmup_steps: int = flag(0, "raise lr linearly over this many steps", at_least(0))
    grad_clip: float = flag(0.0, "largest gradient norm; 0: no limit", at_least(0))
    microbatch: int = flag(-1, "clips per forward pass; -1: batch_size")
    ema_rate: Texts = flag(
        "0.9999", "rates of the moving averages of the weights, with commas between", decimals
    )
    fp16_scale_growth: float = flag(1e-3, "growth of log2(loss scale) per good step")
    log_interval: int = flag(100, "steps between rows of the log", at_least(1))
    save_interval: int = flag(10000, "steps between checkpoints", at_least(1))
    output_dir: str = flag(
        "", "folder of checkpoints, log and previews; a run in it is resumed", path
    )
    max_steps: int = flag(0, "stop after this many steps in all; 0: no limit", at_least(0))
    max_hours: float = flag(0.0, "save and stop after this many hours; 0: no limit", at_least(0))
    max_skipped_steps: int = flag(
        20, "stop after more non-finite gradients than this in a row", at_least(0)
    )
    keep_last: int = flag(0, "states to keep, the newest; 0: all", at_least(0))
    keep_every: int = flag(0, "keep multiples of this many steps as well; 0: none", at_least(0))
    resume_checkpoint: str = flag(
        "", "modelNNNNNN.pt or folder, if output_dir holds no run; none: refuse to resume", path
    )
    init_checkpoint: str = flag(
        "", "weights to start a new run from; mismatched tensors are listed", path
    )
    sample_fn: str = flag("dpm_solver", "sampler of the previews", one_of(SAMPLE_FNS))
    preview_clips: int = flag(
        1, "clips or images that each of 8 ranks samples at every save; 0: none", at_least(0)
    )
    save_type: str = flag(
        "mp4", "files of the previews: mp4, or wav for the audio alone", one_of(("mp4", "wav"))
    )
    use_db: bool = flag(False, "log to Weights & Biases as well")
    use_tensorboard: bool = flag(False, "log to TensorBoard as well")

    def check(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is empty: name the folder of the checkpoints")
        if self.compile in CUDA_GRAPH_MODES and 0 < self.microbatch < self.batch_size:
            raise ValueError(
                f"--microbatch {self.microbatch}: a CUDA graph's gradients do not outlive the next"
                " microbatch; set --compile True"
            )


@dataclass(frozen=True)
class JointTrainConfig(TrainConfig):
    """The trainer of the joint model."""

    task_mix: dict[str, float] = flag(
        "joint",
        "shares of clips to learn both modalities of, or one from the other, such as"
        " joint:0.5,video2audio:0.25,audio2video:0.25",
        shares_of(TASKS),
    )
    val_dir: str = flag("", "held-out clips to measure coupling and loss on; empty: val_share")
    val_share: float = flag(
        0.02, "share of the files of data_dir to hold out, if that is 4 or more", at_least(0)
    )

    def check(self) -> None:
        super().check()
        if self.val_share >= 1:
            raise ValueError(f"--val_share {self.val_share}: need a share below 1 to train on")

    @property
    def held_out_share(self) -> float:
        """Of the files of data_dir: none with a val_dir."""
        return 0.0 if self.val_dir else self.val_share


@dataclass(frozen=True)
class SamplerConfig(Config):
    """The sampler; 0 and empty leave the sampler's own settings."""

    sample_fn: str = flag("dpm_solver++", ", ".join(SAMPLE_FNS), one_of(SAMPLE_FNS))
    sample_steps: int = flag(0, "model evaluations of dpm_solver", at_least(0))
    solver_order: int = flag(0, "order of dpm_solver, 1 to 3", at_least(0))
    solver_method: str = flag("", "singlestep, singlestep_fixed, multistep or adaptive")
    skip_type: str = flag("", "time_uniform, logSNR or time_quadratic")

    def solver_settings(self) -> dict[str, Any]:
        """Settings of DPMSolver.sample that replace the sampler's own."""
        settings = {
            "steps": self.sample_steps,
            "order": self.solver_order,
            "method": self.solver_method,
            "skip_type": self.skip_type,
        }
        return {name: value for name, value in settings.items() if value}


@dataclass(frozen=True)
class SRSamplerConfig(SamplerConfig):
    """The sampler of the upsampler."""

    prefix = SR
    sample_fn: str = flag("ddim", ", ".join(SAMPLE_FNS), one_of(SAMPLE_FNS))


@dataclass(frozen=True)
class SamplingConfig(ComputeConfig, BatchConfig):
    """Sampling from checkpoints of the joint model."""

    multimodal_model_path: str = flag(
        "", "checkpoint, several with commas, or a folder (its newest EMA)", paths
    )
    output_dir: str = flag("", "folder of original/, audios/ and sr_mp4/", path)
    all_save_num: int = flag(96, "clips to generate, over all ranks", at_least(1))
    clip_denoised: bool = flag(True, "clamp predicted clips to [-1, 1] (ddpm, ddim)")
    audio_codec: str = flag(
        "flac", "audio of mp4 files: flac, exact; aac for players without it", one_of(AUDIO_CODECS)
    )
    is_strict: bool = flag(True, "refuse mismatched tensors; False: skip and list them")
    gallery: bool = flag(True, "write output_dir/index.html, which shows the clips")

    def check(self) -> None:
        if not self.output_dir:
            raise ValueError("--output_dir is empty: name the folder of the clips")
        if "://" in self.output_dir:
            raise ValueError(f"--output_dir {self.output_dir}: clips go to local folders only")


@dataclass(frozen=True)
class UpsamplingConfig(Config):
    """Upsampling of generated clips."""

    sr_model_path: str = flag("", "checkpoint of the upsampler, or a folder; empty: none", path)
    sr_batch_size: int = flag(0, "frames in the upsampler at a time; 0: what fits", at_least(0))
    load_noise: str = flag("", "file.npy with its noise [3, large_size, large_size]")


@dataclass(frozen=True)
class CrossModalConfig(Config):
    """Generating one modality from the other."""

    classifier_scale: float = flag(0.0, "guidance (ddpm, ddim); 0: none", at_least(0))
    conditioning: str = flag(
        "auto",
        "how the conditioning modality goes in: clean, or replacement with noise of each step's"
        " level; auto: clean if the checkpoint was trained so",
        one_of(CONDITIONINGS),
    )

    def check(self) -> None:
        if self.conditioning == "clean" and self.classifier_scale:
            raise ValueError(
                f"--classifier_scale {self.classifier_scale}: guidance goes with --conditioning"
                " replacement; leave one of them out"
            )
