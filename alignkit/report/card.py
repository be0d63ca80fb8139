"""The model card: README.md beside the weights, with the facts of the run and metadata the Hugging Face hub reads.

It holds no row of the data, no secret and no path of this machine: a local model or file is told by its last name only.
It uploads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit import __version__
from alignkit.errors import RunError
from alignkit.report.evaluation import Row, tabulate
from alignkit.report.facts import Facts, read_facts
from alignkit.report.numbers import count, duration, figure
from alignkit.report.view import METHODS, describe_cost, describe_hardware, gather_warnings
from alignkit.runs.directory import CARD, RunDir
from alignkit.runs.files import write_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_FILE = re.compile(r".*\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|yaml)", re.IGNORECASE)
_PATH = re.compile(r"(?:~|\.{0,2})(?:/[^\s/:,;'\"()]+){2,}/?|(?<![\w/.-])(?:[\w.-]+/){2,}[\w.-]+")


def write_card(path: Path, *, repo: str | None = None) -> Path | None:
    """Write the card of a finished run into its model directory and return its path; None when there is no model.

    `repo` is the hub id it will be published under. Raises RunError when the directory is no run, DiskError.
    """
    run = RunDir(path.expanduser().absolute())
    if not run.model.is_dir():
        return None
    card = run.model / CARD
    if run.model.is_symlink():
        raise RunError("is a link, and the card would be written where it points to", where=str(run.model))
    write_text(card, render_card(read_facts(run.path), repo=repo))
    return card


def render_card(run: Facts, *, repo: str | None = None) -> str:
    """Return the card's text: YAML metadata, then Markdown."""
    recipe = str(run.stage.get("recipe", ""))
    name = repo.rpartition("/")[2] if repo else "-".join(part for part in (recipe, run.name) if part)
    is_adapter = _is_adapter(run)
    text = (
        _environment()
        .get_template("card.md.jinja")
        .render(
            name=_cell(name),
            repo=repo or re.sub(r"[^\w.-]+", "-", name),
            run=run,
            method=METHODS.get(run.method, run.method),
            is_adapter=is_adapter,
            is_reward=run.method == "rm",
            has_chat=_has_template(run),
            has_held_out=any(str(key).startswith("eval_") for key in run.result.get("metrics", {})),
            base=_base(run),
            lineage=[(_cell(public_name(str(entry.get("path", "")))), _role(entry))
                     for entry in run.stage.get("lineage") or []],
            rewards=[_cell(name) for name in (run.stage.get("reward_stages") or {}).values()],
            data=_data(run),
            settings=_settings(run),
            metrics=[(_cell(key), figure(value)) for key, value in run.result.get("metrics", {}).items()
                     if isinstance(value, int | float)],
            evaluation=[_plain(row) for row in tabulate([run])],
            cost=[*describe_cost(run), *(pair for pair in describe_hardware(run) if pair[0] not in ("system", "git"))],
            versions=run.stage.get("versions") or {},
            warnings=[hide_paths(message) for message, _ in gather_warnings(run)],
            version=__version__,
        )
    )  # fmt: skip
    return f"---\n{_metadata(run, name).to_yaml()}\n---\n\n{text.strip()}\n"


def public_name(path: str) -> str:
    """Return what may be said of a model or data source: a hub id or builtin name as it is, else the last name."""
    if is_public(path):
        return path
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    if parts and parts[-1] == "model" and len(parts) > 1:  # `model/` of a run is told by the run
        parts.pop()
    return parts[-1] if parts else "local"


def is_public(path: str) -> bool:
    """Tell whether a path means the same to everybody: a hub id or a builtin, as far as its form and the disk tell."""
    if path.startswith("builtin:"):
        return True
    is_id = bool(_HUB_ID.fullmatch(path)) and not _DATA_FILE.fullmatch(path) and ".." not in path and "--" not in path
    return is_id and not Path(path).exists()


def hide_paths(text: str) -> str:
    """Return a text with every path in it cut to its last name."""
    return _PATH.sub(lambda found: public_name(found[0]), text)


