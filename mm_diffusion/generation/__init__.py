"""From checkpoints to files of generated clips."""
