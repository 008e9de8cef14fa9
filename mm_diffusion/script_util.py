"""Configuration: frozen dataclasses -> command-line flags -> networks and diffusions."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from . import gaussian_diffusion as gd
from .dist_util import end_job
from .respace import SpacedDiffusion, space_timesteps
from .unet import (
    AUDIO_TYPES,
    VIDEO_CONVS,
    ImageSuperResModel,
    MultimodalUNet,
    UNetConfig,
    UpsamplerConfig,
    check_factor,
)

Config = TypeVar("Config")

SR = "sr_"  # how flags of the upsampler begin
DEFAULT_CHANNEL_MULT = {64: "1,2,3,4", 128: "1,1,2,3,4", 256: "1,1,2,2,4,4", 512: "0.5,1,1,2,2,4,4"}
SR_CHANNEL_MULT = DEFAULT_CHANNEL_MULT | {512: DEFAULT_CHANNEL_MULT[256]}


def flag(default: Any, text: str) -> Any:
    """A field of a config with its help text; the field's type is the flag's."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The coupled U-Net."""

    video_size: str = flag("20,3,64,64", "frames, channels, height, width of a clip")
    audio_size: str = flag("2,80000", "channels, samples of a clip")
    num_channels: int = flag(128, "width of the first level")
    num_res_blocks: int = flag(2, "residual blocks per level")
    channel_mult: str = flag(
        "", "width of each level, in num_channels; empty: what the picture size calls for"
    )
    num_heads: int = flag(4, "heads of self-attention")
    num_head_channels: int = flag(64, "channels per head of cross-attention; -1: num_heads heads")
    num_heads_upsample: int = flag(-1, "read by the upsampler only")
    cross_attention_resolutions: str = flag("2,4,8", "downsample rates with cross-attention")
    cross_attention_windows: str = flag("1,4,8", "its windows in frames, one per rate")
    cross_attention_shift: bool = flag(True, "shift the windows at random")
    video_attention_resolutions: str = flag(
        "2,4,8", "downsample rates with spatial and temporal attention; -1: none"
    )
    audio_attention_resolutions: str = flag(
        "-1", "downsample rates with audio self-attention; -1: none"
    )
    dropout: float = flag(0.0, "dropout in the residual blocks")
    use_checkpoint: bool = flag(
        False, "recompute activations for the gradient: less memory, a third more time"
    )
    checkpoint_resolutions: str = flag("", "rates at which use_checkpoint recomputes; empty: all")
    use_scale_shift_norm: bool = flag(
        True, "the timestep scales and shifts the second norm, else is added before it"
    )
    resblock_updown: bool = flag(
        True, "residual blocks change the resolution; the only way the base model is defined"
    )
    video_type: str = flag("2d+1d", "video convolutions: 2d+1d or 3d")
    audio_type: str = flag("1d", "audio convolutions: 1d (linear is the same)")
    class_cond: bool = flag(False, "condition on a class; not defined for clips")
    use_fp16: bool = flag(
        False, "mixed precision: bfloat16 where the device has it, else float16 with a loss scale"
    )


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process."""

    learn_sigma: bool = flag(False, "learn the variances")
    diffusion_steps: int = flag(1000, "steps of the process")
    noise_schedule: str = flag("linear", "linear or cosine")
    timestep_respacing: str = flag(
        "", "steps to sample with: ddimN, N or sections such as 10,15,20; empty: all"
    )
    use_kl: bool = flag(False, "train on the variational bound")
    predict_xstart: bool = flag(False, "predict the clip instead of the noise")
    rescale_timesteps: bool = flag(False, "give the model timesteps scaled to 0..1000")
    rescale_learned_sigmas: bool = flag(
        False, "scale the bound by steps/1000 beside the squared error"
    )


@dataclasses.dataclass(frozen=True)
class SRModelConfig:
    """The upsampler."""

    large_size: int = flag(256, "side of the pictures the upsampler makes, in pixels")
    small_size: int = flag(64, "side of the pictures it is given")
    sr_num_channels: int = flag(192, "width of its first level")
    sr_num_res_blocks: int = flag(2, "residual blocks per level")
    sr_channel_mult: str = flag(
        "", "width of each level, in sr_num_channels; empty: what large_size calls for"
    )
    sr_num_heads: int = flag(4, "heads of its attention")
    sr_num_head_channels: int = flag(-1, "channels per head; -1: sr_num_heads heads")
    sr_num_heads_upsample: int = flag(-1, "heads on the way up; -1: as on the way down")
    sr_attention_resolutions: str = flag("8,16,32", "downsample rates with attention; -1: none")
    sr_dropout: float = flag(0.0, "dropout in its residual blocks")
    sr_class_cond: bool = flag(False, "condition on a class; not defined for frames")
    sr_use_scale_shift_norm: bool = flag(True, "the timestep scales and shifts the second norm")
    sr_resblock_updown: bool = flag(
        True, "residual blocks change the resolution, else single convolutions"
    )
    use_checkpoint: bool = flag(
        False, "recompute activations for the gradient: less memory, a third more time"
    )
    checkpoint_resolutions: str = flag("", "rates at which use_checkpoint recomputes; empty: all")
    use_fp16: bool = flag(
        False, "mixed precision: bfloat16 where the device has it, else float16 with a loss scale"
    )
    sr_use_fp16: bool | None = flag(None, "use_fp16 for the upsampler; None: as use_fp16")


SRDiffusionConfig = dataclasses.make_dataclass(
    "SRDiffusionConfig",
    [
        (
            SR + f.name,
            f.type,
            flag(
                True if f.name == "learn_sigma" else f.default, f"upsampler: {f.metadata['help']}"
            ),
        )
        for f in dataclasses.fields(DiffusionConfig)
    ],
    frozen=True,
)


def _names(*configs: type, but: Collection[str] = ()) -> tuple[str, ...]:
    return tuple(
        f.name for c in configs for f in dataclasses.fields(c) if f.name.removeprefix(SR) not in but
    )


# What a checkpoint was trained as: a flag that says otherwise is a mistake. The rest may change from run to run.
FREE_FLAGS = {
    "dropout",
    "use_checkpoint",
    "checkpoint_resolutions",
    "use_fp16",
    "timestep_respacing",
    "use_kl",
    "rescale_learned_sigmas",
}
TRAINED_FLAGS = _names(ModelConfig, DiffusionConfig, but=FREE_FLAGS)
SR_TRAINED_FLAGS = _names(SRModelConfig, SRDiffusionConfig, but=FREE_FLAGS)
# What a checkpoint tells a later run that was not told otherwise, beside these.
CARRIED_TOO = ("dropout", "use_kl", "rescale_learned_sigmas")
CARRIED_FLAGS = (*TRAINED_FLAGS, *CARRIED_TOO, "video_fps", "audio_fps")
SR_CARRIED_FLAGS = (*SR_TRAINED_FLAGS, *(SR + name for name in CARRIED_TOO))


@dataclasses.dataclass(frozen=True)
class FilesConfig:
    """Files on disk."""

    data_dir: str = flag("", "folder of training data, searched below; several with commas")
    num_workers: int = flag(4, "processes that decode; 0: decode between the steps")
    video_fps: int = flag(4, "frames per second to take from videos")
    random_flip: bool = flag(True, "mirror half of the data, pictures and stereo channels together")
    max_bad_share: float = flag(
        0.1, "refuse to start when more than this share of the files is unusable"
    )
    cache_dir: str = flag(
        "", "local folder where what was decoded is kept; empty: decode every time"
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(FilesConfig):
    """Clips on disk."""

    audio_fps: int = flag(16000, "samples per second of a clip")
    clip_stride: int = flag(1, "frames between the windows of a long file")
    video_stream: int | None = flag(
        None, "number of the video stream in every file; None: the best"
    )
    audio_stream: int | None = flag(
        None, "number of the audio stream in every file; None: the best"
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The trainer."""

    schedule_sampler: str = flag(
        "uniform", "how timesteps are drawn: uniform or loss-second-moment"
    )
    lr: float = flag(2e-4, "learning rate")
    weight_decay: float = flag(0.0, "of AdamW")
    lr_anneal_steps: int = flag(
        0, "go linearly to 0 over this many steps and stop; 0: constant, no end"
    )
    lr_warmup_steps: int = flag(0, "raise the learning rate linearly over this many steps")
    grad_clip: float = flag(0.0, "largest gradient norm; 0: no limit")
    batch_size: int = flag(4, "clips per rank and step")
    microbatch: int = flag(-1, "clips per forward pass; -1: batch_size")
    ema_rate: str = flag("0.9999", "rate of the moving average of the weights; several with commas")
    seed: int = flag(42, "of all randomness")
    fp16_scale_growth: float = flag(1e-3, "growth of log2 of the float16 loss scale per good step")
    log_interval: int = flag(100, "steps between rows of the log")
    save_interval: int = flag(10000, "steps between checkpoints")
    output_dir: str = flag(
        "", "where checkpoints, log and previews go; a run that is there already goes on"
    )
    max_steps: int = flag(0, "stop after this many steps in all; 0: no limit")
    max_hours: float = flag(0.0, "save and stop after this many hours of this run; 0: no limit")
    max_skipped_steps: int = flag(
        20, "give up when more gradients than this in a row are not finite"
    )
    precision: str = flag("", "fp32, bf16 or fp16; empty: as use_fp16 says")
    compile: str = flag(
        "False",
        "compile the network first, which takes minutes: True, reduce-overhead or max-autotune",
    )
    keep_last: int = flag(0, "states to keep, the newest; 0: all")
    keep_every: int = flag(0, "keep those at multiples of this many steps as well; 0: none")
    resume_checkpoint: str = flag(
        "",
        "modelNNNNNN.pt, or a folder, to go on from; empty or auto: output_dir if it holds a run; none: start anew",
    )
    init_checkpoint: str = flag(
        "", "weights to start a new run from; tensors that do not fit are listed and left out"
    )
    sample_fn: str = flag("dpm_solver", "sampler of the previews")
    preview_clips: int = flag(
        1, "clips or pictures that each rank draws from the EMA at every save; 0: none"
    )
    save_type: str = flag("mp4", "of the previews: mp4, or wav for the sound alone")
    use_db: bool = flag(False, "log to Weights and Biases as well")
    use_tensorboard: bool = flag(False, "log to TensorBoard as well")
    devices: str = flag("", "GPUs: empty (what is visible), G8 (8 a host) or a list such as 0,1")


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    """Sampling from a checkpoint of the joint model."""

    multimodal_model_path: str = flag(
        "", "checkpoint, several with commas, or a folder (its newest EMA)"
    )
    output_dir: str = flag(
        "", "where original/ (mp4), audios/ (wav) and sr_mp4/ (upsampled mp4) go"
    )
    sample_fn: str = flag("dpm_solver++", "ddpm, ddim, dpm_solver or dpm_solver++")
    all_save_num: int = flag(96, "clips to draw, over all ranks")
    batch_size: int = flag(4, "clips per rank at a time")
    seed: int = flag(42, "clip k depends on (seed, k) only")
    precision: str = flag("", "fp32, bf16 or fp16; empty: as use_fp16 says")
    compile: str = flag(
        "False",
        "compile the network first, which takes minutes: True, reduce-overhead or max-autotune",
    )
    clip_denoised: bool = flag(True, "clamp predicted clips to [-1, 1] (ddpm, ddim)")
    is_strict: bool = flag(
        True, "refuse a checkpoint with misfitting tensors; False: skip and list them"
    )
    sample_steps: int = flag(0, "model evaluations of dpm_solver; 0: the sampler's own")
    solver_order: int = flag(0, "order of dpm_solver, 1 to 3; 0: the sampler's own")
    solver_method: str = flag(
        "", "singlestep, singlestep_fixed, multistep or adaptive; empty: the sampler's own"
    )
    skip_type: str = flag("", "time_uniform, logSNR or time_quadratic; empty: the sampler's own")
    gallery: bool = flag(True, "write output_dir/index.html, which shows the clips")
    devices: str = flag("", "GPUs: empty (what is visible), G8 (8 a host) or a list such as 0,1")