def _metadata(run: Facts, name: str) -> ModelCardData:
    from huggingface_hub import ModelCardData

    base = _base(run)
    on_hub = base if base and not base.startswith("builtin:") else None
    sources = [str(source.get("path", "")) for source in (run.stage.get("options") or {}).get("data") or []]
    datasets = [path for path in dict.fromkeys(sources) if is_public(path) and not path.startswith("builtin:")]
    is_adapter = _is_adapter(run)
    results = _eval_results(run)
    return ModelCardData(
        base_model=on_hub,
        base_model_relation=("adapter" if is_adapter else "finetune") if on_hub else None,
        datasets=datasets or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if run.method == "rm" else "text-generation",
        tags=["alignkit", "trl", run.method, *(["reward-model"] if run.method == "rm" else []),
              *(["lora"] if is_adapter else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )  # fmt: skip


def _eval_results(run: Facts) -> list[EvalResult]:
    """Return the whole figures of eval.json, without slices, as the hub's model index wants them."""
    from huggingface_hub import EvalResult

    found = []
    for result in run.evaluation.get("results", []):
        value = result.get("value")
        if result.get("slice") is not None or not isinstance(value, int | float):
            continue
        data = hide_paths(str(result.get("data") or "unknown"))
        found.append(
            EvalResult(
                task_type="text-classification" if run.method == "rm" else "text-generation",
                dataset_type=data.partition("[")[0] or "unknown",
                dataset_name=data,
                metric_type=str(result.get("metric")),
                metric_value=value,
            )
        )
    return found


def _base(run: Facts) -> str | None:
    """Return the public name of the base; None for a local one, which a reader could not find."""
    roots = [str(entry.get("path", "")) for entry in run.stage.get("lineage") or [] if entry.get("role") == "base"]
    path = roots[0] if roots else str((run.stage.get("model") or {}).get("path", ""))
    return path if is_public(path) else None


def _is_adapter(run: Facts) -> bool:
    return (RunDir(run.path).model / "adapter_config.json").is_file()


def _has_template(run: Facts) -> bool:
    """Tell whether the model talks in turns: it has a template, and was trained on rows in it."""
    sources = (run.stage.get("data") or {}).get("sources", ())
    forms = {form for source in sources for form in source.get("forms", ())}
    return (not forms or "chat" in forms) and (RunDir(run.path).model / "chat_template.jinja").is_file()


def _role(entry: dict[str, Any]) -> str:
    return _cell(", ".join(str(entry[key]) for key in ("role", "action") if entry.get(key)))


def _data(run: Facts) -> list[tuple[str, str, str]]:
    """Return name, rows and formats of each source."""
    sources = (run.stage.get("data") or {}).get("sources", [])
    return [
        (_cell(hide_paths(public_name(str(source.get("path", ""))))), count(int(source.get("kept", 0))),
         _cell(", ".join(source.get("formats") or {})))
        for source in sources
    ]  # fmt: skip


def _settings(run: Facts) -> list[tuple[str, str]]:
    """Return the settings that the recipe gave for this stage and that are plain values, paths left out."""
    origins = run.stage.get("origins") or {}
    sections: Sequence[tuple[str, Any]] = (
        ("lora", run.stage.get("lora")), (run.name, run.stage.get("options")), (run.name, run.stage.get("trainer")),
    )  # fmt: skip
    rows = [("seed", str(run.stage.get("seed")))]
    for section, values in sections:
        for key, value in (values or {}).items():
            given = origins.get(f"{section}.{key}", "default") != "default"
            if given and isinstance(value, int | float | str) and "/" not in str(value) and key not in ("start_from",):
                rows.append((key if section == run.name else f"{section}.{key}", _cell(str(value))))
    return rows


def _plain(row: Row) -> tuple[str, str, str, str, str]:
    """Return an evaluation row as cells: metric with its slice, value, interval, n, data."""
    name = f"{row.name}, {row.slice}" if row.slice else row.name
    unit = f" {row.unit}" if row.unit else ""
    return _cell(name), row.value + unit, row.interval, row.n, _cell(hide_paths(row.data))


def _cell(text: str) -> str:
    """Return a text that Markdown shows as it is, inside a table or out of it."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", flat)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("alignkit.report", "."),
        autoescape=False,  # Markdown; `_cell` escapes what a run says
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "duration": duration}
    return environment
