"""Data: video files, images, indexes of folders, and batches of training data."""


class MediaError(ValueError):
    """A file that cannot be used; one line with its name and the reason."""


class DataError(ValueError):
    """A data folder that cannot be used; one line with the remedy."""
