"""The commands that train nothing: init, migrate, check, preview, schema, doctor, merge, chat, diff, report, eval."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from alignkit.cli.train import AllowKey, AsJson, DeviceName, Overrides, RecipeFile, StageName, TrustCode, refuse_secret

if TYPE_CHECKING:
    from alignkit.preflight.check import CheckReport
    from alignkit.preflight.doctor import DoctorReport
    from alignkit.preflight.plan import Plan
    from alignkit.recipe import Recipe
    from alignkit.recipe.schema import EvaluateOptions


def init(
    path: Annotated[Path, Argument(metavar="[FILE]", help="The recipe to write.")] = Path("recipe.yaml"),
    source: Annotated[str, Option("--from", metavar="NAME", help="A recipe that alignkit brings.")] = "start",
    model: Annotated[str | None, Option("--model", metavar="M", help="A directory, a run or a hub id.")] = None,
    data: Annotated[str | None, Option("--data", metavar="FILE", help="The columns are looked at.")] = None,
    method: Annotated[str | None, Option("--method", metavar="NAME", help="Only sft, rm, dpo or ppo.")] = None,
) -> None:
    """Write a recipe with a comment on every key, and the schema that editors read beside it."""
    from alignkit import console
    from alignkit.preflight.starter import write_starter

    console.print_text("paths", write_starter(path, source=source, model=model, data=data, method=method))


def migrate(
    files: Annotated[list[Path], Argument(metavar="FILE...", help="Recipes, scripts or texts with commands.")],
    out: Annotated[Path, Option("--out", metavar="DIR", help="Where the recipes go.")] = Path(),
    gpus: Annotated[int | None, Option("--gpus", metavar="N", min=1, help="On how many it ran in all.")] = None,
    force: Annotated[bool, Option("--force", help="Write over files that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn recipes and commands of TRL, axolotl, LLaMA-Factory, torchtune and others into ours."""
    from alignkit import console
    from alignkit.errors import Problem, RecipeError
    from alignkit.recipe.migrate import KINDS, migrate_file
    from alignkit.recipe.yaml import shorten

    taken, problems, written = set[Path](), list[Problem](), []
    for file in files:
        made, found = migrate_file(file, gpus=gpus)
        problems += found
        for one in made:
            path = out / f"{one.name}.yaml"
            if path in taken:  # examples of one name in several folders
                path = out / f"{file.absolute().parent.name}-{path.name}"
            if path in taken or (path.exists() and not force):
                problems.append(Problem("is there already; --force writes over it, --out elsewhere", str(path)))
                continue
            taken.add(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(one.text, encoding="utf-8")
            keys = [row._asdict() for row in one.rows]
            written.append({"recipe": str(path), "tool": one.peer, "missing": one.missing, "keys": keys})
            if not as_json:
                counts = ", ".join(f"{[row.what for row in one.rows].count(kind)} {kind}" for kind in KINDS)
                rows = [(row.key, shorten(str(row.value), 40), *row[2:]) for row in one.rows]
                console.print_table(f"{path} from {file} ({one.peer}): {counts}", [*one.rows[0]._fields], rows)
                for missing in one.missing:
                    console.write(f"  {path}: {missing}")
    if as_json:
        console.print_json(written)
    if problems:
        raise RecipeError(problems)


def check(
    recipe: RecipeFile, overrides: Overrides = None, trust_code: TrustCode = False, allow_key: AllowKey = None,
    strict: Annotated[bool, Option("--strict", help="Warnings are mistakes, too.")] = False,
    as_json: AsJson = False) -> None:  # fmt: skip
    """Find out, without training, whether a recipe would run: keys, data, model, disk, devices."""
    loaded = _load(recipe, overrides)
    from alignkit.preflight.check import check_recipe

    _show(check_recipe(loaded, trust_code=trust_code, strict=strict), as_json=as_json)


def plan(
    recipe: RecipeFile,
    gpu: Annotated[str | None, Option("--gpu", metavar="NAME", help="Such as H100; else this machine")] = None,
    memory: Annotated[float | None, Option("--memory", metavar="GIB", min=0.1, help="Of another GPU.")] = None,
    gpus: Annotated[int | None, Option("--gpus", metavar="N", min=1, help="Instead of launch.processes.")] = None,
    tokens: Annotated[int | None, Option("--tokens", metavar="N", min=2, help="Of the longest row.")] = None,
    rate: Annotated[float | None, Option("--tokens-per-second", metavar="R", min=0.001, help="For the hours.")] = None,
    probe: Annotated[bool, Option("--probe", help="Measure that: train a few steps here.")] = False,
    overrides: Overrides = None, trust_code: TrustCode = False, as_json: AsJson = False) -> None:  # fmt: skip
    """Say what each stage will need: memory and what it is made of, what fits, steps, hours, disk."""
    loaded = _load(recipe, overrides)
    if not probe:  # PEFT would import it, and it compiles functions as it is: 1.5 seconds for nothing that is traced
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    from alignkit.preflight.plan import Device, plan_recipe

    device = Device.find(gpu, memory)
    options = {"devices": gpus, "tokens": tokens, "rate": rate, "probes": probe, "trust_code": trust_code}
    _show(plan_recipe(loaded, device, **options), as_json=as_json)  # type: ignore[arg-type]


def _load(recipe: Path, overrides: list[str] | None = None) -> Recipe:
    from alignkit.recipe import load_recipe

    return load_recipe(recipe, overrides=overrides or ())


def _show(report: CheckReport | DoctorReport | Plan, *, as_json: bool) -> None:
    """Print what was found; what only a report that can fail has is the error to end with."""
    from alignkit import console

    if as_json:
        console.print_json(report.to_dict())
    else:
        for table in report.tables():
            console.print_table(*table)
    if error := getattr(report, "error", lambda: None)():
        raise error


def preview(
    recipe: RecipeFile,
    stage: StageName = None,
    num_rows: Annotated[int, Option("--rows", "-n", metavar="N", min=1, help="How many rows are shown.")] = 3,
    html: Annotated[Path | None, Option("--html", metavar="FILE", help="Write a page instead of a text.")] = None,
    overrides: Overrides = None, trust_code: TrustCode = False, as_json: AsJson = False) -> None:  # fmt: skip
    """Show rows as the trainer reads them, token by token: what is learnt, read, scored or padding."""
    from alignkit import console
    from alignkit.recipe import resolve

    loaded = _load(recipe, overrides)
    names = [stage] if stage is not None else loaded.stage_names
    if len(names) > 1:
        raise typer.BadParameter(f"the recipe has several stages; name one with --stage: {', '.join(names)}")
    resolved = resolve(loaded, names[0], trust_code=trust_code)
    from alignkit.preflight.check import preview_stage

    shown = preview_stage(resolved, num_rows=num_rows)
    if html is not None:
        from alignkit.report.publish import write_preview

        console.print_text("paths", {"page": str(write_preview(shown, html))})
    elif as_json:
        console.print_json(shown)
    else:
        console.print_preview(shown)


def schema(
    files: Annotated[list[Path] | None, Argument(metavar="[FILE...]", help="Recipes, with --install.")] = None,
    install: Annotated[bool, Option("--install", help="Write it here, and its place into recipes.")] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML."""
    from alignkit import console

    if install:
        from alignkit.preflight.starter import install_schema

        return console.print_text("paths", install_schema(files or ()))
    if files:
        raise typer.BadParameter("files go with --install, which writes into them where the schema is")
    from alignkit.recipe import recipe_schema

    return console.print_json(recipe_schema())


def doctor(
    what: Annotated[str | None, Argument(metavar="[resume]", help="Kill and resume a stage, and compare.")] = None,
    recipe: Annotated[Path | None, Option("--recipe", "-r", metavar="FILE", help="With resume: whose stage.")] = None,
    stage: StageName = None, trust_code: TrustCode = False, as_json: AsJson = False) -> None:  # fmt: skip
    """Show versions, devices and what works here; or prove that a recipe resumes exactly."""
    from alignkit import console

    if what is None and recipe is None and stage is None:
        from alignkit.preflight.doctor import examine

        _show(examine(), as_json=as_json)
        return
    if what != "resume" or recipe is None:
        raise typer.BadParameter("a recipe is tried with `alignkit doctor resume --recipe FILE`")
    loaded = _load(recipe)
    from alignkit.errors import AlignKitError
    from alignkit.preflight.doctor import list_stages, prove_resume

    tried = []
    for name in list_stages(loaded, stage, trust_code=trust_code):
        try:
            tried.append(found := prove_resume(loaded, name, trust_code=trust_code))
        except AlignKitError as error:
            if stage is not None:
                raise
            tried.append({"stage": name, "reason": str(error)})
            (console.note if as_json else console.write)(f"{name}: not tried: {error}")
            continue
        said = f"{name}: {found['model']}, {found['steps']} steps, killed at step {found['killed_at']} and resumed: "
        said += f"not equal: {'; '.join(found['differences'])}" if found["differences"] else "equal"
        said += f" (not tried as the recipe has it: {', '.join(found['instead'])})" if found["instead"] else ""
        (console.note if as_json else console.write)(said)
    if as_json:
        console.print_json({"stages": tried})
    if other := [found["stage"] for found in tried if found.get("differences")]:
        raise AlignKitError(f"{', '.join(other)} does not resume exactly")


def merge(
    source: Annotated[Path, Argument(metavar="SOURCE", help="A finished run, or an adapter directory.")],
    out: Annotated[Path, Option("--out", metavar="DIR", help="Where the merged model goes.", callback=refuse_secret)],
) -> None:
    """Write an adapter and its base as one model directory."""
    from alignkit import console
    from alignkit.models.files import find_adapter

    find_adapter(str(source))  # refuses a whole model before the libraries are loaded
    from alignkit.models import save

    save.merge(source, out)
    console.print_json({"merged": str(source), "model": str(out)})


def chat(
    source: Annotated[str, Argument(metavar="RUN", help="A run, a model or adapter directory, or a hub id.")],
    compare: Annotated[str | None, Option("--compare", metavar="RUN", help="A second model beside it.")] = None,
    system: Annotated[str | None, Option("--system", metavar="TEXT", help="The system message.")] = None,
    temperature: Annotated[float, Option("--temperature", metavar="T", min=0, help="0 is greedy.")] = 0.7,
    max_new_tokens: Annotated[int, Option("--max-new-tokens", metavar="N", min=1)] = 256,
    top_p: Annotated[float, Option("--top-p", metavar="P", min=0.0001, max=1, help="Of the probability.")] = 1.0,
    top_k: Annotated[int, Option("--top-k", metavar="K", min=0, help="Likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int | None, Option("--seed", metavar="N", help="The same answers every time.")] = None,
    device: DeviceName = "auto", trust_code: TrustCode = False) -> None:  # fmt: skip
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

    settings = Settings(system, temperature, max_new_tokens, top_p, top_k, seed)
    talk(sources, settings, device=device, trust_code=trust_code)


def compare(
    first: Annotated[str, Argument(metavar="RUN_A", help="A run, which keeps the votes.")],
    second: Annotated[str, Argument(metavar="RUN_B", help="Another run, or a model.")],
    prompts: Annotated[str | None, Option("--prompts", metavar="FILE", help="Rows; omitted: those held out.")] = None,
    num_prompts: Annotated[int, Option("-n", metavar="N", min=1, help="How many prompts.")] = 50,
    rater: Annotated[str | None, Option("--rater", metavar="NAME", help="Judge in this terminal, so named.")] = None,
    port: Annotated[int, Option("--port", metavar="PORT", min=0, max=65535, help="0: any.")] = 0,
    device: DeviceName = "auto", trust_code: TrustCode = False, as_json: AsJson = False) -> None:  # fmt: skip
    """Judge answers of two models yourself, blinded: a local page, a win rate, and preference rows."""
    from alignkit import console
    from alignkit.evaluate.options import combine, sources
    from alignkit.models.files import require_available
    from alignkit.recipe.schema import EvaluateOptions

    for name in (first, second):
        require_available(name, as_run=True)
    given = {"data": sources([prompts] if prompts else (), None), "max_rows": num_prompts, "against": second}
    options = combine(EvaluateOptions(), {**given, "metrics": ["win_rate"], "start": False})
    from alignkit.evaluate.people import ROWS, People
    from alignkit.evaluate.run import evaluate, table
    from alignkit.evaluate.target import find_target

    if (run := find_target(first, trust_code=trust_code).run) is None:
        raise typer.BadParameter(f"{first} is no run; the first one's run keeps the votes")
    judge = People(run.path, rater=rater, port=port)
    data = evaluate(first, options, device=device, trust_code=trust_code, judge=judge)
    data["results"] = [each for each in data["results"] if each["settings"].get("judge") == judge.name]
    if as_json:
        console.print_json(data)
    else:
        console.print_table(data["name"], *table(data["results"]))
        console.print_text("paths", {"preferences": str(run.path / ROWS)})


def diff(
    first: Annotated[Path, Argument(metavar="RUN", help="A run directory.")],
    second: Annotated[Path, Argument(metavar="RUN", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Show how two runs differ: values in force, data and template, versions, then what came out."""
    from alignkit import console
    from alignkit.models.files import find_model_dir
    from alignkit.report.evaluation import compare_runs

    for run in (first, second):
        if not run.exists():
            find_model_dir(str(run))  # says which run may be meant
    difference = compare_runs(first, second)
    if as_json:
        console.print_json(vars(difference))
        return
    for table in difference.tables():
        console.print_table(*table)


def report(
    target: Annotated[Path, Argument(metavar="TARGET", help="A run directory, a directory of runs, or a recipe file.")],
    out: Annotated[Path | None, Option("--out", metavar="FILE", help="Instead of report.html in the run.")] = None,
    push: Annotated[str | None, Option("--push", metavar="REPO", help="Upload the model and its card there.")] = None,
    public: Annotated[bool, Option("--public", help="With --push: a new repository is public.")] = False,
    live: Annotated[bool, Option("--watch", help="Keep the page up to date until the runs end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page that shows a run or a whole recipe, and bring the run's model card up to date."""
    from alignkit import console
    from alignkit.models.files import find_model_dir
    from alignkit.report.facts import find_runs
    from alignkit.report.publish import publish, watch
    from alignkit.report.verdict import judge_all

    if str(target).startswith("builtin:"):
        from alignkit.recipe.yaml import find_recipe

        target = find_recipe(target)
    if not target.exists():
        find_model_dir(str(target))  # says which run may be meant
    stages = None
    if target.suffix in (".yaml", ".yml"):
        from alignkit.recipe import resolve

        loaded = _load(target)
        stages = [(name, Path(resolve(loaded, name).run_dir)) for name in loaded.order]
    runs = [path for _, path in stages or ()]

    def find() -> list[Path]:
        return runs or ([target] if (target / "stage.json").is_file() else find_runs(target))

    if live:
        watch(find, lambda: Path(publish(target, stages=stages, out=out, card=False)["report"]).absolute())
    done = publish(target, stages=stages, out=out, repo=push, public=public)
    verdicts = judge_all(find())
    if as_json:
        console.print_json({**done, "verdicts": verdicts})
    else:
        console.print_text("verdicts", verdicts)
        console.print_text("paths", done)


_what = partial(Option, rich_help_panel="What is measured")
_answers = partial(Option, rich_help_panel="Answers")
_ELSEWHERE = "eval.json, elsewhere than in the run."


def evaluate(
    context: typer.Context,
    source: Annotated[str | None, Argument(metavar="[RUN]", help="A run, a model directory or a hub id.")] = None,
    recipe: Annotated[Path | None, Option("--recipe", "-r", metavar="FILE", help="Its finished stages.")] = None,
    stage: StageName = None,
    overrides: Overrides = None,
    data: Annotated[list[str] | None, _what("--data", metavar="PATH", help="Rows; omitted: those held out.")] = None,
    split: Annotated[str | None, _what("--split", metavar="NAME", help="Of --data; omitted: test.")] = None,
    max_rows: Annotated[int | None, _what("--max-rows", metavar="N")] = None,
    metrics: Annotated[list[str] | None, _what("--metric", metavar="NAME", help="Only this group. Repeatable.")] = None,
    reference: Annotated[str | None, _what("--reference", metavar="RUN")] = None,
    reward: Annotated[str | None, _what("--reward", metavar="REWARD")] = None,
    against: Annotated[str | None, _what("--against", metavar="RUN", help="Other side of a win rate.")] = None,
    judge: Annotated[str | None, _what("--judge", metavar="JUDGE", help="A reward, a RUN or a URL.")] = None,
    judge_name: Annotated[str | None, _what("--judge-name", metavar="NAME", help="Of the model at a URL.")] = None,
    constitution: Annotated[
        list[str] | None, _what("--constitution", metavar="FILE", help="What it judges by.")
    ] = None,
    best_of: Annotated[list[int] | None, _what("--best-of", metavar="N")] = None,
    tasks: Annotated[list[str] | None, _what("--task", metavar="FILE", help="JSONL, or lm_eval:TASK.")] = None,
    shots: Annotated[list[int] | None, _what("--shots", "-k", metavar="K", help="Examples of a task.")] = None,
    samples: Annotated[int | None, _answers("--samples", metavar="N")] = None,
    temperature: Annotated[float | None, _answers("--temperature", metavar="T")] = None,
    top_p: Annotated[float | None, _answers("--top-p", metavar="P")] = None,
    top_k: Annotated[int | None, _answers("--top-k", metavar="K")] = None,
    max_new_tokens: Annotated[int | None, _answers("--max-new-tokens", metavar="N")] = None,
    batch_size: Annotated[int | None, _answers("--batch-size", metavar="N")] = None,
    seed: Annotated[int | None, _answers("--seed", metavar="N")] = None,
    out: Annotated[Path | None, Option("--out", metavar="FILE", help=_ELSEWHERE, callback=refuse_secret)] = None,
    device: DeviceName = "auto", trust_code: TrustCode = False, allow_key: AllowKey = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure a model: every figure with its n and 95 % interval, to eval.json and a table."""
    from alignkit import console
    from alignkit.evaluate.options import combine, judge_source, name_runs, request_stages, sources
    from alignkit.recipe.schema import EvaluateOptions, FeedbackModel

    if (source is None) == (recipe is None):
        raise typer.BadParameter("give a RUN or --recipe FILE")
    base, folder = EvaluateOptions(), Path.cwd()
    loaded = None if recipe is None else _load(recipe, overrides)
    if loaded is not None:
        base, folder = loaded.evaluate, Path(loaded.path).resolve().parent
    elif stage is not None:
        raise typer.BadParameter("--stage belongs to --recipe; of a RUN it is the directory, such as runs/RECIPE/STAGE")
    elif overrides:
        base = _read_overrides(overrides)
    if out is not None and loaded is not None and stage is None and len(loaded.order) > 1:
        raise typer.BadParameter("--out is one file, and the recipe has several stages; name one with --stage")
    if split is not None and not data:
        raise typer.BadParameter("--split belongs to --data")
    given = {name: value for name, value in context.params.items() if name in EvaluateOptions.model_fields}
    options = combine(base, {**given, "data": sources(data or (), split), "judge": judge_source(judge, judge_name)})
    typed = getattr(context.get_parameter_source("allow_key"), "name", "") == "COMMANDLINE"  # not in the environment
    if typed and not (isinstance(options.judge, FeedbackModel) and options.judge.api_key_env):
        what = "--allow-key has no effect here; name the key of a judge as evaluate.judge.api_key_env in a --recipe"
        raise typer.BadParameter(what)
    if loaded is not None:
        from alignkit.recipe import resolve

        requests = request_stages(loaded, options, [resolve(loaded, stage).name] if stage is not None else None)
    elif source is not None:
        from alignkit.evaluate.target import list_siblings
        from alignkit.models.files import require_available

        named = name_runs(options, list_siblings(source), strict=False)
        for model in (source, named.against, named.reference):
            if model is not None:
                require_available(model, as_run=True)
        requests = [(source, named)]
    from alignkit.evaluate.run import evaluate_all, table

    results = []
    for result in evaluate_all(
        requests, seed=seed, out=out, device=device, trust_code=trust_code, folder=folder, skip=recipe is not None
    ):
        results.append(result)
        if not as_json:
            console.print_table(result["name"], *table(result["results"]))
    if as_json:
        console.print_json(results if recipe is not None and not stage else results[0])


def _read_overrides(overrides: list[str]) -> EvaluateOptions:
    """Read --set evaluate.KEY=VALUE where there is a RUN and no recipe; raises UsageError for any other key."""
    from alignkit.errors import Problem, UsageError, suggest
    from alignkit.evaluate.options import combine
    from alignkit.recipe.schema import EvaluateOptions
    from alignkit.recipe.yaml import FLAG, Node, Origin, apply_override

    tree = Node({}, Origin(FLAG, Path.cwd()))
    for override in overrides:
        tree = apply_override(tree, override)
    if foreign := tree.value.keys() - {"evaluate"}:
        what = "only evaluate.KEY can be set for a RUN; the rest is what it was trained with"
        raise UsageError([Problem(f"{key}: {what}", FLAG) for key in sorted(foreign)])
    given, known = tree.value["evaluate"].plain(), EvaluateOptions.model_fields
    if unknown := [f"evaluate.{key} is no key{suggest(key, known)}" for key in given if key not in known]:
        raise UsageError([Problem(what, FLAG) for what in unknown])
    return combine(EvaluateOptions(), given)
