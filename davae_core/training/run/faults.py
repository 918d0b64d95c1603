"""What ended a run, said so that a person knows what to do."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import DAVAEError


class RunError(RuntimeError):
    """A run was ended by an error that is not one of ours; its cause has the traceback."""


# What allocators of CPUs say, which have no exception of their own.
NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory", re.IGNORECASE)
WORKER = re.compile(r"DataLoader worker .*(killed|exited unexpectedly)")


def out_of_memory(problem: BaseException) -> bool:
    """Whether memory ran out, of a device or of the machine."""
    if isinstance(problem, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(problem, (RuntimeError, OSError)) and bool(NO_MEMORY.search(str(problem)))


def worker_ended(problem: BaseException) -> bool:
    """Whether a process that loads images has ended by itself."""
    return isinstance(problem, RuntimeError) and bool(WORKER.search(str(problem)))


def explained(problem: Exception, step: int, where: str, settings: Mapping[str, Any]) -> Exception:
    """What to raise in place of an exception that ended a run.

    Args:
        problem: the exception.
        step: steps done.
        where: what became of the state, as a clause.
        settings: the flat recipe.

    Returns:
        A DAVAEError where a person can put it right, and otherwise a :class:`RunError`; ``where`` is its end.
    """
    if isinstance(problem, DAVAEError):
        return type(problem)(f"{str(problem).rstrip('.')}. {_capital(where)}")
    if out_of_memory(problem):
        return DAVAEError(
            f"out of memory after step {step} ({_first_line(problem)}). {_less(settings)}. {_capital(where)}"
        )
    if worker_ended(problem):
        return DAVAEError(
            f"a process that loads images has ended after step {step} ({_first_line(problem)}). Mostly the "
            "system kills it where the machine's memory is used up: take fewer (--data.workers), or smaller images. "
            f"{_capital(where)}"
        )
    return RunError(
        f"the run was ended after step {step} by {type(problem).__name__}: {_first_line(problem)}. {_capital(where)}"
    )


def _less(settings: Mapping[str, Any]) -> str:
    """What takes less memory in this training, what changes nothing first."""
    micro = int(settings.get("run.micro_batch") or settings.get("run.batch") or 1)
    ways = [f"--run.micro-batch {max(1, micro // 2)} (it was {micro})"] if micro > 1 else []
    adaptive = settings.get("critic.adaptive") or settings.get("alignment.adaptive")  # by the ratio of a micro-batch
    same, other = ([], [*ways]) if adaptive else (ways, [])
    if settings.get("gradient_checkpointing") is False:
        same.append("--gradient-checkpointing")
    others = " or ".join([*other, "--data.size"])
    which = f"{others}, which makes another training (--run.change data.size)"
    kept = f"{' or '.join(same)}, and the result is the same; or " if same else ""
    return f"Reduce {kept}{which}"


def told(problem: BaseException) -> str:
    """An exception in a line: what it says, and its kind where it is not one of ours."""
    text = _first_line(problem)
    return (
        text
        if isinstance(problem, DAVAEError)
        else f"{type(problem).__name__}: {text}"
        if text
        else type(problem).__name__
    )


def _first_line(problem: BaseException) -> str:
    """What an exception says; of one from a loading process the last line of its traceback there."""
    lines = [line for line in str(problem).strip().splitlines() if line.strip()]
    if not lines:
        return type(problem).__name__
    return (lines[-1] if lines[0].startswith("Caught ") else lines[0]).strip().rstrip(".")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
