"""Chat or text: the form of the rows that a model was trained on, and the error where two forms meet in one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import DataError
from alignkit.recipe.schema import PpoOptions
from alignkit.recipe.stage import Stage
from alignkit.runs.files import read_json

_NOTHING: Mapping[str, str | None] = {}
_SAYS = {"chat": "turns of its chat template", "text": "text without a chat template"}


def form_of(report: Mapping[str, Any]) -> str | None:
    """Tell the form of rows, "chat" or "text", by `DataReport.to_dict()`; None for raw text alone, which fits both.

    Raises DataError when a stage's sources have both.
    """
    found = {form: source["path"] for source in report.get("sources", ()) for form in source.get("forms", ())}
    found.pop("raw", None)
    if len(found) > 1:
        sides = ", ".join(f"{path} as {_SAYS[form]}" for form, path in found.items())
        raise DataError(f"one model reads both forms: {sides}; set chat: true or chat: false for all of them")
    return next(iter(found), None)


def form_of_run(model: str | Path) -> str | None:
    """Tell the form a run was trained on; None for what is no run of ours, or one that does not say."""
    path = Path(model)
    for record in (path / "stage.json", path.parent / "stage.json"):
        if record.is_file():
            return form_of(read_json(record).get("data") or {})
    return None


def require_form(stage: Stage, form: str | None, planned: Mapping[str, str | None] = _NOTHING) -> None:
    """Raise DataError when a stage's rows have another form than a model it uses was trained on.

    `planned` has the forms of this recipe's stages that are not trained yet, by their names.
    """
    used = [("the model it starts from", stage.start_dir or stage.model.path, stage.start_stage)]
    for reward in stage.options.reward if isinstance(stage.options, PpoOptions) else ():
        if reward.model is not None:
            used.append(("its reward model", reward.model, stage.reward_stages.get(reward.model)))
    for role, model, name in used:
        other = form_of_run(model) or planned.get(name or "")
        if form and other and form != other:
            raise DataError(
                f"the rows are {_SAYS[form]}, and {role} ({name or model}) was trained on {_SAYS[other]}; chat: "
                f"{str(other == 'chat').lower()} gives them the same form",
                where=stage.where(f"{stage.name}.data"),
            )
