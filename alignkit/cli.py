"""Every command of alignkit: its options, and which room does the work.

Deliberately does none of the work, and loads typer, `ending` and the standard library only: everything else is imported
by the command that needs it, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.exceptions import TyperException

from alignkit.ending import SUPERVISED, end, end_usage_error, leave

if TYPE_CHECKING:
    from alignkit.recipe import Recipe
    from alignkit.recipe.schema import EvaluateOptions

RecipeFile = Annotated[
    Path, typer.Option("--recipe", "-r", metavar="FILE", help="The recipe: model, data and stages in YAML.")
]
StageName = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="Which stage, where the recipe has several of a method.")
]
StepName = Annotated[
    str | None,
    typer.Option("--stage", metavar="NAME", help="One of its stages, by name or step: critique, sft, label, dpo, ..."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value, such as dpo.beta=0.2. Repeatable."),
]
RunDir = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run directory, instead of runs/<recipe>/<stage>.")
]
# An empty metavar: typer would show <bool> beside a flag that takes no value.
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Show every value in force and its origin; do nothing.")
]
Force = Annotated[
    bool, typer.Option("--force", metavar="", help="Start afresh: an existing run is moved aside, never deleted.")
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", metavar="", help="Allow code of models and reward functions: only what you have read."
    ),
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option("--allow-change", metavar="KEY", help="Resume although this setting has changed. Repeatable."),
]
_MANY = "Many processes"
Retries = Annotated[
    int,
    typer.Option(
        "--retries",
        min=0,
        metavar="N",
        rich_help_panel=_MANY,
        help="Start again up to N times when a process was killed or hung, as long as each try gets further.",
    ),
]
Slurm = Annotated[
    bool, typer.Option("--slurm", metavar="", rich_help_panel=_MANY, help="Write an sbatch script instead of training.")
]
Submit = Annotated[
    bool, typer.Option("--submit", metavar="", rich_help_panel=_MANY, help="Hand the script of --slurm to sbatch.")
]
NodeRank = Annotated[
    int | None,
    typer.Option(
        "--node-rank",
        min=0,
        metavar="N",
        rich_help_panel=_MANY,
        help="Which of launch.nodes this machine is; omitted: SLURM_NODEID or NODE_RANK.",
    ),
]
MainAddress = Annotated[
    str | None,
    typer.Option(
        "--main-address", metavar="HOST", rich_help_panel=_MANY, help="Where node 0 is reached: launch.main_address."
    ),
]
MainPort = Annotated[
    int | None,
    typer.Option("--main-port", metavar="PORT", rich_help_panel=_MANY, help="Its port: launch.main_port."),
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print the result as JSON on stdout.")]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from alignkit import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _alignkit(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """From base weights to an aligned, measured language model with one recipe file."""


def _load_recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from alignkit.recipe import load_recipe

    return load_recipe(path, overrides=overrides or ())


def _stage_command(method: Literal["sft", "rm", "dpo", "ppo"]) -> Callable[..., None]:
    """Return the command of a method; all of them take the same options, declared here once."""

    def command(
        context: typer.Context,
        recipe: RecipeFile,
        stage: StageName = None,
        overrides: Overrides = None,
        out: RunDir = None,
        dry_run: DryRun = False,
        force: Force = False,
        trust_code: TrustCode = False,
        allow_change: AllowChange = None,
        as_json: AsJson = False,
        retries: Retries = 0,
        slurm: Slurm = False,
        submit: Submit = False,
        node_rank: NodeRank = None,
        main_address: MainAddress = None,
        main_port: MainPort = None,
    ) -> None:
        from alignkit.recipe import resolve

        overrides = _add_address(overrides, main_address, main_port)
        resolved = resolve(_load_recipe(recipe, overrides), stage, method=method, out=out, trust_code=trust_code)
        from alignkit.launch.command import Command

        given = Command.of(resolved, overrides, allow_change=tuple(allow_change or ()), out=out, node_rank=node_rank)
        from alignkit.launch.perform import How, run_one

        how = How(dry_run, force, as_json, retries, slurm, submit)
        run_one(context.obj, resolved, given, how)

    return command


def _add_address(overrides: list[str] | None, address: str | None, port: int | None) -> list[str]:
    """Return the overrides with --main-address and --main-port, which are short for two of them."""
    given = (("launch.main_address", address), ("launch.main_port", port))
    return [*(overrides or ()), *(f"{key}={value}" for key, value in given if value is not None)]


app.command("sft", help="Train on demonstrations, or pre-train on raw text.")(_stage_command("sft"))
app.command("rm", help="Train a reward model on comparisons.")(_stage_command("rm"))
app.command("dpo", help="Train the policy directly on preferences.")(_stage_command("dpo"))
app.command("ppo", help="Train the policy on sampled answers and a reward, with a critic.")(_stage_command("ppo"))


@app.command()
def rlaif(
    context: typer.Context,
    recipe: RecipeFile,
    stage: StepName = None,
    overrides: Overrides = None,
    out: RunDir = None,
    dry_run: DryRun = False,
    force: Force = False,
    trust_code: TrustCode = False,
    allow_change: AllowChange = None,
    as_json: AsJson = False,
    retries: Retries = 0,
    slurm: Slurm = False,
    submit: Submit = False,
    node_rank: NodeRank = None,
    main_address: MainAddress = None,
    main_port: MainPort = None,
) -> None:
    """Align by a constitution: critiques and revisions, labels by a judge, training on them."""
    from alignkit.errors import UsageError
    from alignkit.launch.command import Command
    from alignkit.launch.perform import How, run_many, run_one
    from alignkit.recipe import pick_steps, resolve

    overrides = _add_address(overrides, main_address, main_port)
    loaded = _load_recipe(recipe, overrides)
    names = pick_steps(loaded, stage)
    if out is not None and len(names) > 1:
        raise UsageError(f"--out: {', '.join(names)} have a run directory each; name one of them with --stage")
    stages = [resolve(loaded, name, out=out, trust_code=trust_code) for name in names]
    changes = tuple(allow_change or ())
    jobs = [(step, Command.of(step, overrides, allow_change=changes, out=out, node_rank=node_rank)) for step in stages]
    how = How(dry_run, force, as_json, retries, slurm, submit)
    if len(jobs) == 1:
        run_one(context.obj, *jobs[0], how)
    else:
        run_many(context.obj, jobs, how)


@app.command()
def run(
    context: typer.Context,
    recipe: RecipeFile,
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Begin with this stage; leave those before alone."),
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="End with this stage.")] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    force: Force = False,
    trust_code: TrustCode = False,
    allow_change: AllowChange = None,
    as_json: AsJson = False,
    retries: Retries = 0,
    slurm: Slurm = False,
    submit: Submit = False,
    node_rank: NodeRank = None,
    main_address: MainAddress = None,
    main_port: MainPort = None,
) -> None:
    """Run the stages of a recipe one after another, then measure the models if it says how; what is done is left alone.

    A stage whose settings, data or starting weights have changed runs again, and so do those that need it.
    """
    from alignkit.launch.command import Command
    from alignkit.launch.measuring import Measuring
    from alignkit.launch.perform import How, run_many
    from alignkit.recipe import pick_span, resolve

    overrides = _add_address(overrides, main_address, main_port)
    loaded = _load_recipe(recipe, overrides)
    stages = [resolve(loaded, name, trust_code=trust_code) for name in pick_span(loaded, first, last)]
    changes = tuple(allow_change or ())
    jobs = [(stage, Command.of(stage, overrides, allow_change=changes, node_rank=node_rank)) for stage in stages]
    runs = {name: resolve(loaded, name).run_dir for name in loaded.order}
    measure = Measuring.of(stages, loaded.evaluate, runs) if loaded.evaluates else None
    run_many(context.obj, jobs, How(dry_run, force, as_json, retries, slurm, submit), measure=measure)


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Find out, without training, whether a recipe would run: keys, data, model, disk, devices."""
    from alignkit import console

    loaded = _load_recipe(recipe, overrides)
    from alignkit.preflight.check import check_recipe

    report = check_recipe(loaded, trust_code=trust_code)
    if as_json:
        console.print_json(report.to_dict())
    else:
        for table in report.tables():
            console.print_table(*table)
    if error := report.error():
        raise error


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML."""
    from alignkit import console
    from alignkit.recipe import recipe_schema

    console.print_json(recipe_schema())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions and devices, and what works here and what does not."""
    from alignkit import console
    from alignkit.preflight.doctor import examine

    report = examine()
    if as_json:
        console.print_json(report.to_dict())
    else:
        for table in report.tables():
            console.print_table(*table)
    if error := report.error():
        raise error


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A finished run, or an adapter directory.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the merged model goes.")],
) -> None:
    """Write an adapter and its base as one model directory."""
    from alignkit import console
    from alignkit.launch import prepare_environment

    prepare_environment()
    from alignkit.models.merge import merge as merge_adapter

    merge_adapter(source, out)
    console.print_json({"merged": str(source), "model": str(out)})


