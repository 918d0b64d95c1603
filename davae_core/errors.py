"""One exception family, so that a caller can tell our messages from a bug."""


class DAVAEError(ValueError):
    """Something given to DA-VAE cannot be used. The message says what was given, what was expected, and what to do."""


class CheckpointError(DAVAEError):
    """A file cannot be read, or does not hold what it should."""


class LatentError(DAVAEError):
    """A latent or an image has the wrong channels or size."""


class WriteError(CheckpointError):
    """A file cannot be written."""


def shortened(text: str, most: int = 300) -> str:
    """A text of somebody else, for a message: cut where it is longer than anybody reads."""
    return text if len(text) <= most else f"{text[:most]}..."


def quoted(value: object) -> str:
    """What a file or a setting says, for a message: as Python writes it, and :func:`shortened`."""
    return shortened(repr(value), 60)
