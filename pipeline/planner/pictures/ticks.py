"""Round numbers on axes, and numbers as texts."""

import math


def linear_ticks(start: float, end: float, step: float) -> list[float]:
    """The multiples of `step` from `start` to `end`, which are included."""
    first, last = math.ceil(start / step - 1e-9), math.floor(end / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def round_step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def logarithmic_ticks(start: float, end: float, most: int = 8) -> list[float]:
    """Numbers of one digit from `start` to `end`, as many of them as are evenly spread and not more than `most`."""
    first, last = math.floor(math.log10(start)), math.ceil(math.log10(end))
    found: list[float] = []
    for factors in (range(1, 10), (1, 2, 5), (1, 3), (1,)):
        found = [
            factor * 10.0**power
            for power in range(first, last + 1)
            for factor in factors
            if start * (1 - 1e-9) <= factor * 10.0**power <= end * (1 + 1e-9)
        ]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def rounded(value: float) -> str:
    """Three digits, and no more decimals than thousandths: 0, < 0.001, 0.012, 1.23, 12.3, 123, 12,300."""
    if value < 0.0005:
        return "< 0.001" if value > 0 else "0"
    if value >= 999.5:
        return f"{round(value, 2 - math.floor(math.log10(value))):,.0f}"
    if value >= 99.95:
        return f"{value:.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.9995 else f"{value:.3f}"


def exact(value: float) -> str:
    """A round number as it is, with commas: 0.25, 5, 20,000."""
    return f"{value:,.10f}".rstrip("0").rstrip(".")


def percent(share: float) -> str:
    """A share in per cent, with a decimal where it is small: 0 %, < 0.1 %, 0.4 %, 12 %."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    shown = f"{100 * share:.1f}" if 0.0005 <= share < 0.0095 else f"{100 * share:.0f}"
    return f"{shown} %"
