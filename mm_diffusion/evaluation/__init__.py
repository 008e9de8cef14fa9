"""Metrics of generated clips, by themselves and against reference clips."""
