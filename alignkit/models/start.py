"""Where the weights of a stage come from: a base, perhaps an adapter on it, and what both were made of.

Deliberately opens no weights: everything is inspected here before `load` reads any of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import ModelError
from alignkit.models.configs import read_config
from alignkit.models.files import ModelFiles, find_model_dir, fingerprint_weights, inspect_model_dir, is_builtin
from alignkit.models.hub import fetch_adapter
from alignkit.models.scratch import override_config
from alignkit.recipe.stage import Stage


def is_random(stage: Stage) -> bool:
    """Say whether the base of a stage is drawn, not read: builtin, or init: scratch."""
    return is_builtin(stage.model.path) or stage.model.init == "scratch"


@dataclass(frozen=True, slots=True)
class Start:
    """Where the weights of a stage come from."""

    base: str  # builtin name, hub id or directory
    revision: str | None
    adapter: Path | None
    reward: bool
    lineage: list[dict[str, Any]]


def find_start(stage: Stage) -> Start:
    """Say what the stage starts from, adapters apart from their base, everything inspected before it is opened."""
    source = stage.start_dir or stage.model.path
    revision = None if stage.start_dir else stage.model.revision
    directory = find_model_dir(source)
    if directory is None and not is_builtin(source):
        directory = fetch_adapter(source, revision)
    if not stage.start_dir and is_random(stage):
        entry = {"role": "base", "path": source, "seed": stage.seed, "config": stage.model.config}
        return Start(source, revision, None, False, [entry])
    if stage.model.config and not stage.start_dir:
        raise ModelError(
            "model.config changes only random weights; set model.init: scratch or leave it out",
            where=stage.where("model.config"),
        )
    if directory is None:
        return Start(source, revision, None, False, [{"role": "base", "path": source, "revision": revision}])
    files = inspect_model_dir(directory, trust_code=stage.trust_code)
    if files.kind == "full":
        lineage = [*files.record.get("lineage", []), {"role": "model", "path": str(directory)}]
        return Start(str(directory), None, None, files.reward, lineage)
    base = find_base(files)
    if stage.start_dir:
        _check_same_base(files, base, stage)
    lineage = files.record.get("lineage") or [{"role": "base", "path": base}]
    return Start(base, files.base_revision, directory, files.reward, lineage)


def choose_action(stage: Stage, start: Start) -> str:
    """Return new, continue, merge or stack; refuse what would lose the adapter or have no effect."""
    where = stage.where(f"{stage.name}.adapter")
    wanted = stage.training.adapter
    if start.adapter is None:
        if wanted is not None:
            raise ModelError(f"adapter: {wanted} has no effect: the stage does not start from an adapter", where=where)
        return "new"
    if stage.lora is None and wanted != "merge":
        raise ModelError(
            f"{start.adapter} is an adapter but there is no lora: section; add lora: to train it on, or adapter: merge "
            "to fold it into the base and train that in full",
            where=where,
        )
    return wanted or "continue"


def context_length(stage: Stage) -> int | None:
    """Return the positions of the model a stage starts from; None where its config names no limit.

    Raises ModelError, or EnvironmentProblem when a hub id cannot be reached.
    """
    start = find_start(stage)
    config = read_config(start.base, revision=start.revision, trust_code=stage.trust_code)
    if is_random(stage) and start.base == stage.model.path:
        config = override_config(config, stage.model.config, where=stage.where("model.config"))
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def find_base(files: ModelFiles) -> str:
    """Return where the base of an adapter is: as written, or `base/` beside it when the run was moved."""
    assert files.base is not None
    if is_builtin(files.base):
        raise ModelError(f"{files.path} names {files.base} as its base, which has no files; train it again")
    if Path(files.base).is_dir():
        return files.base
    beside = files.path.parent / "base"
    if Path(files.base).name == "base" and beside.is_dir():
        return str(beside)
    try:
        find_model_dir(files.base)
    except ModelError as error:
        raise ModelError(
            f"its base {files.base} is gone; put it back or edit base_model_name_or_path", where=str(files.path)
        ) from error
    return files.base  # a hub id


def _check_same_base(files: ModelFiles, base: str, stage: Stage) -> None:
    """Raise ModelError unless the adapter was trained on the model the recipe names.

    They are the same by name, by what alignkit recorded, or by the bytes of the weights when one was copied.
    """
    wanted = stage.model.path
    recorded = [*files.record.get("lineage", []), *_record_of(base).get("lineage", [])]
    same_name = [entry for entry in recorded if _canonical(entry.get("path", "")) == _canonical(wanted)]
    drawn_alike = all(entry.get("config", {}) == stage.model.config for entry in same_name if "seed" in entry)
    if (same_name and drawn_alike) or _canonical(base) == _canonical(wanted):
        return
    local, other = find_model_dir(base), None if is_builtin(wanted) else find_model_dir(wanted)
    if local and other and fingerprint_weights(local) == fingerprint_weights(other):
        return
    roots = [entry["path"] for entry in recorded[:1]] or [base]
    config = f" with model.config {same_name[0].get('config')}" if same_name else ""
    raise ModelError(
        f"the adapter in {files.path} was trained on {roots[0]}{config}, not on model.path {wanted}; set model.path "
        "(and model.config) to its base, or start from another stage",
        where=stage.where(f"{stage.name}.start_from"),
    )


def _record_of(base: str) -> dict[str, Any]:
    directory = find_model_dir(base)
    return inspect_model_dir(directory, trust_code=True).record if directory else {}


def _canonical(path: str) -> str:
    local = Path(path).expanduser()
    return str(local.resolve()) if path and not is_builtin(path) and local.exists() else path
