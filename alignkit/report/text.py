"""Numbers and texts as a page shows them: four digits, units, thin spaces; and the templates that hold them."""

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignkit import __version__

WORDS: dict[str, Any] = json.loads(Path(__file__).with_name("words.json").read_text("utf-8"))  # names and their order
MINUS, DASH, THIN = "\u2212", "\u2013", "\u2009"
_EMPTY_LINES = re.compile(r"^(?:[^\S\n]*\n){4,}", re.MULTILINE)


def figure(value: float | int | None, digits: int = 4) -> str:
    """Format a value with `digits` significant digits and a real minus sign; a dash for None."""
    if value is None:
        return DASH
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e6):
        return count(int(value))
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 1)}e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    decimals = min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 5)
    return f"{value:,.{decimals}f}".replace(",", THIN).replace("-", MINUS)


def count(value: Any) -> str:
    """Format a whole number with thin spaces between thousands; empty for what is no number."""
    return f"{int(value):,}".replace(",", THIN).replace("-", MINUS) if isinstance(value, int | float) else ""


def short_count(value: float | None) -> str:
    """Format a large count in thousands, millions or billions, such as `1.2 M`."""
    if value is None:
        return DASH
    for limit, scale, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / scale:.{1 if abs(value) < 100 * scale else 0}f}{THIN}{unit}"
    return count(value)


def share(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}{THIN}%".replace("-", MINUS)


def wilson(successes: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927, JASA 22, 209-212); successes may be halves, for ties."""
    if not count:
        return 0.0, 1.0
    share, shrink = successes / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # With no success, or nothing else, the border is 0 or 1; rounding may miss it by an ulp.
    return max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)


def duration(seconds: float | None) -> str:
    """Format seconds as the two largest units, such as `2 h 05 min`."""
    if seconds is None:
        return DASH
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}{THIN}s" if seconds < 10 else f"{whole}{THIN}s"
    units = ((3600, 60, "min", 1, "s"), (48 * 3600, 3600, "h", 60, "min"), (math.inf, 86400, "d", 3600, "h"))
    size, unit, part_size, part = next(unit[1:] for unit in units if whole < unit[0])
    return f"{whole // size}{THIN}{unit} {whole % size // part_size:02d}{THIN}{part}"


def text_of(content: Any) -> str:
    """Take the text out of an answer: itself, a message, or messages one below the other."""
    if isinstance(content, dict):
        return text_of(content.get("content"))
    if isinstance(content, list):
        return "\n".join(text_of(item.get("text") if item.get("type") == "text" else item) for item in content)
    return "" if content is None else str(content)


def turns(prompt: Any) -> list[tuple[str, str]]:
    """Split a prompt into turns of role and text; a plain text has one turn without a role."""
    if isinstance(prompt, list):
        return [(str(turn.get("role", "")), text_of(turn)) for turn in prompt if isinstance(turn, dict)]
    return [("", text_of(prompt))] if prompt else []


def fold(text: str) -> str:
    """Put one line that counts them in place of many empty lines, as untrained models write them."""
    return _EMPTY_LINES.sub(lambda found: f"[{found[0].count(chr(10))} empty lines]\n", text)


def window(number: int, unit: str = "logged value", *, last: bool = False) -> str:
    """Say which values a mean is over: `5 rollouts`, or with `last` `mean of the last 5 rollouts`."""
    several = f"{number} {unit}s" if number > 1 else unit
    return f"{'mean of the last' if number > 1 else 'the last'} {several}" if last else several


def short_name(path: str) -> str:
    """Shorten a model or a source: the run's name for `runs/a/sft/model`, a file's name, or a hub id as it is."""
    parts = [part for part in path.split("/") if part]
    if parts and parts[-1] == "model":
        parts = parts[:-1]
    return path if len(parts) <= 2 and not path.startswith(("/", ".", "~")) and "runs" not in parts else parts[-1]


def fixed(value: float) -> str:
    """Format a number whose column is read from top to bottom: as many decimals as its neighbours."""
    return f"{value:.3f}".replace("-", MINUS) if abs(value) < 100 else figure(value, 3)


@cache
def open_templates() -> Environment:
    """Prepare the templates of pages, charts and the card; those of pages and charts escape every text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=lambda name: name is not None and name.endswith((".html.jinja", ".svg.jinja")),
    )  # fmt: skip
    shown = (figure, count, short_count, share, duration, text_of, turns, fold, fixed, short_name)
    environment.filters |= {function.__name__: function for function in shown}
    environment.filters["as_json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"version": __version__, "refresh_seconds": None}
    return environment
