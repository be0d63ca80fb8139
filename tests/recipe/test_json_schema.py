"""The JSON Schema is one an editor can use: every key, with its description, its choices and its default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from alignkit.errors import UsageError
from alignkit.preflight.starter import install_schema
from alignkit.recipe import methods, recipe_schema
from alignkit.recipe import schema as options
from alignkit.recipe.methods import FEEDBACK, OPTIONS
from alignkit.recipe.words import method_fields

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "recipes").rglob("*.yaml"))


def walk(fragment: Any) -> Iterator[dict[str, Any]]:
    if isinstance(fragment, dict):
        yield fragment
    for child in fragment.values() if isinstance(fragment, dict) else fragment if isinstance(fragment, list) else ():
        yield from walk(child)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema()


def test_it_is_plain_json_with_a_draft_and_no_dangling_reference(schema: dict[str, Any]) -> None:
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    references = {part["$ref"] for part in walk(schema) if isinstance(part.get("$ref"), str)}
    assert {reference.removeprefix("#/$defs/") for reference in references} <= set(schema["$defs"])


def test_every_key_of_every_section_has_a_description(schema: dict[str, Any]) -> None:
    sections = [schema, *schema["$defs"].values()]
    missing = [
        key
        for section in sections
        for key, fragment in section.get("properties", {}).items()
        if not fragment.get("description") and "$ref" not in fragment
    ]
    assert missing == []


@pytest.mark.parametrize("method", OPTIONS)
def test_a_stage_has_alignkits_keys_and_trls(method: str, schema: dict[str, Any]) -> None:
    properties = schema["$defs"][f"{method}_stage"]["properties"]
    assert set(properties) == {*OPTIONS[method].model_fields, *method_fields(method)}
    if method in FEEDBACK:  # they train nothing
        assert "learning_rate" not in properties
        return
    assert properties["learning_rate"]["description"].endswith("Typical: 1e-6 to 5e-4.")
    assert "cosine" in properties["lr_scheduler_type"]["enum"]
    assert properties["batch_size"]["default"] == 16


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_validate(path: Path, validator: Any) -> None:
    recipe = YAML(typ="safe").load(path)
    assert list(validator.iter_errors(recipe)) == []
    assert list(validator.iter_errors(recipe | {"model": "builtin:tiny-gpt2"})) == []
    assert list(validator.iter_errors(recipe | {"model": 3})) != []
    assert list(validator.iter_errors(recipe | {"sft": {"betta": 1}})) != []


def test_every_sentence_of_the_help_file_is_that_of_a_key() -> None:
    for key, sentence in options._HELP.items():
        section, name = key.split(".")
        model = getattr(methods if hasattr(methods, section) else options, section)
        assert model.model_fields[name].description == sentence, key


def test_install_writes_the_schema_and_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "deep").mkdir(parents=True)
    text = "model: builtin:tiny-gpt2\nsft: {data: builtin:instructions}\n"
    (tmp_path / "mine.yaml").write_text(f"# mine\n# yaml-language-server: $schema=old.json\n{text}")
    (tmp_path / "recipes" / "deep" / "other.yaml").write_text(text.replace("sft: {", "first: {method: sft, "))
    (tmp_path / "compose.yaml").write_text("services: {web: {image: x}}\n")
    for _ in range(2):  # a second time changes nothing
        assert install_schema() == {
            "schema": "recipe.schema.json", "recipe 1": "mine.yaml", "recipe 2": "recipes/deep/other.yaml",
        }  # fmt: skip
        assert json.loads((tmp_path / "recipe.schema.json").read_text()) == recipe_schema()
        first = "# yaml-language-server: $schema="
        assert (tmp_path / "mine.yaml").read_text() == f"{first}recipe.schema.json\n# mine\n{text}"
        other = (tmp_path / "recipes" / "deep" / "other.yaml").read_text()
        assert other.splitlines()[0] == f"{first}../../recipe.schema.json"
    assert (tmp_path / "compose.yaml").read_text() == "services: {web: {image: x}}\n"
    with pytest.raises(UsageError, match="there is no such file"):
        install_schema([Path("absent.yaml")])
