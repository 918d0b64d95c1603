"""Says what the program is at, and every few seconds that it still is: never silent before there is a bar."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SECONDS = 4.0


class _Beat:
    """What the program is at, and the thread that repeats it."""

    def __init__(self) -> None:
        self.what, self.since = "", 0.0
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def tell(self) -> None:
        """Repeat until there is nothing to say."""
        with self.changed:
            while self.what:
                if not self.changed.wait(SECONDS):
                    say(f"{self.what}: {time.monotonic() - self.since:.0f} s so far")
            self.thread = None


_beat = _Beat()


def at(what: str) -> None:
    """Say what begins now, and go on saying it until the next call; "" ends it."""
    with _beat.changed:
        _beat.what, _beat.since = what, time.monotonic()
        if what:
            say(what)
            if _beat.thread is None:
                _beat.thread = threading.Thread(target=_beat.tell, daemon=True)
                _beat.thread.start()
        _beat.changed.notify()


@contextmanager
def ending() -> Iterator[None]:
    """Nothing is said any more after the block, however it ends."""
    try:
        yield
    finally:
        at("")


def say(line: str) -> None:
    """A line on stderr, where there still is one; of several processes the first speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
