"""Train: python -m davae_core.training STAGE RECIPE [--setting value ...]"""

import sys
from collections.abc import Callable
from functools import partial

from .. import command
from ..errors import DAVAEError
from . import stages
from .data import stored_latents
from .planning import plan
from .text import encode

COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    **{name: (stage.about.splitlines()[0], partial(stages.run, name)) for name, stage in stages.STAGES.items()},
    "text": ("Compute the text embeddings of all captions once.", encode.main),
    "latents": ("Compute the latents of all images once.", stored_latents.main),
    "plan": ("Print what a training costs.", plan.main),
}


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [__doc__ or "", "", *(f"  {name:<{width}}  {about}" for name, (about, _) in COMMANDS.items())]
    return "\n".join([*lines, "", "--help behind a stage lists its recipes; behind a recipe, all settings."])


def main(args: list[str]) -> int:
    """Run a stage or a tool; the exit code.

    Raises:
        DAVAEError: there is none of that name.
    """
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else command.WRONG
    if args[0] not in COMMANDS:
        raise DAVAEError(f"there is no stage {args[0]!r}; choose one of {', '.join(COMMANDS)}")
    return COMMANDS[args[0]][1](args[1:])


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
