"""The rows of the benchmark table and how they are written; it measures nothing."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent
RESULTS = DIRECTORY / "RESULTS.md"
ROWS = DIRECTORY / "results.json"  # every row by case, so that one case can be measured again alone
PACKAGES = ("alignkit", "trl", "transformers", "torch", "accelerate", "datasets", "typer")


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` is ours by theirs, `bar` what it is held against, such as `<= 0.7`."""

    what: str
    ours: str
    theirs: str
    against: str
    ratio: float
    bar: str = ""

    @property
    def verdict(self) -> str:
        """Return yes or no, or nothing where no bar is set."""
        if not self.bar:
            return ""
        sign, limit = self.bar.split()
        return "yes" if (self.ratio <= float(limit) if sign == "<=" else self.ratio >= float(limit)) else "no"


def save_rows(measured: dict[str, Sequence[Row]], *, order: Sequence[str]) -> str:
    """Put the measured cases beside those measured before, write the table, and return it as Markdown."""
    known = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}
    machine = describe_machine()
    known |= {case: {"machine": machine, "rows": [asdict(row) for row in rows]} for case, rows in measured.items()}
    known = {case: known[case] for case in order if case in known}
    ROWS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    text = format_table({case: entry["rows"] for case, entry in known.items()}, machine)
    RESULTS.write_text(text, encoding="utf-8")
    return text


def format_table(cases: dict[str, list[dict[str, object]]], machine: str) -> str:
    """Return the Markdown page."""
    lines = [
        "# Benchmarks",
        "",
        "Medians of several runs in turn (A B A B) on one machine; a ratio is the median over rounds of ours by",
        "theirs. `make bench` measures all of it again; `python tests/benchmarks/run.py --only CASE` one part.",
        "",
        f"Last measured on {machine}.",
        "",
        "| case | what | alignkit | against | | ratio | bar | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, rows in cases.items():
        for values in rows:
            row = Row(**values)  # type: ignore[arg-type]
            cells = (case, row.what, row.ours, row.against, row.theirs, f"{row.ratio:.2f}", row.bar, row.verdict)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def describe_machine() -> str:
    """Return what the figures depend on."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {packages}"