@dataclasses.dataclass(frozen=True)
class SampleConfig(DrawConfig):
    """The same, and upsampling what was drawn."""

    sr_model_path: str = flag(
        "", "checkpoint of the upsampler, or a folder (its newest EMA); empty: no upsampling"
    )
    sr_sample_fn: str = flag(
        "ddim", "sampler of the upsampler: ddpm, ddim, dpm_solver or dpm_solver++"
    )
    sr_batch_size: int = flag(0, "frames in the upsampler at a time; 0: what fits in memory")
    sr_sample_steps: int = flag(0, "model evaluations of its dpm_solver; 0: the sampler's own")
    sr_solver_order: int = flag(0, "order of its dpm_solver; 0: the sampler's own")
    sr_solver_method: str = flag("", "method of its dpm_solver; empty: the sampler's own")
    sr_skip_type: str = flag("", "steps of its dpm_solver; empty: the sampler's own")
    load_noise: str = flag(
        "", "file.npy with the noise picture [3, large_size, large_size] of the upsampler"
    )


@dataclasses.dataclass(frozen=True)
class GivenConfig:
    """Generating one modality to fit the other."""

    classifier_scale: float = flag(
        0.0, "how strongly the given modality guides the other (ddpm, ddim); 0: no guidance"
    )


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """What clips are compared with, and by what."""

    ref_path: str = flag(
        "", "folder of true clips that generated ones are compared with; several with commas"
    )
    i3d_path: str = flag("", "TorchScript I3D, for FVD and KVD")
    audio_embedding_path: str = flag("", "TorchScript audio embedding, for FAD")
    audio_embedding_input: str = flag(
        "logmel", "what it takes: logmel (patches as for VGGish) or waveform (16 kHz)"
    )
    detector_path: str = flag("", "weights of the detector, whose boxes Spatial AV-Align takes")
    detector: str = flag("fasterrcnn_resnet50_fpn_v2", "detector of torchvision.models.detection")
    boxes_dir: str = flag(
        "", "instead of a detector: folder of CLIP.csv with frame,category,x0,y0,x1,y1 (256 pixels)"
    )
    events_dir: str = flag(
        "", "folder of CLIP.csv with frame,category,x (10 Hz); empty: located in the sound"
    )
    match_categories: bool = flag(False, "boxes count only for events of their own category")


