"""recipes/REFERENCE.md, made from the schema: `python tests/reference.py` rewrites it in place.

`test_readme` fails when the two differ.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from alignkit.data.formats import FORMATS, GROUPS
from alignkit.recipe.methods import (
    CritiqueOptions,
    DpoOptions,
    GenerationOptions,
    Helpful,
    LabelOptions,
    MissingEos,
    Overlong,
    PpoOptions,
    Ptx,
    RlaifOptions,
    RmOptions,
    SftOptions,
    StageOptions,
    TrainOptions,
    Truncate,
)  # fmt: skip
from alignkit.recipe.schema import (
    DataSource,
    EvaluateOptions,
    FeedbackModel,
    LaunchOptions,
    LoraOptions,
    ModelOptions,
    Price,
    RecipeOptions,
    RewardSource,
    SampleOptions,
    SlurmOptions,
)  # fmt: skip

REFERENCE = Path(__file__).resolve().parents[1] / "recipes/REFERENCE.md"
BEGIN, END = "<!-- recipe reference: begin -->", "<!-- recipe reference: end -->"
FORMAT_MARKS = ("<!-- formats: begin -->", "<!-- formats: end -->")
SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("Top level", RecipeOptions),
    ("`model:`", ModelOptions),
    ("`lora:`", LoraOptions),
    ("`launch:`", LaunchOptions),
    ("`launch.slurm:`", SlurmOptions),
    ("A data source (`data:`, `eval:`, `normalize_data:`)", DataSource),
    ("Every stage", StageOptions),
    ("Every stage that trains", TrainOptions),
    ("`samples:`", SampleOptions),
    ("An sft stage", SftOptions),
    ("An rm stage", RmOptions),
    ("A dpo stage", DpoOptions),
    ("A ppo stage", PpoOptions),
    ("A reward (`reward:`, `gold:`)", RewardSource),
    ("`missing_eos:`", MissingEos),
    ("`overlong:`", Overlong),
    ("`truncate:`", Truncate),
    ("`ptx:`", Ptx),
    ("`generation:`", GenerationOptions),
    ("An rlaif section", RlaifOptions),
    ("A critique stage", CritiqueOptions),
    ("`helpful:`", Helpful),
    ("A label stage", LabelOptions),
    ("A judge or generator (`judge:`, `generator:`)", FeedbackModel),
    ("`price:`", Price),
    ("`evaluate:`", EvaluateOptions),
]


def describe_type(annotation: object) -> str:
    """Return the accepted values in a few words."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " \\| ".join(map(str, typing.get_args(annotation)))
    if origin is typing.Annotated:
        return describe_type(typing.get_args(annotation)[0])
    if origin in (list, dict):
        return "list" if origin is list else "mapping"
    if typing.get_args(annotation):
        parts = [describe_type(part) for part in typing.get_args(annotation) if part is not type(None)]
        return " \\| ".join(dict.fromkeys(parts))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    names = {str: "text", int: "whole number", float: "number", bool: "true \\| false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))  # type: ignore[call-overload]


def describe_default(field: FieldInfo) -> str:
    """Return the default as YAML writes it; a dash where there is none."""
    if field.is_required():
        return "required"
    value = None if field.default_factory_takes_validated_data else field.get_default(call_default_factory=True)
    if value is None or value in ({}, []) or isinstance(value, BaseModel):
        return "–"
    return str(value).lower() if isinstance(value, bool) else f"`{value!r}`" if value == "\n" else str(value)


def render() -> str:
    """Return the reference as Markdown tables."""
    parts = []
    for title, model in SECTIONS:
        above = [base for base in model.__mro__[1:] if base in (TrainOptions, StageOptions)]
        inherited = above[0].model_fields if above else {}
        fields = {name: field for name, field in model.model_fields.items() if name not in inherited}
        if not fields:
            continue
        parts += [f"**{title}**", "", "| key | values | default | meaning |", "|---|---|---|---|"]
        for name, field in fields.items():
            accepted = describe_type(field.annotation)
            parts.append(f"| `{name}` | {accepted} | {describe_default(field)} | {field.description or ''} |")
        parts.append("")
    return "\n".join(parts)


def render_formats() -> str:
    """Return the table of formats as Markdown: the columns a row needs, and what it becomes."""
    lines = ["| `format` | columns that a row needs | kind of row |", "|---|---|---|"]
    for form in FORMATS:
        # The same columns as lists of messages are no line of their own.
        needs = dict.fromkeys(word for word in form.needs.split() if ":list|" not in word)
        columns = " + ".join(" or ".join(dict.fromkeys(re.sub(r":\w+", "", word).split("|"))) for word in needs)
        lines.append(f"| {form.name} | {columns} | {form.kind} |")
    groups = [f"{group}: {', '.join(f'`{name}`' for name in names)}" for group, names in GROUPS.items()]
    return "\n".join([*dict.fromkeys(lines), "", ". ".join(groups) + "."])


def replace(text: str) -> str:
    """Return the text of REFERENCE.md as it should be."""
    for (begin, end), content in (((BEGIN, END), render()), (FORMAT_MARKS, render_formats())):
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    REFERENCE.write_text(replace(REFERENCE.read_text(encoding="utf-8")), encoding="utf-8")
