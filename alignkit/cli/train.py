"""The commands that train, sft, rm, dpo, ppo, rlaif and run; and the options that several commands take."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

import typer
from typer import Option

if TYPE_CHECKING:
    from alignkit.launch.placement import Command
    from alignkit.launch.run import How
    from alignkit.recipe import Recipe, Stage

_many = partial(Option, rich_help_panel="Many processes")

_RECIPE = "The recipe: model, data and stages in YAML; -r may be left out before it."
RecipeFile = Annotated[Path, Option("--recipe", "-r", metavar="FILE", help=_RECIPE)]
StageName = Annotated[str | None, Option("--stage", metavar="NAME", help="Which stage, where there are several.")]
StepName = Annotated[str | None, Option("--stage", metavar="NAME", help="One of them, by name or step: label, ...")]
_SET = "Override a recipe value, such as dpo.beta=0.2. Repeatable."
Overrides = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help=_SET)]


def refuse_secret(out: Path | None) -> Path | None:
    """Raise UsageError for a name that looks like a credential: records, pages and cards hold it."""
    from alignkit.console import holds_secret
    from alignkit.errors import UsageError

    if out is not None and holds_secret(str(out)):
        what = "holds what looks like a secret, and a run's records name its directory; choose another"
        raise UsageError(what, where="--out")
    return out


_OUT = "Instead of runs/<recipe>/<stage>."
RunDir = Annotated[Path | None, Option("--out", metavar="DIR", help=_OUT, callback=refuse_secret)]
DryRun = Annotated[bool, Option("--dry-run", help="Show what would be done, and every value in force; do nothing.")]
Force = Annotated[bool, Option("--force", help="Start afresh: an existing run is moved aside, never deleted.")]
TrustCode = Annotated[bool, Option("--trust-code", help="Allow code of models and rewards: only what you have read.")]
_CHANGE = "Resume although this setting has changed. Repeatable."
AllowChange = Annotated[list[str] | None, Option("--allow-change", metavar="KEY", help=_CHANGE)]
_ALLOWED = "ALIGNKIT_ALLOW_KEY"  # as in feedback/server.py


def _allow_keys(names: list[str] | None) -> list[str] | None:
    """Put what is allowed where every process of the command finds it: in the environment, beside the keys."""
    if names:
        os.environ[_ALLOWED] = " ".join(names)
    return names


_KEY = "Let api_key_env of a recipe send this variable to the server it names. Repeatable."
_allow = Option("--allow-key", metavar="NAME", envvar=_ALLOWED, show_envvar=False, callback=_allow_keys, help=_KEY)
AllowKey = Annotated[list[str] | None, _allow]
_AGAIN = "Start again up to N times when a process was killed or hung, as long as each try gets further."
Retries = Annotated[int, _many("--retries", min=0, metavar="N", help=_AGAIN)]
Slurm = Annotated[bool, _many("--slurm", help="Write an sbatch script instead of training.")]
Submit = Annotated[bool, _many("--submit", help="Hand the script of --slurm to sbatch.")]
_NODE = "Which of launch.nodes this machine is; omitted: SLURM_NODEID or NODE_RANK."
NodeRank = Annotated[int | None, _many("--node-rank", min=0, metavar="N", help=_NODE)]
MainAddress = Annotated[str | None, _many("--main-address", metavar="HOST", help="Node 0: launch.main_address.")]
MainPort = Annotated[int | None, _many("--main-port", metavar="PORT", help="Its port: launch.main_port.")]
DeviceName = Annotated[str, Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.")]
AsJson = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]


class Given(NamedTuple):
    """What every command that trains is given, beside options of its own."""

    recipe: RecipeFile
    overrides: Overrides = None
    dry_run: DryRun = False
    force: Force = False
    trust_code: TrustCode = False
    allow_change: AllowChange = None
    allow_key: AllowKey = None
    as_json: AsJson = False
    retries: Retries = 0
    slurm: Slurm = False
    submit: Submit = False
    node_rank: NodeRank = None
    main_address: MainAddress = None
    main_port: MainPort = None

    @property
    def changes(self) -> list[str]:
        """The overrides, with --main-address and --main-port, which are short for two of them."""
        given = (("launch.main_address", self.main_address), ("launch.main_port", self.main_port))
        return [*(self.overrides or ()), *(f"{key}={value}" for key, value in given if value is not None)]

    @property
    def how(self) -> How:
        from alignkit.launch.run import How

        return How(self.dry_run, self.force, self.as_json, self.retries, self.slurm, self.submit)

    def load(self) -> Recipe:
        from alignkit.recipe import load_recipe

        return load_recipe(self.recipe, overrides=self.changes)

    def job(self, stage: Stage, out: Path | None = None) -> Command:
        from alignkit.launch.placement import Command

        allowed = tuple(self.allow_change or ()), tuple(self.allow_key or ())
        return Command(stage, self.changes, out, *allowed, self.node_rank)


def trains(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function that takes the context, a `Given`, and options of its own."""
    context, _, *own = inspect.signature(function, eval_str=True).parameters.values()
    hints = get_type_hints(Given, include_extras=True)
    shared = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in {"recipe": inspect.Parameter.empty, **Given._field_defaults}.items()
    }

    def command(context: typer.Context, **values: Any) -> None:
        given = Given(**{name: values.pop(name) for name in Given._fields})
        function(context, given, **values)

    recipe = shared.pop("recipe")
    taken = [context, recipe, *(option.replace(kind=recipe.kind) for option in own), *shared.values()]
    command.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in taken}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    return command


def stage_command(method: Literal["sft", "rm", "dpo", "ppo"]) -> Callable[..., None]:
    @trains
    def command(context: typer.Context, given: Given, stage: StageName = None, out: RunDir = None) -> None:
        from alignkit.recipe import resolve

        resolved = resolve(given.load(), stage, method=method, out=out, trust_code=given.trust_code)
        from alignkit.launch.run import run_one

        run_one(context.obj, given.job(resolved, out), given.how)

    return command


@trains
def rlaif(context: typer.Context, given: Given, stage: StepName = None, out: RunDir = None) -> None:
    """Align by a constitution: critiques and revisions, labels by a judge, training on them."""
    from alignkit.errors import UsageError
    from alignkit.launch.run import run_many, run_one
    from alignkit.recipe import pick_steps, resolve

    loaded = given.load()
    names = pick_steps(loaded, stage)
    if out is not None and len(names) > 1:
        raise UsageError(f"--out: {', '.join(names)} have a run directory each; name one of them with --stage")
    jobs = [given.job(resolve(loaded, name, out=out, trust_code=given.trust_code), out) for name in names]
    if len(jobs) == 1:
        run_one(context.obj, jobs[0], given.how)
    else:
        run_many(context.obj, jobs, given.how)


@trains
def run(
    context: typer.Context,
    given: Given,
    first: Annotated[str | None, Option("--from", metavar="STAGE", help="Begin with this stage.")] = None,
    last: Annotated[str | None, Option("--until", metavar="STAGE", help="End with this stage.")] = None,
) -> None:
    """Run the stages of a recipe in order, then measure the models; what is done is left alone.

    A stage whose settings, data or starting weights have changed runs again, and so do those that need it.
    """
    from alignkit.launch.run import Measuring, run_many
    from alignkit.recipe import pick_span, resolve

    loaded = given.load()
    names = pick_span(loaded, first, last)
    jobs = [given.job(resolve(loaded, name, trust_code=given.trust_code)) for name in names]
    measure = Measuring.of(loaded, names, trust_code=given.trust_code)
    run_many(context.obj, jobs, given.how, measure=measure)
