"""The rows that figures are measured on: read by the data room, the held-out side of a split where there was one.

What is left out is counted and said; nothing is shuffled, so that the same rows are measured every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from alignkit.data import DataReport, Rejects, Row, read_rows, split_eval
from alignkit.data.rows import Text, take_prompt
from alignkit.errors import DataError
from alignkit.recipe.schema import DataSource, LaunchOptions, ModelOptions, StageOptions
from alignkit.recipe.stage import Stage


class _Options(StageOptions):
    method: Any = "eval"


@dataclass(frozen=True)
class Measured:
    """Rows and what they are called."""

    rows: list[Row]
    label: str
    warnings: list[str]


def read_measured(
    sources: Sequence[DataSource], *, share: float | None, seed: int, max_rows: int, template: bool = False
) -> Measured:
    """Return the first `max_rows` rows, an equal part of each source; with `share` those held out of training.

    With `template` prompts and answers are turns of a chat, unless a source says otherwise.

    Rows that do not fit are left out with a warning. Raises DataError when no row is left.
    """
    rows: list[Row] = []
    warnings: list[str] = []
    each = -(-max_rows // len(sources))
    for source in sources:
        rejects, report = Rejects(), DataReport()
        limited = source if share is not None else _limit(source, each)
        stage = _stage([limited], seed)
        found = read_rows(stage, [limited], report=report, rejects=rejects, template=template)
        if share is not None:
            found = (row for is_held_out, row in split_eval(found, share, seed) if is_held_out)
        rows += islice(found, each)
        if report.rejected:
            first = f" (first: {rejects.first[0]})" if rejects.first else ""
            warnings.append(f"{report.rejected} rows of {source.path} were left out{first}")
    if not rows:
        raise DataError(f"no row is left of {', '.join(source.path for source in sources)}")
    return Measured(rows[:max_rows], _label(sources, share), warnings)


def split_answer(row: Row) -> tuple[Text, Text | None] | None:
    """Return a row's prompt and its best answer (None without one), or None for raw text, which has no prompt.

    Of a conversation it is the last question and what the assistant said then.
    """
    if row.kind == "text":
        return None
    try:
        prompt = take_prompt(row).prompt
    except ValueError:
        return None
    if row.kind == "messages":
        content = row.completions[0]
        rest = content[len(prompt) :] if isinstance(content, list) else []
        return prompt, rest or None
    if row.kind == "unpaired" and not row.label:
        return prompt, None
    best = 1 if row.kind == "pair" and row.label is not None and row.label < 0.5 else 0
    return prompt, row.completions[best] if row.completions else None


def _limit(source: DataSource, num_rows: int) -> DataSource:
    return source.model_copy(update={"max_rows": min(source.max_rows or num_rows, num_rows)})


def _label(sources: Sequence[DataSource], share: float | None) -> str:
    parts = [source.path if share is not None else f"{source.path}[{source.split}]" for source in sources]
    return ", ".join(parts) + (f" (held-out {share:g})" if share is not None else "")


def _stage(sources: list[DataSource], seed: int) -> Stage:
    """Return what the data room needs of a stage."""
    return Stage(
        recipe_name="eval",
        recipe_path="eval",
        name="eval",
        seed=seed,
        model=ModelOptions(path="none"),
        lora=None,
        launch=LaunchOptions(),
        options=_Options(data=sources, on_bad_row="skip"),
        trainer={},
        origins={},
        run_dir="",
    )
