"""Train: python -m davae_core.training STAGE RECIPE [--setting value ...]"""

import sys
from collections.abc import Callable
from functools import partial

from .. import command
from ..errors import DAVAEError
from .run import heartbeat

TOOLS = {
    "export": "Write the files of a run out of its state.",
    "text": "Compute the text embeddings of all captions once.",
    "latents": "Compute the latents of all images once.",
    "plan": "Print what a training costs.",
    "residual": "Put a predictor inside a DA-VAE.",
    "ablate": "Compare variants of the method.",
}


def commands() -> dict[str, tuple[str, Callable[[list[str]], int]]]:
    """What can be run, by name: a line about it, and its function. The first call imports PyTorch."""
    from . import export, residual, stages
    from .ablation import bench
    from .data import stored_latents
    from .planning import plan
    from .text import encode

    mains = {"export": export.main, "text": encode.main, "latents": stored_latents.main, "plan": plan.main}
    mains |= {"residual": residual.main, "ablate": bench.main}
    return {
        **{name: (stage.about.splitlines()[0], partial(stages.run, name)) for name, stage in stages.STAGES.items()},
        **{name: (about, mains[name]) for name, about in TOOLS.items()},
    }


def usage() -> str:
    """The help text."""
    known = commands()
    width = max(map(len, known))
    lines = [__doc__ or "", "", *(f"  {name:<{width}}  {about}" for name, (about, _) in known.items())]
    return "\n".join([*lines, "", "--help behind a stage lists its recipes; behind a recipe, all settings."])


def main(args: list[str]) -> int:
    """Run a stage or a tool; the exit code.

    Raises:
        DAVAEError: there is none of that name.
    """
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else command.WRONG
    with heartbeat.ending():
        heartbeat.at("starting")
        known = commands()
    if args[0] not in known:
        raise DAVAEError(f"there is no stage {args[0]!r}; choose one of {', '.join(known)}")
    return known[args[0]][1](args[1:])


if __name__ == "__main__":
    command.run(lambda: main(sys.argv[1:]))