@dataclasses.dataclass(frozen=True)
class EvalConfig(MetricsConfig):
    """Evaluation of a folder of clips."""

    samples_path: str = flag(
        "", "folder of clips to evaluate; several with commas, which count as one"
    )
    output_dir: str = flag("", "where metrics.json goes; empty: samples_path")
    video_size: str = flag("20,3,64,64", "frames, channels, height, width that clips are read at")
    audio_size: str = flag("2,80000", "channels, samples of a clip")
    video_fps: int = flag(4, "frames per second")
    audio_fps: int = flag(16000, "samples per second")
    num_workers: int = flag(4, "clips that each rank looks at side by side")
    max_bad_share: float = flag(
        0.1, "refuse to go on when more than this share of the files is unusable"
    )
    devices: str = flag("", "GPUs: empty (what is visible), G8 (8 a host) or a list such as 0,1")


# Published flags that are accepted where nothing reads them, so that launchers full of them go on working, and why.
WITHOUT_EFFECT = {
    "t_lr": "nor had it in the published code",
    "frame_gap": "nor had it in the published code",
    "ref_path": "this script computes no metrics",
    "save_type": "this script writes clips as mp4 and their sound as wav",
    "classifier_scale": "this script generates no modality from the other",
    **dict.fromkeys(_names(SRModelConfig, SRDiffusionConfig), "this script has no upsampler"),
    **dict.fromkeys(
        ("sr_model_path", "sr_sample_fn", "load_noise"), "this script upsamples no clips"
    ),
}

