"""The README describes the present: its reference, its commands and its files are checked against the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_recipe_reference_is_what_the_schema_says() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tests/reference.py")
    assert spec and spec.loader
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.replace(TEXT) == TEXT, "run: python tests/reference.py"


def test_every_command_the_readme_shows_exists() -> None:
    from alignkit.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    shown = set(re.findall(r"^\s*(?:\$ )?alignkit ([a-z]+) (?:--recipe|>)", TEXT, flags=re.MULTILINE))
    assert shown and shown <= known
    assert {name for name in known if f"`alignkit {name}" not in TEXT} == set()


def test_every_file_the_readme_names_exists() -> None:
    named = set(re.findall(r"`((?:recipes|tests|alignkit)/[\w./-]+)`", TEXT))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
