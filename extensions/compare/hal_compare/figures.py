"""Numbers as text: three digits, with units, with their spread where there is one."""

from __future__ import annotations

from collections.abc import Callable

from .result import Figure

NOT_AVAILABLE = "not available"
_STEPS = (
    (1e-12, "p"),
    (1e-9, "n"),
    (1e-6, "µ"),
    (1e-3, "m"),
    (1.0, ""),
    (1e3, "k"),
    (1e6, "M"),
    (1e9, "G"),
    (1e12, "T"),
)


def amount(value: float, unit: str) -> str:
    """ "1.23 ms": three significant digits with an SI prefix."""
    if value == 0:
        return f"0 {unit}".rstrip()
    scale, prefix = max((step for step in _STEPS if step[0] <= abs(value) * 1.0005), default=_STEPS[0])
    return f"{_digits(value / scale)} {prefix}{unit}".rstrip()


def seconds(value: float) -> str:
    """Seconds, without "ks"."""
    return amount(value, "s") if value < 1000 else f"{value:.0f} s"


def joules(value: float) -> str:
    return amount(value, "J")


def macs(value: float) -> str:
    """Multiply-accumulates."""
    return amount(value, "MAC")


def _digits(value: float) -> str:
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.0f}"


def ratio(value: float) -> str:
    """An error: "2.1e-07"; 0 means bitwise equal."""
    return "0" if value == 0 else f"{value:.1e}"


def percent(value: float) -> str:
    """A share; 100% only where it is all, 0% only where it is nothing."""
    if value in (0, 1):
        return f"{value:.0%}"
    text = f"{value:.1%}"
    return {"100.0%": "> 99.9%", "0.0%": "< 0.1%"}.get(text, text)


def cosine(value: float) -> str:
    """With what is missing to 1 where that is little."""
    missing = 1 - value
    return "1" if missing < 1e-13 else f"1 - {missing:.1e}" if missing < 1e-2 else f"{value:.3f}"


def plain(value: float) -> str:
    """A perplexity: four digits."""
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def ranged(figure: Figure, show: Callable[[float], str]) -> str:
    """The middle, with the range where it shows: "1.2 ms (1.1 to 1.4 ms)"."""
    between = interval(figure, show)
    return f"{show(figure.middle)} ({between})" if between else show(figure.middle)


def interval(figure: Figure, show: Callable[[float], str]) -> str:
    """ "1.1 to 1.4 ms"; "" where lowest and highest read the same."""
    low, high = show(figure.low), show(figure.high)
    if low == high:
        return ""
    number, _, unit = low.partition(" ")
    return f"{number} to {high}" if unit and high.endswith(f" {unit}") else f"{low} to {high}"


def varied(figure: Figure, show: Callable[[float], str]) -> str:
    """The middle, with half the range in percent where it is 0.5% or more: "1.2 ms ±12%"."""
    half = (figure.high - figure.low) / 2 / figure.middle if figure.middle else 0.0
    return show(figure.middle) if half < 0.005 else f"{show(figure.middle)} ±{half:.0%}"
