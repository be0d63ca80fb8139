"""How soon alignkit answers: `--help`, and a typo in a recipe."""

from __future__ import annotations

import sys
from pathlib import Path

from table import Row
from timing import Command, Run, alternate, median_ratio, median_seconds

SCRIPTS = Path(sys.executable).parent
BARE_APP = Path(__file__).resolve().parent / "bare_app.py"

BAD_RECIPE = """\
name: typo
model: {path: builtin:tiny-gpt2}
dpo:
  data: {path: builtin:preferences}
  betta: 0.2
"""
BAD_TRL_CONFIG = """\
model_name_or_path: model
output_dir: out
use_cpu: true
bf16: false
betta: 0.2
"""


def measure_help(directory: Path, *, runs: int) -> list[Row]:
    """Time `alignkit --help` against a bare Typer application with as many commands."""
    found = alternate(
        [
            Command("alignkit --help", [str(SCRIPTS / "alignkit"), "--help"], directory),
            Command("bare app --help", [sys.executable, str(BARE_APP), "--help"], directory),
        ],
        runs=runs,
    )
    return [_row("help", found, "alignkit --help", "bare app --help", "a bare Typer app", "<= 1.5")]


def measure_bad_recipe(directory: Path, *, runs: int) -> list[Row]:
    """Time the way from a misspelt key to its message, against two imports and against TRL's own command."""
    recipe, config = directory / "typo.yaml", directory / "typo-trl.yaml"
    recipe.write_text(BAD_RECIPE, encoding="utf-8")
    config.write_text(BAD_TRL_CONFIG, encoding="utf-8")
    ours = "alignkit dpo"
    found = alternate(
        [
            Command(ours, [str(SCRIPTS / "alignkit"), "dpo", "--recipe", str(recipe)], directory, expect=2),
            Command("imports", [sys.executable, "-c", "import typer, pydantic"], directory),
        ],
        runs=runs,
    )
    _require(found[ours], "typo.yaml:5", "beta")
    trl = alternate(
        [
            Command(ours, [str(SCRIPTS / "alignkit"), "dpo", "--recipe", str(recipe)], directory, expect=2),
            Command("trl dpo", [str(SCRIPTS / "trl"), "dpo", "--config", str(config)], directory, expect=2),
        ],
        runs=max(runs // 5, 1),
    )
    _require(trl["trl dpo"], "betta")
    return [
        _row("misspelt key to message", found, ours, "imports", "`import typer, pydantic`", "<= 3"),
        _row("misspelt key to message", trl, ours, "trl dpo", "`trl dpo`", ""),
    ]


def _row(what: str, found: dict[str, list[Run]], ours: str, theirs: str, against: str, bar: str) -> Row:
    return Row(
        what,
        f"{median_seconds(found[ours]):.2f} s",
        f"{median_seconds(found[theirs]):.2f} s",
        against,
        median_ratio(found[ours], found[theirs]),
        bar,
    )


def _require(runs: list[Run], *texts: str) -> None:
    for run in runs:
        missing = [text for text in texts if text not in run.output]
        if missing:
            raise RuntimeError(f"the message does not name {missing}:\n{run.output}")
