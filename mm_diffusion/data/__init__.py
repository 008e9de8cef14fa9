"""Files on disk -> tensors: video files, images, indexes of folders, and training data."""


class MediaError(ValueError):
    """A file that cannot be used; one line, naming the file and the reason."""


class DataError(ValueError):
    """A data folder that cannot be used; one line, with the remedy."""
