"""One exception family, so that a caller can tell our messages from a bug."""


class DAVAEError(ValueError):
    """Something given to DA-VAE cannot be used. The message says what was given, what was expected, and what to do."""


class CheckpointError(DAVAEError):
    """A file cannot be read, or does not hold what it should."""


class LatentError(DAVAEError):
    """A latent or an image has the wrong channels or size."""


class WriteError(CheckpointError):
    """A file cannot be written."""
