"""Words of other tools (in `words.tsv`): where each lives in a recipe, with what value, or why nowhere.

The columns of the table: names; tool ("trl": a field of TRL that alignkit sets itself; else whose word it is, or any
tool's); method ("ppo": of that stage alone); action (renamed, converted, automatic, refused; missing: alignkit cannot
do it; method: the name of a method or loss, with its section as the key and what it says as the value); key, ours;
value ("bf16=bfloat16", "*=-" for all others, "1/x", or "-" where none can be told); said, where "it is KEY" is not
enough.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Lists of names and texts that the modules of this room read.
TABLES: dict[str, Any] = json.loads(Path(__file__).with_name("tables.json").read_text("utf-8"))


class Word(NamedTuple):
    names: str
    tool: str
    method: str
    action: str
    key: str
    value: str
    said: str

    def say(self) -> str:
        """Where it lives, or why it does not."""
        return self.said or f"it is {self.key}"

    def convert(self, value: Any) -> Any:
        """Turn a value of the other tool into ours; None where that cannot be told."""
        if value is None or self.value == "-" or not self.key:
            return None
        if self.value == "1/x":
            return round(1 / value, 4) if isinstance(value, int) and value > 0 else None
        pairs = dict(pair.split("=", 1) for pair in self.value.split())
        spelled = value if isinstance(value, str) else json.dumps(value)
        new = pairs.get(spelled, pairs.get("*"))
        if new in (None, "-"):
            return value if new is None else None
        try:
            return json.loads(new)
        except ValueError:
            return new


@cache
def read_words() -> tuple[Word, ...]:
    """The table as it is."""
    lines = (Path(__file__).parent / "words.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(Word(*line.split("\t")) for line in lines[1:])


@cache
def _by_name() -> dict[tuple[str, str, str], Word]:
    words: dict[tuple[str, str, str], Word] = {}
    for word in read_words():
        for name in word.names.split():
            kind = "method" if word.action == "method" else word.method
            words["" if word.tool == "trl" else word.tool, name, kind] = word
    for (_, name, kind), word in [*words.items()]:
        if "." in name:  # critic.adam.lr tells its tool
            words.setdefault(("", name, kind), word)
    return words


def find_word(name: str, method: str = "", tool: str = "") -> Word | None:
    """Find what a key of another tool, or of any, means in a stage; `actor.adam.lr` also by its last part."""
    words = _by_name()
    for part in dict.fromkeys((name, name.rpartition(".")[2])):
        for key in ((tool, part, method), (tool, part, ""), ("", part, method), ("", part, "")):
            if key in words:
                return words[key]
    return None


def find_method(name: object) -> Word | None:
    """Find what a method or loss that other tools call so is here; the key is its section, the value what it says."""
    return _by_name().get(("", str(name).lower(), "method"))


@cache
def controlled_fields(method: str) -> frozenset[str]:
    """Fields of TRL that a stage of a method cannot set."""
    words = (word for word in read_words() if word.tool == "trl" and word.method in ("", method))
    return frozenset(name for word in words for name in word.names.split())
