"""Stereo MM-Diffusion: joint diffusion of video and stereo audio."""

import getpass
import os

try:
    getpass.getuser()
except (KeyError, OSError):  # as in a container for a user whom it does not know
    os.environ["USER"] = f"uid{os.getuid()}"  # torch names a folder of its cache after the user