# ---------------------------------------------------------------- flags


class FlagError(argparse.ArgumentTypeError, ValueError):
    """A value that a flag cannot take; argparse shows its text as it is."""


def to_bool(text: str | bool) -> bool:
    """True/False, 1/0, yes/no in any case."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if str(text).lower() not in known:
        raise FlagError(f"{text!r} is neither True nor False")
    return known[str(text).lower()]


def optional(kind: Callable) -> Callable:
    """`kind`, but None passes, and "None" is None."""
    return lambda text: None if text is None or str(text) == "None" else kind(text)


CONVERT: dict[Any, Callable] = {"bool": to_bool, "int": int, "float": float, "str": str}
CONVERT |= {"int | None": optional(int), "bool | None": optional(to_bool)}


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line and leaves with status 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        end_job(f"error: {message} (--help lists the flags)", status=2)


def parse(
    description: str, *configs: type, defaults: Mapping[str, Any] | None = None
) -> tuple[dict, set[str]]:
    """The command line -> values of all fields of `configs` and the names that were given explicitly.

    A later config may repeat a field of an earlier one and then owns it; `defaults` replace those of the fields.
    """
    parser = Parser(description=description)
    fields = {f.name: f for config in configs for f in dataclasses.fields(config)}
    values = {name: f.default for name, f in fields.items()} | dict(defaults or {})
    for name, f in fields.items():
        kind = CONVERT[f.type]
        text = f"{f.metadata['help']} (default: {values[name]!r})".replace("%", "%%")
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=argparse.SUPPRESS,
            metavar=f.type.split()[0].upper(),
            help=text,
        )
    for name in WITHOUT_EFFECT.keys() - fields.keys():
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help="accepted, no effect")
    given = vars(parser.parse_args())
    return values | given, set(given)


def pick(config: type[Config], values: Mapping[str, Any]) -> Config:
    """The config made of those of `values` that are its fields."""
    return config(**{f.name: values[f.name] for f in dataclasses.fields(config)})  # type: ignore[arg-type]


def notes_on(given: set[str], *configs: type) -> list[str]:
    """What to tell about flags that were given to a script that has `configs`."""
    idle = given - set(_names(*configs))
    return [
        f"--{name} has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if name in idle
    ]


def merge_checkpoint_flags(
    values: dict,
    given: set[str],
    trained: Mapping[str, Any],
    path: str,
    carried: Collection[str] = CARRIED_FLAGS,
) -> dict:
    """Flags that a checkpoint carries take the place of defaults; ValueError where one given explicitly contradicts.

    `carried`: CARRIED_FLAGS of the joint model, or SR_CARRIED_FLAGS.
    """
    for name in sorted(given & set(trained) & set(carried) & {*TRAINED_FLAGS, *SR_TRAINED_FLAGS}):
        if _normal(name, values[name], values | dict(trained)) != _normal(
            name, trained[name], values | dict(trained)
        ):
            raise ValueError(
                f"--{name} {values[name]} contradicts {path}, trained with {trained[name]}: leave the flag out"
            )
    return values | {
        name: trained[name] for name in carried if name in trained and name not in given
    }


def _normal(name: str, value: Any, values: Mapping[str, Any]) -> Any:
    """What a flag's value means, so that two ways to write it compare equal."""
    text = str(value).replace(" ", "")
    if name == "channel_mult":
        return channel_multipliers(text, numbers("video_size", values["video_size"], 4)[3])
    if name == "sr_channel_mult":
        return channel_multipliers(text, int(values["large_size"]), SR)
    return (
        AUDIO_TYPES[0] if name == "audio_type" else text
    )  # its values are names of one convolution


