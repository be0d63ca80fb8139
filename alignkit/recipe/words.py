"""Words that a recipe takes from others: the fields of TRL's config classes (`fields.json`) and PEFT's
(`adapters.json`), and what other tools call things (`words.tsv`): where it lives here, with what value, or why nowhere.

The columns of words.tsv: names; tool ("trl": a field of TRL that alignkit sets itself; else whose word it is, or any
tool's); method ("ppo": of that stage alone); action (renamed, converted, automatic, refused; missing: alignkit cannot
do it; method: the name of a method or loss, with its section as the key and what it says as the value); key, ours;
value ("bf16=bfloat16", "*=-" for all others, "1/x", or "-" where none can be told); said, where "it is KEY" is not
enough.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

from pydantic import Field

# Lists of names and texts that the modules of this room read.
TABLES: dict[str, Any] = json.loads(Path(__file__).with_name("tables.json").read_text("utf-8"))
# Fields of GRPOConfig that are keys of alignkit's own, with their own ranges.
OWN = ("temperature", "num_generations", "top_p", "top_k", "scale_rewards")

Fragment = dict[str, Any]
Text = Annotated[str, Field(pattern=r"\S")]
_TYPES: dict[str, Any] = {
    "boolean": bool, "integer": int, "number": float, "string": Text, "object": dict[str, Any], "null": None,
}  # fmt: skip
# JSON Schema's name of a bound, pydantic's, and ours.
BOUNDS = {
    "exclusiveMinimum": ("gt", "greater than"), "minimum": ("ge", "at least"),
    "exclusiveMaximum": ("lt", "less than"), "maximum": ("le", "at most"), "minItems": ("min_length", ""),
}  # fmt: skip


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


def make_type(fragment: Fragment) -> Any:
    """Make the type that a fragment of `fields.json` or `adapters.json` describes."""
    if "anyOf" in fragment:
        return Union[tuple(make_type(option) for option in fragment["anyOf"])]  # noqa: UP007 - of a tuple
    if "enum" in fragment:
        return Literal[tuple(fragment["enum"])]
    made = list[make_type(fragment["items"])] if fragment["type"] == "array" else _TYPES[fragment["type"]]  # type: ignore[misc]
    bounds = {ours: fragment[name] for name, (ours, _) in BOUNDS.items() if name in fragment}
    return Annotated[made, Field(**bounds)] if bounds else made


ADAPTER_TYPES = ("lora", "dora", "vera", "oft", "ia3")
_OUR_NAMES = {"lora_alpha": "alpha", "lora_dropout": "dropout", "vera_dropout": "dropout", "module_dropout": "dropout"}


@cache
def adapter_fields(kind: str) -> dict[str, tuple[str, Fragment]]:
    """What `lora:` may say of a type of adapter: recipe key -> PEFT's name and the field."""
    snapshot = json.loads((Path(__file__).parent / "adapters.json").read_text(encoding="utf-8"))
    fields = snapshot["lora" if kind == "dora" else kind]
    return {_OUR_NAMES.get(name, name): (name, field) for name, field in fields.items()}


@dataclass(frozen=True)
class OwnLoss:
    """A preference loss beside TRL's: the function of its name in train/losses.py computes it."""

    keys: Mapping[str, Fragment] = field(default_factory=dict)  # recipe keys that it alone reads
    has_reference: bool = True
    is_logistic: bool = False  # the cross-entropy of one margin: ln 2 at step 0, and it reads soft labels


OWN_LOSSES = {name: OwnLoss(**of) for name, of in TABLES["losses beside TRL's"].items()}
# Those that TRL's KTOTrainer computes, on single answers.
KTO_LOSSES = ("kto", "apo_zero_unpaired")


@cache
def read_snapshot() -> dict[str, dict[str, Any]]:
    """The generated snapshot of TRL as it is."""
    data: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "fields.json").read_text(encoding="utf-8"))
    return data


@cache
def trl_fields(config: str) -> dict[str, Fragment]:
    """Every field of a config class ("sft", "rm", "dpo", "kto", "ppo"); controlled ones included."""
    return {**read_snapshot()["common"], **read_snapshot()[config]}


@cache
def method_fields(method: str) -> dict[str, Fragment]:
    """The fields a stage of this method may set, none if it trains nothing; dpo takes KTO's too, for loss_type kto."""
    if method not in read_snapshot():
        return {}
    fields = trl_fields(method)
    if method == "dpo":
        losses = [*fields["loss_type"]["items"]["enum"], *OWN_LOSSES, *KTO_LOSSES]
        item = {"type": "string", "enum": losses}
        several = {"type": "array", "items": item, "minItems": 1}
        fields = {**trl_fields("kto"), **fields, "loss_type": {**fields["loss_type"], "anyOf": [item, several]}}
        fields["loss_type"] = {key: fields["loss_type"][key] for key in ("anyOf", "default", "description")}
        fields |= {key: fragment for loss in OWN_LOSSES.values() for key, fragment in loss.keys.items()}
    refused = controlled_fields(method).union(OWN if method == "ppo" else ())
    return {name: fragment for name, fragment in fields.items() if name not in refused}