_WHAT, _ANSWERS = "What is measured", "Answers"


@app.command("eval")
def evaluate(
    source: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run, a model directory or a hub id.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", metavar="FILE", help="Every finished stage, as evaluate: says.")
    ] = None,
    stage: StageName = None,
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", rich_help_panel=_WHAT, help="Rows; omitted: those held out."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", rich_help_panel=_WHAT, help="Of --data; omitted: test.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows", metavar="N", rich_help_panel=_WHAT)] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", rich_help_panel=_WHAT, help="Only this group. Repeatable."),
    ] = None,
    reference: Annotated[str | None, typer.Option("--reference", metavar="RUN", rich_help_panel=_WHAT)] = None,
    reward: Annotated[str | None, typer.Option("--reward", metavar="REWARD", rich_help_panel=_WHAT)] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="RUN", rich_help_panel=_WHAT, help="Other side of a win rate.")
    ] = None,
    judge: Annotated[str | None, typer.Option("--judge", metavar="REWARD", rich_help_panel=_WHAT)] = None,
    best_of: Annotated[list[int] | None, typer.Option("--best-of", metavar="N", rich_help_panel=_WHAT)] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="FILE", rich_help_panel=_WHAT, help="JSONL task, or lm_eval:TASK. Repeatable."),
    ] = None,
    shots: Annotated[
        list[int] | None, typer.Option("--shots", "-k", metavar="K", rich_help_panel=_WHAT, help="Examples of a task.")
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", metavar="N", rich_help_panel=_ANSWERS)] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", metavar="T", rich_help_panel=_ANSWERS)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", rich_help_panel=_ANSWERS)
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", metavar="N", rich_help_panel=_ANSWERS)] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", rich_help_panel=_ANSWERS)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="eval.json, elsewhere than in the run.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.")] = "auto",
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model: every figure with its n and 95 % interval, to eval.json and a table."""
    from alignkit import console
    from alignkit.evaluate.request import combine, name_runs, sources
    from alignkit.recipe.schema import EvaluateOptions

    if (source is None) == (recipe is None):
        raise typer.BadParameter("give a RUN or --recipe FILE")
    base, folder = EvaluateOptions(), Path.cwd()
    runs: dict[str, str] = {}
    if recipe is not None:
        base, runs = _find_runs(recipe, overrides, stage)
        folder = recipe.resolve().parent
    elif stage is not None or overrides:
        raise typer.BadParameter("--stage and --set belong to --recipe")
    if out is not None and len(runs) > 1:
        raise typer.BadParameter("--out is one file, and the recipe has several stages; name one with --stage")
    if split is not None and not data:
        raise typer.BadParameter("--split belongs to --data")
    given = {
        "data": sources(data or (), split), "max_rows": max_rows, "metrics": metrics, "reference": reference,
        "reward": reward, "against": against, "judge": judge, "best_of": best_of, "tasks": tasks, "shots": shots,
        "samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
    }  # fmt: skip
    options = name_runs(combine(base, given), runs)
    from alignkit.launch import prepare_environment

    prepare_environment()
    from alignkit.evaluate.results import table
    from alignkit.evaluate.run import evaluate_all

    names = [source] if source is not None else [runs[stage]] if stage else list(runs.values())
    results = []
    for result in evaluate_all(
        names, options, seed=seed, out=out, device=device, trust_code=trust_code, folder=folder, skip=recipe is not None
    ):
        results.append(result)
        if not as_json:
            console.print_table(result["name"], *table(result["results"]))
    if as_json:
        console.print_json(results if recipe is not None and not stage else results[0])


def _find_runs(path: Path, overrides: list[str] | None, stage: str | None) -> tuple[EvaluateOptions, dict[str, str]]:
    """Return what a recipe says of evaluation, and the run directory of each of its stages."""
    from alignkit.recipe import resolve

    loaded = _load_recipe(path, overrides)
    if stage is not None:
        resolve(loaded, stage)  # says what is wrong with the name
    return loaded.evaluate, {name: resolve(loaded, name).run_dir for name in loaded.order}


@app.command()
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
    from alignkit.launch import prepare_environment

    prepare_environment()
    from alignkit.chat import Settings, talk

    settings = Settings(system=system, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    talk([source] if compare is None else [source, compare], settings, device=device, trust_code=trust_code)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Show how two runs differ: values in force, data and template, versions, then what came out."""
    from alignkit import console
    from alignkit.evaluate.diff import compare_runs

    difference = compare_runs(first, second)
    if as_json:
        console.print_json(difference.to_dict())
        return
    for table in difference.tables():
        console.print_table(*table)