# ---------------------------------------------------------------- factories


def _defaults(*configs: type) -> dict[str, Any]:
    return {f.name: f.default for config in configs for f in dataclasses.fields(config)}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the joint model and its diffusion with their defaults."""
    return _defaults(ModelConfig, DiffusionConfig)


def create_model_and_diffusion(**flags: Any) -> tuple[MultimodalUNet, SpacedDiffusion]:
    """Flags as on the command line (strings or numbers; those left out have their defaults) -> model, diffusion.

    ValueError, naming the flag, for an unknown flag or an impossible value.
    """
    values = _typed(flags, ModelConfig, DiffusionConfig)
    diffusion = create_diffusion(pick(DiffusionConfig, values))
    return create_model(pick(ModelConfig, values), learn_sigma=values["learn_sigma"]), diffusion


def image_sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Flags of the upsampler and its diffusion with their defaults."""
    return _defaults(SRModelConfig, SRDiffusionConfig)


def image_sr_create_model_and_diffusion(**flags: Any) -> tuple[ImageSuperResModel, SpacedDiffusion]:
    """Flags as on the command line, or without their "sr_" -> upsampler, diffusion; errors as of the joint model."""
    known = image_sr_model_and_diffusion_defaults()
    renamed = {
        SR + name if name not in known and SR + name in known else name: v
        for name, v in flags.items()
    }
    if len(renamed) < len(flags):
        raise ValueError(
            f"{', '.join(sorted(n for n in flags if SR + n in flags))}: given with and without {SR}"
        )
    flags = renamed
    values = _typed(flags, SRModelConfig, SRDiffusionConfig)
    process = sr_process(values)
    try:
        diffusion = create_diffusion(process)
    except ValueError as error:
        raise ValueError(f"upsampler ({SR} flags): {error}") from None
    return create_upsampler(pick(SRModelConfig, values), learn_sigma=process.learn_sigma), diffusion


