"""The model card: README.md beside the weights, with the facts of the run and metadata the Hugging Face hub reads.

It holds no row of the data, no secret and no path of this machine: a local model or file is told by its last name only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import RunError
from alignkit.report import sections
from alignkit.report.evaluation import tabulate
from alignkit.report.facts import Facts, read_facts
from alignkit.report.page import open_templates
from alignkit.report.text import count, figure
from alignkit.runs.directory import CARD, RunDir
from alignkit.runs.files import write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_FILE = re.compile(r".*\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|yaml)", re.IGNORECASE)
_PATH = re.compile(r"(?:~|\.{0,2})(?:/[^\s/:,;'\"()]+){2,}/?|(?<![\w/.-])(?:[\w.-]+/){2,}[\w.-]+")


def write_card(path: Path, *, repo: str | None = None) -> Path | None:
    """Write the card of a finished run into its model directory and return its path; None when there is no model.

    `repo` is the hub id it will be published under. Raises RunError when the directory is no run, DiskError.
    """
    run = RunDir(path)
    if not run.model.is_dir():
        return None
    if run.model.is_symlink():
        raise RunError("is a link, and the card would be written where it points to", where=str(run.model))
    write_text(run.model / CARD, render_card(read_facts(run.path), repo=repo))
    return run.model / CARD


def render_card(run: Facts, *, repo: str | None = None) -> str:
    """Render the card's text: YAML metadata, then Markdown."""
    stage, model = run.stage, RunDir(run.path).model
    name = repo.rpartition("/")[2] if repo else run.full_name.replace("/", "-")
    roots = [str(entry.get("path", "")) for entry in stage.get("lineage") or [] if entry.get("role") == "base"]
    root = roots[0] if roots else str((stage.get("model") or {}).get("path", ""))
    base = root if is_public(root) else None  # a reader could not find a local one
    is_adapter = (model / "adapter_config.json").is_file()
    forms = {form for source in run.sources for form in source.get("forms", ())}
    text = open_templates().get_template("card.md.jinja").render(
        name=_cell(name),
        repo=repo or re.sub(r"[^\w.-]+", "-", name),
        run=run,
        method=sections.METHODS.get(run.method, run.method),
        is_adapter=is_adapter,
        is_reward=run.method == "rm",
        has_chat=(not forms or "chat" in forms) and (model / "chat_template.jinja").is_file(),
        has_held_out=any(str(key).startswith("eval_") for key in run.result.get("metrics", {})),
        base=base,
        lineage=[(_cell(public_name(str(entry.get("path", "")))),
                  _cell(", ".join(str(entry[key]) for key in ("role", "action") if entry.get(key))))
                 for entry in stage.get("lineage") or []],
        rewards=[_cell(name) for name in (stage.get("reward_stages") or {}).values()],
        data=[(_cell(hide_paths(public_name(str(source.get("path", ""))))), count(source.get("kept", 0)),
               _cell(", ".join(source.get("formats") or {}))) for source in run.sources],
        settings=_list_settings(run),
        metrics=[(_cell(key), figure(value)) for key, value in run.result.get("metrics", {}).items()
                 if isinstance(value, int | float)],
        evaluation=[(_cell(f"{row.name}, {row.slice}" if row.slice else row.name), f"{row.value} {row.unit}".strip(),
                     row.interval, row.n, _cell(hide_paths(row.data))) for row in tabulate([run])],
        cost=[*sections.describe_cost(run),
              *(pair for pair in sections.describe_hardware(run) if pair[0] not in ("system", "git"))],
        versions=stage.get("versions") or {},
        warnings=[hide_paths(message) for message, _ in sections.gather_warnings(run)],
        cell=_cell,
    )  # fmt: skip
    return f"---\n{_describe(run, name, base, is_adapter=is_adapter).to_yaml()}\n---\n\n{text.strip()}\n"


def public_name(path: str) -> str:
    """Shorten a model or data source to what may be told: a hub id or builtin name as it is, else the last name."""
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
    """Cut every path in a text to its last name."""
    return _PATH.sub(lambda found: public_name(found[0]), text)


def _describe(run: Facts, name: str, base: str | None, *, is_adapter: bool) -> ModelCardData:
    """Collect the metadata; its model index has the whole figures of eval.json, without slices."""
    from huggingface_hub import EvalResult, ModelCardData

    is_reward = run.method == "rm"
    task = "text-classification" if is_reward else "text-generation"
    on_hub = base if base and not base.startswith("builtin:") else None
    sources = [str(source.get("path", "")) for source in (run.stage.get("options") or {}).get("data") or []]
    datasets = [path for path in dict.fromkeys(sources) if is_public(path) and not path.startswith("builtin:")]
    results = []
    for result in run.evaluation.get("results", []):
        value, data = result.get("value"), hide_paths(str(result.get("data") or "unknown"))
        if result.get("slice") is None and isinstance(value, int | float):
            kind = data.partition("[")[0] or "unknown"
            results.append(EvalResult(task, kind, data, metric_type=str(result.get("metric")), metric_value=value))
    return ModelCardData(
        base_model=on_hub,
        base_model_relation=("adapter" if is_adapter else "finetune") if on_hub else None,
        datasets=datasets or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=task,
        tags=["alignkit", "trl", run.method, *["reward-model"] * is_reward, *["lora"] * is_adapter],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _list_settings(run: Facts) -> list[tuple[str, str]]:
    """List the settings that the recipe gave for this stage and that are plain values, paths left out."""
    found = []
    for key, value, origin in sections.list_settings(run):
        section, _, name = key.rpartition(".")
        is_told = key == "seed" or (origin != "default" and section in ("lora", run.name) and name != "start_from")
        if is_told and isinstance(value, int | float | str) and "/" not in str(value):
            found.append((name if section != "lora" else key, _cell(str(value))))
    return found


def _cell(text: Any) -> str:
    """Escape a text so that Markdown shows it as it is, inside a table or out of it."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", flat)
