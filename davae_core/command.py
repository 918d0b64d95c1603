"""What every command line of this package does around its work."""

import io
import sys
from collections.abc import Callable

from .errors import DAVAEError

WRONG, INTERRUPTED = 2, 130


def run(main: Callable[[], object]) -> None:
    """Run a command and exit with its code, 0 where it gives none.

    What a person can put right is said without a traceback and exits with 2; Ctrl-C exits with 130.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a title in letters that the console's code page lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except DAVAEError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(WRONG)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)
