"""Faults of code of the user's own, in one line."""

import re
import traceback
from pathlib import Path

_LONGEST_MESSAGE = 500


def describe_fault(error: BaseException, folder: Path) -> str:
    """Describe an exception and its last place in the user's code: `KeyError: 'rows' (/home/me/data.py, line 12)`.

    Args:
        error: the exception.
        folder: of the user's code.
    """
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    own = [place for place in places if Path(place[0]).is_relative_to(folder) and "site-packages" not in place[0]]
    where = f" ({own[-1][0]}, line {own[-1][1]})" if own else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_MESSAGE] + where


def names_a_place(message: str) -> bool:
    """Return whether a message ends with a place in the user's code, as `describe_fault` writes it."""
    return re.search(r" \(.+, line \d+\)$", message) is not None
