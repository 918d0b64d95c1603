"""The device that a setting names."""

import torch

from .errors import DAVAEError


def device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        DAVAEError: there is none of that name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as problem:
        said = str(problem).splitlines()[0]
        raise DAVAEError(f"cannot compute on the device {name!r} ({said}); use --device cpu") from problem
    return found
