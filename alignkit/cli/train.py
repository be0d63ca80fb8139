"""The commands that train: sft, rm, dpo, ppo, rlaif, and run."""

from collections.abc import Callable
from typing import Annotated, Literal

import typer

from alignkit.cli.options import Given, RunDir, StageName, StepName, trains


def stage_command(method: Literal["sft", "rm", "dpo", "ppo"]) -> Callable[..., None]:
    """Make the command of a method."""

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
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Begin with this stage; leave those before alone.")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="End with this stage.")] = None,
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
