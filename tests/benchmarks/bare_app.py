"""A Typer application with as many commands as alignkit and nothing behind them: what `--help` costs at least."""

from __future__ import annotations

import typer

app = typer.Typer()


@app.callback()
def bare() -> None:
    """Do nothing."""


for name in ("sft", "rm", "dpo", "check", "schema", "doctor", "merge"):
    app.command(name)(lambda: None)

if __name__ == "__main__":
    app()