@app.command()
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
    from alignkit.runs.publish import publish

    stages = None
    if target.suffix in (".yaml", ".yml"):
        from alignkit.recipe import resolve

        loaded = _load_recipe(target, None)
        stages = [(name, Path(resolve(loaded, name).run_dir)) for name in loaded.order]
    done = publish(target, stages=stages, out=out, repo=push, public=public)
    if as_json:
        console.print_json(done)
    else:
        console.print_paths(done)


def main() -> int:
    """Run the command line and return the exit code; every failure is one message, shown once.

    A user's mistake never shows a traceback: ours goes to `error.log` in the run directory, or to
    `alignkit-error.log` here when there is no run yet. With ALIGNKIT_DEBUG=1 every failure shows its traceback.
    """
    # Imports make many objects and no garbage: looking for some costs a tenth of them. `launch` switches it on again.
    gc.disable()
    # Pydantic would search every installed distribution for plugins; alignkit has none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if SUPERVISED in os.environ:
        from alignkit.launch.worker import attach

        attach()
    place: dict[str, Path] = {}
    try:
        code = app(standalone_mode=False, prog_name="alignkit", obj=place)
    except TyperException as error:
        return end_usage_error(error)
    except typer.Abort:
        return leave(130, ["interrupted"])
    except Exception as error:
        if os.environ.get("ALIGNKIT_DEBUG") == "1":
            import traceback

            traceback.print_exception(error)
        return end(error, place.get("run_dir"))
    if code == 130:  # typer turns KeyboardInterrupt into this code without a word
        return leave(130, ["interrupted"])
    return leave(code if isinstance(code, int) else 0)
