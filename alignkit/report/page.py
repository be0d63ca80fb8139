"""One self-contained HTML file for a run, for all runs of a recipe, or for the rows of a preview.

It fetches nothing: style, script and figures are inside, and its content security policy lets nothing else in. Every
text of a run is escaped by the template engine.
"""

import base64
import hashlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from alignkit import __version__, console
from alignkit.errors import RunError
from alignkit.report import charts, evaluation, frontier, sections, text
from alignkit.report.facts import Facts, find_runs, order_runs, read_facts
from alignkit.report.verdict import judge
from alignkit.runs.directory import RunDir
from alignkit.runs.files import disk_failures, write_json, write_text

REPORT = "report.html"
_HERE = Path(__file__).parent
_REFRESH_SECONDS = 3


def write_report(path: Path, *, out: Path | None = None) -> Path:
    """Write the report of a run directory, or of a directory of runs, and return where it is.

    Without `out` it is `report.html` in that directory. Raises RunError when there is no run, DiskError.
    """
    directory = path.expanduser().absolute()
    if RunDir(directory).stage.is_file():
        return _write(render_run(read_facts(directory)), out or directory / REPORT)
    found = find_runs(directory) if directory.is_dir() else []
    if not found:
        known = sorted(str(stage.parent) for stage in Path("runs").glob("*/*/stage.json"))
        there = f"the runs here are {', '.join(known)}" if known else "name a run directory such as runs/demo/sft"
        raise RunError(f"holds no run; {there}{'' if known else ', or runs/demo'}", where=str(path))
    return _write_recipe(directory.name, [read_facts(run) for run in found], (), out or directory / REPORT)


def write_recipe_report(name: str, stages: Sequence[tuple[str, Path]], *, out: Path | None = None) -> Path:
    """Write the report of a recipe's stages, given as (name, run directory), into the parent of the first of them.

    Stages that have not begun are shown as waiting. Raises RunError when none has, DiskError.
    """
    begun = [read_facts(path) for _, path in stages if RunDir(path).stage.is_file()]
    if not begun:
        raise RunError("no stage of this recipe has been started; `alignkit run` trains them", where=name)
    waiting = [stage for stage, path in stages if not RunDir(path).stage.is_file()]
    title = str(begun[0].stage.get("recipe") or name)
    return _write_recipe(title, begun, waiting, out or stages[0][1].expanduser().absolute().parent / REPORT)


def _write_recipe(name: str, runs: Sequence[Facts], waiting: Sequence[str], out: Path) -> Path:
    """Write the page of a recipe, in the order in which one stage needs the other; beside it its frontier, if any."""
    ordered = order_runs(runs)
    found = frontier.read_frontiers(ordered)
    parts = [part for run in ordered for part in (run.result, run.evaluation)]
    num_warnings = sum(len(sections.gather_warnings(run)) for run in ordered)
    tiles = [
        ("wall time, with evaluation", text.duration(sum(part.get("wall_seconds") or 0.0 for part in parts))),
        ("tokens", text.short_count(sum(run.result.get("tokens", 0) for run in ordered))),
        ("stages", len(ordered) + len(waiting)),
        ("warning" if num_warnings == 1 else "warnings", num_warnings),
    ]
    page = _render("recipe", title=name, runs=ordered, waiting=waiting, frontiers=found, tiles=tiles,
                   verdicts=list(map(judge, ordered)))  # fmt: skip
    _write(page, out)
    if found:
        write_json(out.with_name("frontier.json"), {"schema": 1, "frontiers": [each.to_dict() for each in found]})
        picture = frontier.draw_file(found[0], (_HERE / "report.css").read_text(encoding="utf-8"))
        write_text(out.with_name("frontier.svg"), picture)
    return out


def watch(find: Callable[[], Sequence[Path]], write: Callable[[], Path]) -> None:
    """Write the page anew as often as a file of the runs changes, until all are finished or Ctrl-C; it reloads itself.

    Nothing is asked of the runs: they may be of another machine that shares the directory.
    """
    shared = open_templates().globals
    shared["refresh_seconds"], seen = _REFRESH_SECONDS, None
    try:
        while True:
            runs = [RunDir(path) for path in find()]
            files = [file for run in runs for file in run.path.glob("*.json*")]
            now = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(files)]
            if now != seen:
                page = write()
                if seen is None:
                    console.note(f"watching: open {page.as_uri()} (Ctrl-C ends this)")
                seen = now
            if all(run.is_finished() for run in runs):
                return
            time.sleep(1)
    except KeyboardInterrupt:
        return
    finally:
        shared["refresh_seconds"] = None


def write_preview(preview: dict[str, Any], out: Path) -> Path:
    """Write the page of `alignkit preview`; `preview` is `Preview.to_dict()`. Raises DiskError."""
    return _write(_render("preview", title=f"{preview['stage']}: rows", run=preview), out)


def render_run(run: Facts) -> str:
    recipe = str(run.stage.get("recipe", ""))
    return _render("run", title=f"{recipe} / {run.name}" if recipe else run.name, run=run, recipe_name=recipe,
                   verdict=judge(run))  # fmt: skip


def _write(page: str, out: Path) -> Path:
    with disk_failures(out.parent, out.name):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    return out


def _render(template: str, **values: Any) -> str:
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = open_templates().get_template(f"{template}.html.jinja")
    return page.render(style=Markup(style), script=Markup(script), script_hash=digest, written=written, **values)


@cache
def open_templates() -> Environment:
    """Prepare the templates of pages and of the card; those of pages escape every text."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names = (text.figure, text.count, text.short_count, text.share, text.duration, text.text_of, text.turns, text.fold,
             frontier.fixed, frontier.between, sections.show_setting, text.short_name)  # fmt: skip
    environment.filters |= {function.__name__: function for function in names}
    environment.globals |= {
        "version": __version__, "METHODS": sections.METHODS, "charts": charts, "evaluate": evaluation,
        "frontier": frontier, "about": sections, "refresh_seconds": None,
    }  # fmt: skip
    return environment