def sr_process(values: Mapping[str, Any]) -> DiffusionConfig:
    """The upsampler's diffusion process."""
    return DiffusionConfig(
        **{f.name: values[SR + f.name] for f in dataclasses.fields(DiffusionConfig)}
    )


def sr_half(values: Mapping[str, Any]) -> bool:
    """Whether the upsampler runs in half precision."""
    return values["use_fp16"] if values["sr_use_fp16"] is None else values["sr_use_fp16"]


def _typed(flags: Mapping[str, Any], *configs: type) -> dict[str, Any]:
    """All fields of `configs`, those in `flags` converted to their types."""
    kinds = {f.name: f.type for config in configs for f in dataclasses.fields(config)}
    unknown = sorted(set(flags) - set(kinds))
    if unknown:
        raise ValueError(
            f"unknown flag {unknown[0]!r}: the model and diffusion flags are {', '.join(sorted(kinds))}"
        )
    values = _defaults(*configs)
    for name, value in flags.items():
        if isinstance(value, (tuple, list)):
            value = ",".join(map(str, value))
        try:
            values[name] = CONVERT[kinds[name]](value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} {value!r}: need a value of type {kinds[name]}") from None
    return values


def create_model(config: ModelConfig, learn_sigma: bool = False) -> MultimodalUNet:
    """The coupled U-Net; ValueError, naming the flag, for what it cannot be."""
    if config.class_cond:
        raise ValueError("class_cond True: clips have no classes; leave it False")
    if not config.resblock_updown:
        raise ValueError("resblock_updown False: not defined for the base model; leave it True")
    if config.video_type not in VIDEO_CONVS or config.audio_type not in AUDIO_TYPES:
        raise ValueError(
            f"video_type {config.video_type!r}, audio_type {config.audio_type!r}: "
            f"choose from {', '.join(VIDEO_CONVS)} and {', '.join(AUDIO_TYPES)}"
        )
    video_size = numbers("video_size", config.video_size, 4)
    audio_size = numbers("audio_size", config.audio_size, 2)
    widths = channel_multipliers(config.channel_mult, video_size[3])
    own: dict[str, Any] = {
        "video_size": video_size,
        "audio_size": audio_size,
        "channel_mult": widths,
    }
    return MultimodalUNet(**_options(UNetConfig, config, learn_sigma=learn_sigma, **own))


