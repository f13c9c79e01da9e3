"""Numbers as text: a median with its interval, to as many digits as the interval supports."""

import math

__all__ = ["MINUS", "decimals", "fixed", "format_interval"]

MINUS = "\N{MINUS SIGN}"


def format_interval(median: float, low: float, high: float, unit: str = "") -> str:
    """Return '18.21 +0.05 -0.04 lg V' of a median and the ends of its interval, with `decimals` digits."""
    digits = decimals(median - low, high - median)
    text = f"{fixed(median, digits)} +{fixed(high - median, digits)} {MINUS}{fixed(median - low, digits)}"
    return f"{text} {unit}" if unit else text


def decimals(below: float, above: float) -> int:
    """Return the digits after the point for errors `below` and `above`, by the rule of the Particle Data Group."""
    # The smaller error decides, but at least a fifth of the larger: at the edge of a prior the smaller one can vanish.
    scale = max(min(below, above), max(below, above) / 5)
    if not math.isfinite(scale) or scale <= 0:
        return 4
    exponent = math.floor(math.log10(scale))
    leading = round(scale / 10.0**exponent * 100)
    significant = 2 if leading < 355 or leading >= 950 else 1
    if leading >= 950:
        exponent += 1
    return max(0, significant - 1 - exponent)


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """Return fixed-point text with a minus sign (U+2212) and without '-0.00'."""
    if not math.isfinite(value):
        return str(value)
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)
