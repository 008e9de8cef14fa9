"""Stereo MM-Diffusion: joint diffusion of video and stereo audio."""
