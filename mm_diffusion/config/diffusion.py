"""The settings of the diffusion process."""

from __future__ import annotations

from dataclasses import dataclass

from .flags import SR, Config, at_least, flag, one_of

PREDICTIONS = ("noise", "x_start", "v")


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """The diffusion process."""

    learn_sigma: bool = flag(False, "learn the variances")
    diffusion_steps: int = flag(1000, "steps of the process", at_least(1))
    noise_schedule: str = flag(
        "linear", "linear or cosine, or either with _zero_snr (nothing but noise at the last step)"
    )
    timestep_respacing: str = flag(
        "", "steps to sample with: ddimN, N or sections such as 10,15,20"
    )
    use_kl: bool = flag(False, "train on the variational bound")
    predict_xstart: bool = flag(False, "the same as prediction x_start")
    prediction: str = flag(
        "", "noise, x_start (the clip) or v; empty: as predict_xstart", one_of(("", *PREDICTIONS))
    )
    rescale_timesteps: bool = flag(False, "give the model timesteps scaled to 0..1000")
    rescale_learned_sigmas: bool = flag(False, "scale the bound by steps/1000 beside MSE")

    @property
    def predicted(self) -> str:
        """What the model predicts, of PREDICTIONS."""
        return self.prediction or ("x_start" if self.predict_xstart else "noise")

    def check(self) -> None:
        if self.predict_xstart and self.predicted != "x_start":
            raise ValueError(
                f"--{self.prefix}predict_xstart True contradicts"
                f" --{self.prefix}prediction {self.prediction}: leave one of them out"
            )


@dataclass(frozen=True)
class SRDiffusionConfig(DiffusionConfig):
    """The diffusion process of the upsampler."""

    prefix = SR
    learn_sigma: bool = flag(True, "learn the variances")
