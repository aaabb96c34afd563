"""The one kind of error that a user causes, and how a program ends on it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """A bad input: one sentence with the value got, what was expected and the way out."""


def exit_on_error(main: Callable[[], None]) -> None:
    """Runs a program; a bad input or a failing file ends it with one sentence and exit code 2."""
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
