"""The README and the files beside the recipes describe the present: reference, commands and files named exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE, REFERENCE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "recipes/README.md", "recipes/REFERENCE.md")
)
TEXT = README + GUIDE + REFERENCE


def test_the_recipe_reference_is_what_the_schema_says() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tests/reference.py")
    assert spec and spec.loader
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.replace(REFERENCE) == REFERENCE, "run: python tests/reference.py"


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


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 15 * 1024


def test_links_between_the_pages_lead_somewhere() -> None:
    papers = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "recipes/papers").rglob("*.md"))
    for page in ("README.md", "recipes/README.md", "recipes/REFERENCE.md", *papers):
        text = (ROOT / page).read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == [], page