def create_upsampler(config: SRModelConfig, learn_sigma: bool = True) -> ImageSuperResModel:
    """guided-diffusion's upsampler; ValueError, naming the flag, for what it cannot be."""
    if config.sr_class_cond:
        raise ValueError("sr_class_cond True: frames have no classes; leave it False")
    check_factor(config.large_size, config.small_size)
    widths = channel_multipliers(config.sr_channel_mult, config.large_size, SR)
    own = {"channel_mult": widths, "learn_sigma": learn_sigma}
    return ImageSuperResModel(**_options(UpsamplerConfig, config, SR, **own))


def _options(network: type, config: Any, prefix: str = "", **own: Any) -> dict[str, Any]:
    """The fields of `network`: `own`, else from the flags of these names (or with `prefix`), rates parsed."""
    flags = {f.name.removeprefix(prefix): f.name for f in dataclasses.fields(config)}
    values = {name: getattr(config, flag) for name, flag in flags.items()}
    values |= {
        n: rates(flags[n], v) for n, v in values.items() if n.endswith(("_resolutions", "_windows"))
    } | own
    return {f.name: values[f.name] for f in dataclasses.fields(network)}


def create_diffusion(config: DiffusionConfig) -> SpacedDiffusion:
    """The diffusion over the steps that `timestep_respacing` keeps."""
    if config.diffusion_steps < 1:
        raise ValueError(f"diffusion_steps {config.diffusion_steps}: need at least 1")
    if config.use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif config.rescale_learned_sigmas:
        loss_type = gd.LossType.RESCALED_MSE
    else:
        loss_type = gd.LossType.MSE
    return SpacedDiffusion(
        space_timesteps(
            config.diffusion_steps, config.timestep_respacing or [config.diffusion_steps]
        ),
        betas=gd.get_named_beta_schedule(config.noise_schedule, config.diffusion_steps),
        model_mean_type=gd.ModelMeanType.START_X
        if config.predict_xstart
        else gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE
        if config.learn_sigma
        else gd.ModelVarType.FIXED_LARGE,
        loss_type=loss_type,
        rescale_timesteps=config.rescale_timesteps,
    )


def numbers(name: str, text: str | Sequence[int], count: int) -> tuple[int, ...]:
    """ "20,3,64,64" -> (20, 3, 64, 64); ValueError, naming the flag, unless `count` positive integers are given."""
    try:
        values = tuple(
            int(part) for part in (text if isinstance(text, tuple | list) else str(text).split(","))
        )
    except ValueError:
        values = ()
    if len(values) != count or min(values) < 1:
        raise ValueError(f"--{name} {text!r}: need {count} positive integers with commas between")
    return values


def rates(name: str, text: str) -> tuple[int, ...]:
    """ "2,4,8" -> (2, 4, 8); "-1" or empty -> none."""
    if str(text) in ("", "-1"):
        return ()
    return numbers(name, text, len(str(text).split(",")))


def channel_multipliers(text: str, picture_size: int, prefix: str = "") -> tuple[float, ...]:
    """A list as given, or what a picture of this width calls for."""
    text = text or (SR_CHANNEL_MULT if prefix else DEFAULT_CHANNEL_MULT).get(picture_size, "")
    try:
        values: Sequence[float] = [float(part) for part in text.split(",")]
    except ValueError:
        values = ()
    if not values or min(values) <= 0:
        raise ValueError(
            f"{prefix}channel_mult {text!r}: for pictures {picture_size} wide give a list such as 1,2,3,4 "
            f"(known without one: {', '.join(map(str, DEFAULT_CHANNEL_MULT))})"
        )
    return tuple(values)
