"""What can be wrong with data and checkpoints."""


class DataError(ValueError):
    """Data that is missing or not what it should be."""


class DownloadError(DataError):
    """A file that cannot be had from the network."""


class DataWarning(UserWarning):
    """Something about the data that the user should know."""


class CheckpointWarning(UserWarning):
    """A checkpoint that is passed over."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on from."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose content is not what was written."""


def shorten(error: Exception) -> str:
    """What an error says, on one line, or its type where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
