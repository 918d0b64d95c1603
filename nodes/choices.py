"""Values of drop-down lists, which older ComfyUI does not check and a link may bring."""

from collections.abc import Collection

from ..davae_core.errors import DAVAEError, quoted


def require_choice(name: str, value: object, options: Collection[str]) -> None:
    """Raise DAVAEError unless ``value`` is one of the options."""
    if value not in list(options):
        raise DAVAEError(f"the {name} is {quoted(value)}, expected one of {', '.join(options)}")
