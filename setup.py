from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="mm-diffusion-stereo",
    version="0.1.0",
    description="Stereo MM-Diffusion: joint diffusion of video and stereo audio",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["mm_diffusion*"]),
    package_data={
        "mm_diffusion.viewing": ["*.html", "*.css"],
        "mm_diffusion.evaluation": ["*.json"],
    },
    python_requires=">=3.11,<3.13",
    install_requires=(HERE / "requirements_training_joint.txt").read_text().splitlines(),
    extras_require={
        "eval": ["librosa==0.11.0", "numba==0.68.1"],  # onsets of Temporal AV-Align
        "safetensors": ["safetensors==0.8.0"],  # checkpoints in this format
    },
)
