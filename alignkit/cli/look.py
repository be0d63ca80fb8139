"""The commands that train nothing: check, preview, schema, doctor, merge, chat, diff, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignkit.cli.options import AllowKey, AsJson, Overrides, RecipeFile, StageName, TrustCode

if TYPE_CHECKING:
    from alignkit.preflight.check import CheckReport
    from alignkit.preflight.doctor import DoctorReport


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    trust_code: TrustCode = False,
    allow_key: AllowKey = None,
    as_json: AsJson = False,
) -> None:
    """Find out, without training, whether a recipe would run: keys, data, model, disk, devices."""
    from alignkit.recipe import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or ())
    from alignkit.preflight.check import check_recipe

    _show(check_recipe(loaded, trust_code=trust_code), as_json=as_json)


def _show(report: CheckReport | DoctorReport, *, as_json: bool) -> None:
    """Write what was found, and raise what makes it a failure."""
    from alignkit import console

    if as_json:
        console.print_json(report.to_dict())
    else:
        for table in report.tables():
            console.print_table(*table)
    if error := report.error():
        raise error


def preview(
    recipe: RecipeFile,
    stage: StageName = None,
    num_rows: Annotated[int, typer.Option("--rows", "-n", metavar="N", min=1, help="How many rows are shown.")] = 3,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page instead of the terminal's text.")
    ] = None,
    overrides: Overrides = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Show rows as the trainer reads them, token by token: what is learnt, read, scored or padding."""
    from alignkit import console
    from alignkit.recipe import load_recipe, resolve

    loaded = load_recipe(recipe, overrides=overrides or ())

    names = [stage] if stage is not None else loaded.stage_names
    if len(names) > 1:
        raise typer.BadParameter(f"the recipe has several stages; name one with --stage: {', '.join(names)}")
    resolved = resolve(loaded, names[0], trust_code=trust_code)
    from alignkit.preflight.preview import preview_stage

    shown = preview_stage(resolved, num_rows=num_rows)
    if html is not None:
        from alignkit.report.page import write_preview

        console.print_paths({"page": str(write_preview(shown.to_dict(), html))})
    elif as_json:
        console.print_json(shown.to_dict())
    else:
        console.print_preview(shown.to_dict())


def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML."""
    from alignkit import console
    from alignkit.recipe import recipe_schema

    console.print_json(recipe_schema())


def doctor(as_json: AsJson = False) -> None:
    """Show versions and devices, and what works here and what does not."""
    from alignkit.preflight.doctor import examine

    _show(examine(), as_json=as_json)


def merge(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A finished run, or an adapter directory.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the merged model goes.")],
) -> None:
    """Write an adapter and its base as one model directory."""
    from alignkit import console
    from alignkit.models.files import find_adapter

    find_adapter(str(source))  # refuses a whole model before the libraries are loaded
    from alignkit.models.save import merge as merge_adapter

    merge_adapter(source, out)
    console.print_json({"merged": str(source), "model": str(out)})


def chat(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run, a model or adapter directory, or a hub id.")],
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="RUN", help="A second model, whose answers stand beside.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", min=0, help="0 is greedy.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1)] = 256,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="The same answers every time.")] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.")] = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Talk to a model, or to two at once; /help lists what can be typed."""
    from alignkit.errors import ModelError
    from alignkit.models.files import find_model_dir, inspect_model_dir, require_available

    sources = [source] if compare is None else [source, compare]
    for name in sources:
        require_available(name, as_run=True)
        directory = find_model_dir(name)
        if directory is not None and inspect_model_dir(directory, trust_code=trust_code).reward:
            raise ModelError(f"{name} is a reward model, which cannot write; `alignkit eval` measures it")
    from alignkit.chat import Settings, talk

    settings = Settings(system=system, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    talk(sources, settings, device=device, trust_code=trust_code)


def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Show how two runs differ: values in force, data and template, versions, then what came out."""
    from alignkit import console
    from alignkit.models.files import find_model_dir
    from alignkit.report.compare import compare_runs

    for run in (first, second):
        if not run.exists():
            find_model_dir(str(run))  # says which run may be meant
    difference = compare_runs(first, second)
    if as_json:
        console.print_json(difference.to_dict())
        return
    for table in difference.tables():
        console.print_table(*table)


def report(
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="A run directory, a directory of runs, or a recipe file.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes; omitted: report.html in the run.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="REPO", help="Upload the run's model and its card to the Hugging Face hub."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", metavar="", help="With --push: a new repository is public, not private.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page that shows a run or a whole recipe, and bring the run's model card up to date."""
    from alignkit import console
    from alignkit.models.files import find_model_dir
    from alignkit.report.publish import publish

    if not target.exists():
        find_model_dir(str(target))  # says which run may be meant
    stages = None
    if target.suffix in (".yaml", ".yml"):
        from alignkit.recipe import load_recipe, resolve

        loaded = load_recipe(target)
        stages = [(name, Path(resolve(loaded, name).run_dir)) for name in loaded.order]
    done = publish(target, stages=stages, out=out, repo=push, public=public)
    if as_json:
        console.print_json(done)
    else:
        console.print_paths(done)
