"""One self-contained HTML file for a run or for all runs of a recipe.

It fetches nothing and needs no network: style, script and figures are inside, and its content security policy lets
nothing else in. Every text of a run is escaped by the template engine. It computes nothing that is not on disk.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alignkit import __version__
from alignkit.errors import RunError
from alignkit.report.evaluation import tabulate
from alignkit.report.facts import Facts, find_runs, order_runs, parents, read_facts
from alignkit.report.feedback import with_feedback
from alignkit.report.frontier import read_frontiers
from alignkit.report.frontier_view import draw_file, view_frontier
from alignkit.report.lineage import Node, draw_lineage
from alignkit.report.numbers import duration, short_count
from alignkit.report.view import describe_status, gather_warnings, headline, view_run
from alignkit.runs.directory import RunDir
from alignkit.runs.files import disk_failures, write_json, write_text

REPORT = "report.html"
FRONTIER = "frontier.json"


def write_report(path: Path, *, out: Path | None = None) -> Path:
    """Write the report of a run directory, or of a directory of runs, and return where it is.

    Without `out` it is `report.html` in that directory. Raises RunError when there is no run, DiskError.
    """
    directory = path.expanduser().absolute()
    if RunDir(directory).stage.is_file():
        page = render_run(read_facts(directory))
    elif found := find_runs(directory) if directory.is_dir() else []:
        return _write_recipe(directory.name, [read_facts(run) for run in found], (), out or directory / REPORT)
    else:
        raise RunError("holds no run; name a run directory such as runs/demo/sft, or runs/demo", where=str(path))
    return _write(page, out or directory / REPORT)


def write_recipe_report(name: str, stages: Sequence[tuple[str, Path]], *, out: Path | None = None) -> Path:
    """Write the report of a recipe's stages, given as (name, run directory), into the parent of the first of them.

    Stages that have not begun are shown as waiting. Raises RunError when none has, DiskError.
    """
    begun = [read_facts(path) for _, path in stages if RunDir(path.expanduser()).stage.is_file()]
    if not begun:
        raise RunError("no stage of this recipe has been started; `alignkit run` trains them", where=name)
    waiting = [stage for stage, path in stages if not RunDir(path.expanduser()).stage.is_file()]
    title = str(begun[0].stage.get("recipe") or name)
    return _write_recipe(title, begun, waiting, out or stages[0][1].expanduser().absolute().parent / REPORT)


def _write_recipe(name: str, runs: Sequence[Facts], waiting: Sequence[str], out: Path) -> Path:
    """Write the page of a recipe, and beside it what its frontier picture shows, as data and as a picture alone."""
    page = _write(render_recipe(name, runs, waiting=waiting), out)
    if frontiers := read_frontiers(runs):
        write_json(out.parent / FRONTIER, {"schema": 1, "frontiers": [each.to_dict() for each in frontiers]})
        write_text(out.parent / Path(FRONTIER).with_suffix(".svg"), draw_file(frontiers[0]))
    return page


def write_preview(preview: dict[str, Any], out: Path) -> Path:
    """Write the page of `alignkit preview`; `preview` is `Preview.to_dict()`. Raises DiskError."""
    return _write(_render("preview.html.jinja", title=f"{preview['stage']}: rows", run=preview), out)


def render_run(run: Facts) -> str:
    """Return the page of one run."""
    recipe = str(run.stage.get("recipe", ""))
    return _render(
        "run.html.jinja",
        title=f"{recipe} / {run.name}" if recipe else run.name,
        run=view_run(run),
        recipe_name=recipe,
        lineage=draw_lineage(_line_of(run)),
    )


def render_recipe(name: str, runs: Sequence[Facts], *, waiting: Sequence[str] = ()) -> str:
    """Return the page of all runs of a recipe, in the order in which one needs the other."""
    ordered = order_runs(runs)
    total = {
        "stages": len(ordered) + len(waiting),
        "finished": sum(run.is_finished for run in ordered),
        "seconds": duration(sum(run.result.get("wall_seconds", 0.0) for run in ordered)),
        "tokens": short_count(sum(run.result.get("tokens", 0) for run in ordered)),
    }
    return _render(
        "recipe.html.jinja",
        title=name,
        runs=[view_run(run) for run in ordered],
        waiting=waiting,
        total=total,
        evaluation=tabulate([with_feedback(run) for run in ordered]),
        frontiers=[view_frontier(frontier) for frontier in read_frontiers(ordered)],
        num_warnings=sum(len(gather_warnings(run)) for run in ordered),
        lineage=draw_lineage(_tree_of(ordered, waiting)),
    )


def _line_of(run: Facts) -> list[Node]:
    """Return the nodes from the base to this run, and the reward models beside it."""
    nodes: list[Node] = []
    for entry in run.stage.get("lineage") or []:
        path, role = str(entry.get("path", "")), str(entry.get("role", ""))
        action = {"continue": ", continued", "merge": ", merged", "stack": ", stacked"}.get(entry.get("action", ""), "")
        before = (nodes[-1].key,) if nodes else ()
        kind = "base" if role == "base" else "done"
        nodes.append(
            Node(path, _short(path), lines=(role + action,), kind=kind, parents=before, link=_sibling(run, path))
        )
    start = tuple(node.key for node in nodes[-1:])
    rewards = run.stage.get("reward_stages") or {}
    nodes += [
        Node(path, name, lines=("gives the reward",), link=_sibling(run, path))
        for path, name in rewards.items()
        if path not in start
    ]
    return [*nodes, _node(run, start, tuple(path for path in rewards if path not in start), current=True)]


def _sibling(run: Facts, model: str) -> str:
    """Return the link to the report of the run beside this one that made a model; empty when it has none."""
    name = Path(model).parent.name
    has_report = Path(model).name == "model" and (run.path.parent / name / REPORT).is_file()
    return f"../{quote(name)}/{REPORT}" if has_report else ""


def _tree_of(runs: Sequence[Facts], waiting: Sequence[str]) -> list[Node]:
    """Return the nodes of all runs of a recipe, with the base each begins with."""
    known = {run.name for run in runs}
    bases: dict[str, Node] = {}
    nodes: list[Node] = []
    for run in runs:
        needed = [name for name in parents(run) if name in known]
        start = run.stage.get("start_stage")
        if start in known:
            begins: tuple[str, ...] = (str(start),)
        else:
            model = run.stage.get("model") or {}
            path = str(run.stage.get("start_dir") or model.get("path", ""))
            fact = "random weights" if model.get("init") == "scratch" else "base"
            bases.setdefault(path, Node(path, _short(path), lines=(fact,), kind="base"))
            begins = (path,)
        advisers = tuple(name for name in dict.fromkeys(needed) if name != start)
        nodes.append(_node(run, begins, advisers, link=f"#{quote(run.name)}"))
    later = [Node(name, name, lines=("not started",), kind="waiting") for name in waiting]  # of which no run tells
    return [*bases.values(), *nodes, *later]


def _node(
    run: Facts, begins: tuple[str, ...], advisers: tuple[str, ...], *, current: bool = False, link: str = ""
) -> Node:
    figures = [f"{label.removesuffix(', held out')} {value}" for label, value in headline(run)[:1]]
    state = describe_status(run) if not run.is_finished else ", ".join(figures)
    found = (run.stage.get("data") or {}).get("sources", [])
    sources = ", ".join(_short(str(source.get("path", ""))) for source in found)
    return Node(
        run.name, run.name, tag=run.method if run.method != run.name else "", lines=(state, sources),
        kind="done" if run.is_finished else "stopped", parents=begins, advisers=advisers, current=current, link=link,
    )  # fmt: skip


def _short(path: str) -> str:
    """Return the name of a model or a source: the run's for `runs/a/sft/model`, the file's or a hub id itself."""
    parts = [part for part in path.split("/") if part]
    if parts and parts[-1] == "model":
        parts = parts[:-1]
    return path if len(parts) <= 2 and not path.startswith(("/", ".", "~")) and "runs" not in parts else parts[-1]


def _write(page: str, out: Path) -> Path:
    with disk_failures(out.parent, out.name):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    return out


def _render(template: str, **values: Any) -> str:
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(_asset("report.css")),
            script=Markup(script),
            script_hash=digest,
            version=__version__,
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **values,
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("alignkit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return files("alignkit.report").joinpath(name).read_text(encoding="utf-8")
