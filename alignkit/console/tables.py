"""Results on stdout: tables, values and JSON, with no decoration that a pipe would have to strip."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.console.clean import printable, printable_json
from alignkit.console.say import write


def print_json(data: Any) -> None:
    """Write data to stdout for a script."""
    print(printable_json(json.dumps(data, indent=2, ensure_ascii=False, default=str)))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table to stdout: aligned columns, no decoration a pipe would have to strip."""
    cells = [[str(column) for column in columns], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    if title:
        write(title)
    for number, row in enumerate(cells):
        write("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            write("  " + "  ".join("-" * width for width in widths))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def print_stage(stage: Mapping[str, Any], *, will: str) -> None:
    """Write a resolved stage to stdout: what would run, then every value with its origin.

    `stage` is `Stage.to_dict()`.
    """
    name, origins = stage["stage"], stage["origins"]
    write(f"stage {name} ({stage['method']}) of {stage['recipe_path']}")
    write(f"would run: {will}")
    write(f"run directory: {stage['run_dir']}")
    rows: list[tuple[str, Any, str]] = [("seed", stage["seed"], origins.get("seed", "default"))]
    for section, values in (("model", stage["model"]), ("lora", stage["lora"]), ("launch", stage["launch"])):
        rows += [
            (f"{section}.{key}", value, origins.get(f"{section}.{key}", "default"))
            for key, value in (values or {}).items()
        ]
    for values in (stage["options"], stage["trainer"]):
        rows += [(f"{name}.{key}", value, origins.get(f"{name}.{key}", "default")) for key, value in values.items()]
    print_table("", ("key", "from", "value"), [(key, origin, json.dumps(value)) for key, value, origin in rows])


def print_launch(launch: Mapping[str, Any]) -> None:
    """Write to stdout what would be started where; `launch` is `Plan.to_dict()`."""
    place = launch["placement"]
    if launch["mode"] == "worker":
        write("would start: nothing, this is one of the processes that a launcher has started")
        return
    if launch["mode"] == "in-process":
        write(f"would start: nothing else, it runs in this process on {place['device']}")
        return
    nodes = f"{place['nodes']} nodes with " if place["nodes"] > 1 else ""
    each = " each" if nodes else ""
    write(f"would start: {nodes}{place['processes']} processes{each} ({place['strategy']}, {place['device']})")
    if nodes:
        known = {key: "not known yet" if place[key] is None else place[key] for key in place}
        write(f"this node: {known['node_rank']}; node 0 at {known['main_address']}:{known['main_port']}")
    write(f"$ {launch['command']}")
    for name in ("config", "deepspeed"):
        if launch[name]:
            write(f"\n{launch[f'{name}_file']}:")
            text = launch[name] if isinstance(launch[name], str) else json.dumps(launch[name], indent=2)
            write("\n".join(f"  {line}" for line in text.splitlines()))


def print_result(result: Mapping[str, Any]) -> None:
    """Write how a stage ended to stdout."""
    made = f"at step {result['step']}, model in {result['model_dir']}" if result["model_dir"] else ""
    write(f"{result['stage']}: {result['status']} {made or 'with {} rows'.format(result['step'])}")
    for key, value in result.get("metrics", {}).items():
        write(f"  {key} = {_cell(value)}")


def print_paths(paths: Mapping[str, str]) -> None:
    """Write what was made and where it is to stdout, one line each."""
    for name, path in paths.items():
        write(f"{name}: {path}")


def print_jobs(jobs: Sequence[Mapping[str, Any]], *, scripts: bool) -> None:
    """Write batch jobs to stdout: what was submitted, or the commands that would, ready for a shell.

    `jobs` are `Job.to_dict()`; with `scripts` their text comes first.
    """
    for job in jobs if scripts else ():
        write(f"# {job['path']}\n{job['script']}")
    if any(job["job_id"] for job in jobs):
        rows = [(job["stage"], job["job_id"], ", ".join(job["depends_on"]) or None, job["path"]) for job in jobs]
        print_table("", ("stage", "job", "after", "script"), rows)
        return
    for number, job in enumerate(jobs, 1):
        # `$job_N` is for the shell to fill in; everything else is quoted.
        line = " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in job["submit"])
        write(f"job_{number}=$({line})  # {job['stage']}" if len(jobs) > 1 else line)


def print_agenda(entries: Sequence[Mapping[str, Any]]) -> None:
    """Write what a run would do with each stage to stdout, and why; `entries` are `Entry.to_dict()`."""
    rows = [
        (entry["stage"], entry["method"], ", ".join(entry["needs"]) or None, entry["will"], entry["why"])
        for entry in entries
    ]
    print_table("", ("stage", "method", "needs", "will", "why"), rows)


def print_run(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    """Write one line for each stage of a run to stdout: how it ended, where it stopped, what it did not come to."""
    by_name = {result["stage"]: result for result in results}
    stopped = next((name for name in names if name not in by_name), None)
    rows = []
    for name in names:
        result = by_name.get(name, {"status": "not finished" if name == stopped else "not reached"})
        seconds = result.get("wall_seconds")
        rows.append(
            (name, result["status"], result.get("step"), None if seconds is None else f"{seconds:.0f}",
             result.get("model_dir") or None)
        )  # fmt: skip
    print_table("", ("stage", "status", "steps or rows", "seconds", "model"), rows)
