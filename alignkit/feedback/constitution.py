"""A constitution: principles to criticise, revise and compare by, and the draw of one of them.

It reads our own YAML and the JSON files that Anthropic published, and checks them whole; it puts no prompt together
and asks nobody.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

from alignkit.data.files import display_name
from alignkit.errors import Problem, RecipeError
from alignkit.feedback.principles import Principle, read_principles
from alignkit.feedback.published import read_published
from alignkit.recipe.nearest import suggest

BUILTIN = "builtin:"
Part = Literal["critique", "comparison"]
_SHIPPED = Path(__file__).with_name("constitutions")
_2_64 = float(2**64)
_MISSING = {
    "critique": "no principle has a critique request and a revision request; add critique: and revision: to each, or "
    "leave the stage out (critique: false)",
    "comparison": "no principle has a question to compare answers by; add comparison: to each",
}


@dataclass(frozen=True)
class Constitution:
    """Principles in the order of their files; all of them have what the stage asks for."""

    principles: tuple[Principle, ...]

    def draw(self, *, seed: int, key: str, turn: int) -> Principle:
        """Return the principle for one turn of whatever `key` names, by weight.

        It depends on nothing else: neither the order of the work nor a restart changes it (CAI, arXiv 2212.08073,
        section 3.1: a principle is drawn at every step, uniformly where the weights are equal).
        """
        digest = hashlib.blake2b(f"principle {seed} {turn} {key}".encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "little") / _2_64 * self._borders[-1]
        return self.principles[min(bisect_right(self._borders, drawn), len(self.principles) - 1)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash, in hex, of everything that can change a draw or a prompt."""
        text = json.dumps([asdict(principle) for principle in self.principles])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def _borders(self) -> list[float]:
        return list(accumulate(principle.weight for principle in self.principles))


def load_constitution(values: str | Sequence[str], *, needs: Part | None = None) -> Constitution:
    """Read one or more constitutions into one; each value is a file or builtin:NAME.

    `needs` leaves only the principles that can be criticised, or compared, by: the published files hold either kind.
    Raises RecipeError with every problem found, each with file and line.
    """
    problems: list[Problem] = []
    found: list[Principle] = []
    places: dict[str, str] = {}
    names = [values] if isinstance(values, str) else list(values)
    for value in names:
        try:
            read = _read(value)
        except RecipeError as error:
            problems += error.problems
            continue
        for principle in read:
            if principle.name in places:
                what = f"the principle {principle.name} is also in {places[principle.name]}; rename one"
                problems.append(Problem(what, _display(value)))
            places[principle.name] = _display(value)
        found += read
    if problems:
        raise RecipeError(problems)
    kept = tuple(principle for principle in found if needs is None or getattr(principle, needs) is not None)
    if not kept:
        raise RecipeError(_MISSING[needs or "comparison"], where=", ".join(map(_display, names)))
    return Constitution(kept)


def _find(value: str) -> Path:
    """Return the file a value names; raises RecipeError for a builtin constitution that is not there."""
    if not value.startswith(BUILTIN):
        return Path(value).expanduser()
    name = value.removeprefix(BUILTIN)
    known = sorted(path.stem for path in _SHIPPED.glob("*.yaml"))
    if name not in known:
        names = " and ".join(f"{BUILTIN}{other}" for other in known)
        raise RecipeError(f"constitution is {value}; there are {names}{suggest(name, known)}")
    return _SHIPPED / f"{name}.yaml"


def _display(value: str) -> str:
    return value if value.startswith(BUILTIN) else display_name(_find(value))


def _read(value: str) -> list[Principle]:
    path = _find(value)
    label = display_name(path)
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*") if other.suffix in (".yaml", ".yml", ".json"))
        hint = suggest(path.name, near) or "; give a YAML or JSON file, builtin:harmlessness or builtin:helpfulness"
        raise RecipeError(f"the constitution is not there{hint}", where=label)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the constitution cannot be read: {error}", where=label) from None
    return read_published(text, label) if path.suffix == ".json" else read_principles(text, label, path.parent)
