"""Numbers as a reader wants them: four digits, units, and no more.

It formats only; what a number means is for its caller to say.
"""

from __future__ import annotations

import math

_MINUS = "\u2212"
_THIN = "\u2009"


def figure(value: float | int | None, digits: int = 4) -> str:
    """Return a value with `digits` significant digits and a real minus sign; an en dash for None."""
    if value is None:
        return "\u2013"
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return count(int(value))
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 1)}e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", _MINUS)
    decimals = min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 5)
    return f"{value:,.{decimals}f}".replace(",", _THIN).replace("-", _MINUS)


def count(value: int) -> str:
    """Return a whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", _THIN).replace("-", _MINUS)


def short_count(value: float | None) -> str:
    """Return a large count in thousands, millions or billions, such as `1.2 M`."""
    if value is None:
        return "\u2013"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.{1 if scaled < 100 else 0}f}{_THIN}{unit}"
    return count(int(value))


def share(value: float | None) -> str:
    """Return a share of one in percent."""
    return "\u2013" if value is None else f"{100 * value:.1f}{_THIN}%".replace("-", _MINUS)


def duration(seconds: float | None) -> str:
    """Return seconds as the two largest units, such as `2 h 05 min`."""
    if seconds is None:
        return "\u2013"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}{_THIN}s" if seconds < 10 else f"{whole}{_THIN}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}{_THIN}min {rest:02d}{_THIN}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}{_THIN}h {minutes:02d}{_THIN}min"
    days, hours = divmod(hours, 24)
    return f"{days}{_THIN}d {hours:02d}{_THIN}h"


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return about `wanted` round numbers that lie within [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low
    # A span that rounding made has no steps to count in; nor has one beyond the range of floats.
    if not max(1e-9 * max(abs(low), abs(high)), 1e-300) < span < math.inf:
        return [low]
    rough = span / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(step - rough))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float, ticks: list[float]) -> str:
    """Return a tick's label, with as many decimals as tell it from its neighbours."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    largest = max(abs(tick) for tick in ticks)
    if abs(value) < step * 1e-6:
        return "0"
    if largest >= 1e15:
        return figure(value, 3)
    if largest >= 1e4 and step >= 100:
        return short_count(value).replace(".0\u2009", "\u2009") if abs(value) >= 1e4 else figure(value)
    if largest < 1e-2:
        return f"{value:.0e}".replace("e-0", "e-").replace("-", _MINUS) if _is_round(value) else figure(value, 3)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if not math.isclose(step * 10**decimals, round(step * 10**decimals), abs_tol=1e-6):
        decimals += 1  # a step of 2.5 times a power of ten
    return f"{value:.{decimals}f}".replace("-", _MINUS)


def _is_round(value: float) -> bool:
    return math.isclose(value, float(f"{value:.0e}"), rel_tol=1e-9)
