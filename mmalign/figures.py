"""Figures as people read them: one way to print a number, an interval, a share and a p-value, for tables and report."""

from __future__ import annotations

import math

from mmalign.stats import Interval, WinRate


def number(x: float | None, digits: int = 4) -> str:
    """`x` with some `digits` significant figures; an en dash where it is undefined."""
    if x is None or not math.isfinite(x):
        return "–"  # noqa: RUF001
    if x == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{min(places, 8)}f}" if 1e-5 <= abs(x) < 1e7 else f"{x:.{digits - 1}e}"


def percent(x: float | None) -> str:
    """A share as per cent with two places, as leaderboards print it; an en dash where it is undefined."""
    return f"{100 * x:.2f}" if x is not None and math.isfinite(x) else "–"  # noqa: RUF001


_UNPRINTABLE = {code: 0xFFFD for code in (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000))}


def printable(text: str) -> str:
    """`text` with a sign for each control character and lone surrogate, which HTML forbids and UTF-8 cannot hold."""
    return text.translate(_UNPRINTABLE)


def short(x: float) -> str:
    """Four significant figures without needless zeros, large numbers with k, M, G or T: `0.25`, `42.1`, `1.24G`."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= factor and abs(x) >= 1e5:
            return f"{x / factor:.4g}{suffix}"
    return f"{x:.4g}"


def signed_interval(interval: Interval) -> str:
    """`+0.013 [+0.010, +0.016]`, all three to the same decimal place."""
    known = [abs(x) for x in interval if math.isfinite(x) and x]
    if not known or not 1e-5 <= max(known) < 1e7:
        mean, low, high = (number(x, 3) for x in interval)
    else:
        places = min(8, max(0, 2 - math.floor(math.log10(max(known)))))
        mean, low, high = (f"{x:+.{places}f}" if math.isfinite(x) else "–" for x in interval)  # noqa: RUF001
    return f"{mean} [{low}, {high}]"


def share_interval(wins: WinRate) -> str:
    """`71.5 % [65.6, 76.7]`."""
    if not math.isfinite(wins.rate):
        return "–"  # noqa: RUF001
    return f"{100 * wins.rate:.1f} % [{100 * wins.low:.1f}, {100 * wins.high:.1f}]"


def p_value(p: float) -> str:
    """Three places, `< 0.001` below."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
