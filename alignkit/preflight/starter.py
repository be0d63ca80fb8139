"""`alignkit init`: a shipped recipe, cut and filled to what is at hand, with a comment on every key."""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from alignkit.data.formats import Detector
from alignkit.data.rows import METHOD_KINDS, BadRow, Kind
from alignkit.data.sources import locate, read_entries
from alignkit.errors import DataError, RecipeError, UsageError, suggest
from alignkit.recipe import load_recipe, recipe_schema
from alignkit.recipe.methods import OPTIONS, RLAIF
from alignkit.recipe.schema import DataSource
from alignkit.recipe.yaml import SHIPPED, find_recipe, load_tree

_METHODS = ("dpo", "sft", "rm", "ppo")  # in the order in which one is chosen for rows
_SCHEMA = "recipe.schema.json"


def write_starter(
    path: Path, *, source: str, model: str | None, data: str | None, method: str | None
) -> dict[str, str]:
    """Write a recipe and, where there is none, the schema beside it; say where they are. Of the source only the stages
    of `method` stay, or of the first method that learns from such rows as `data` has."""
    if path.exists():
        raise UsageError("is there already; name another file", where=str(path))
    if not path.absolute().parent.is_dir():
        raise UsageError("there is no such directory", where=str(path.parent))
    if method is not None and method not in _METHODS:
        what = f"is {method}; it must be one of {', '.join(_METHODS)}{suggest(method, _METHODS)}"
        raise UsageError(what, where="--method")
    template = find_recipe(f"builtin:{source.removeprefix('builtin:')}")
    folder, head = template.parent.relative_to(SHIPPED), f"# yaml-language-server: $schema={_SCHEMA}\n"
    seen, kind = _look(data) if data is not None else ("", None)
    fitting = [name for name in _METHODS if kind is None or kind in METHOD_KINDS[name]]
    if method is not None and method not in fitting:
        raise DataError(f"has {seen}; {method} does not take such rows, {', '.join(fitting)} does", where=data)
    if data is not None and method is None and kind is None:
        raise UsageError(f"{seen}; name what is trained: {', '.join(_METHODS)}", where="--method")
    loaded = load_recipe(template)  # refuses what is only a part, such as launch/one-gpu
    text = template.read_text(encoding="utf-8")
    text = re.sub(r"(?m)^(extends: )(\S+)\.yaml", lambda found: f"{found[1]}builtin:{folder / found[2]}", text)
    beside = {file.name: json.dumps(str(file)) for file in template.parent.glob("*.jsonl")}
    text = re.sub(r"(?<=: )[\w-]+\.jsonl", lambda found: beside.get(found[0], found[0]), text)
    intro, *parts = re.split(r"(?m)^(?=[\w-]+:)", text)
    sections = {part.partition(":")[0]: part for part in parts}
    sections.pop("name", None)  # runs are named after the file
    if method is not None or data is not None:
        stages = {stage.name: stage.options.method for stage in loaded.stages.values() if stage.name in sections}
        if "extends" in sections and any(stage.name not in sections for stage in loaded.stages.values()):
            stages = {}  # those of the other recipe could not be taken out
        method = method or next((name for name in fitting if name in stages.values()), fitting[0])
        alike = [name for name in stages if stages[name] == method]
        if not alike:
            has = ", ".join(dict.fromkeys(stages.values())) or "stages of another recipe"
            raise RecipeError(f"{source} has no {method} stage, only {has}; name another recipe with --from")
        chosen = method if method in alike else alike[0]
        for name in {*stages, *loaded.groups, "stages", "rounds", "evaluate", "sweep"} - {chosen}:
            sections.pop(name, None)
        # what the section has from stages that are gone
        alone = re.sub(r"(?m)^  (start_from:|gold: (?!builtin:)).*\n", "", sections[chosen])
        sections[chosen] = re.sub(r"(?m)^(  reward:) [\w-]+( .*)?$", r"\1 builtin:true-reward  # put yours", alone)
    if data is not None:
        file = Path(data).expanduser()
        named = os.path.relpath(file, path.absolute().parent) if file.exists() else data
        line = f"  data: {json.dumps(named)}  # {seen}\n"
        line += "  loss_type: kto  # for single answers with a label\n" if kind == "unpaired" else ""
        line += "" if "# eval:" in sections[chosen] else "  # eval: 0.05  # share of the prompts kept out\n"
        first, _, rest = _replace(_replace(sections[chosen], "data", ""), r"eval\w*", "").partition("\n")
        sections[chosen] = f"{first}\n{line}{rest}"
        for key in ("data", "eval"):
            sections.pop(key, None)
    if model is not None:
        line = f"  path: {json.dumps(model)}  # a hub id, a directory, a run\n"
        given = _replace(_replace(sections.get("model", "model:\n  path:\n"), "path", line), "init", "")
        sections["model"] = given.replace("  chat_template:", "  # chat_template:")  # it may have its own
    path.write_text(head + intro + "".join(sections.values()), encoding="utf-8")
    try:
        load_recipe(path)
    except RecipeError as error:
        path.unlink()
        raise RecipeError(f"{source} cannot be cut like that: {error.problems[0].what}; leave --from out") from None
    if not (schema := path.absolute().with_name(_SCHEMA)).exists():
        schema.write_text(json.dumps(recipe_schema()), encoding="utf-8")
    return {"recipe": str(path), "schema": os.path.relpath(schema)}


def install_schema(files: Sequence[Path] = ()) -> dict[str, str]:
    """Write the schema here and, as the first line of recipes, where it is: VS Code's YAML extension reads that line.
    Of the files given; where none are, of every recipe in this directory and in recipes/."""
    Path(_SCHEMA).write_text(json.dumps(recipe_schema()), encoding="utf-8")
    wanted = list(files)
    for file in () if files else sorted((*Path().glob("*.y*ml"), *Path("recipes").rglob("*.y*ml"))):
        with suppress(RecipeError):
            sections = load_tree(file).value
            is_stage = [name in (*OPTIONS, RLAIF) or "method" in (node.value or ()) for name, node in sections.items()
                        if isinstance(node.value, dict)]  # fmt: skip
            wanted += [file] if "model" in sections and any(is_stage) else []
    for file in wanted:
        if not file.is_file():
            raise UsageError("there is no such file", where=str(file))
        line = f"# yaml-language-server: $schema={os.path.relpath(_SCHEMA, file.parent)}\n"
        text = re.sub(r"(?m)^# yaml-language-server: .*\n", "", file.read_text(encoding="utf-8"), count=1)
        file.write_text(line + text, encoding="utf-8")
    return {"schema": _SCHEMA, **{f"recipe {number}": str(file) for number, file in enumerate(wanted, 1)}}


def _replace(section: str, key: str, line: str) -> str:
    """Put a line in the place of a key of a section and of all below it."""
    return re.sub(rf"(?m)^  {key}:.*\n(^    .*\n)*", lambda _: line, section)


def _look(data: str) -> tuple[str, Kind | None]:
    """Say what columns the first row has and how it is read, and of which kind of rows it is."""
    for located in locate([DataSource(path=data)]):
        if located.origin == "hub":
            return f"{data} is on the hub and is not looked at", None
        for place, record in read_entries(located):
            try:
                if isinstance(record, BadRow):
                    raise record
                form = Detector().recognise(record, place)
            except BadRow as error:
                raise DataError(str(error), where=place) from None
            return f"columns {', '.join(map(str, record))}: read as {form}", form.kind
    raise DataError("holds no row", where=data)
