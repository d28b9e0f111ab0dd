"""Numbers as text, with the same decimals and minus sign on every page and on the command line."""

import math


def fixed(value: float, digits: int = 2, missing: str = "none") -> str:
    """Format a number with fixed decimals and a true minus sign; a value that rounds to 0 has no sign, NaN is `missing`."""
    if math.isnan(value):
        return missing
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def general(value: float) -> str:
    """Format a number of any size with up to six digits and a true minus sign."""
    return f"{value:.6g}".replace("-", "−")


def percent(share: float | None, digits: int = 1, missing: str = "none") -> str:
    """Format a share of 1 in percent; None and NaN are `missing`."""
    return missing if share is None or math.isnan(share) else f"{fixed(100 * share, digits)}%"
