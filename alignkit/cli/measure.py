"""`alignkit eval`: its options, and which room does the work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignkit.cli.options import AllowKey, AsJson, Overrides, StageName, TrustCode

if TYPE_CHECKING:
    from alignkit.recipe.schema import EvaluateOptions

_what = partial(typer.Option, rich_help_panel="What is measured")
_answers = partial(typer.Option, rich_help_panel="Answers")


def evaluate(
    context: typer.Context,
    source: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run, a model directory or a hub id.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", metavar="FILE", help="Every finished stage, as evaluate: says.")
    ] = None,
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
        list[str] | None, _what("--constitution", metavar="FILE", help="What a language model judges by.")
    ] = None,
    best_of: Annotated[list[int] | None, _what("--best-of", metavar="N")] = None,
    tasks: Annotated[
        list[str] | None, _what("--task", metavar="FILE", help="JSONL task, or lm_eval:TASK. Repeatable.")
    ] = None,
    shots: Annotated[list[int] | None, _what("--shots", "-k", metavar="K", help="Examples of a task.")] = None,
    samples: Annotated[int | None, _answers("--samples", metavar="N")] = None,
    temperature: Annotated[float | None, _answers("--temperature", metavar="T")] = None,
    max_new_tokens: Annotated[int | None, _answers("--max-new-tokens", metavar="N")] = None,
    batch_size: Annotated[int | None, _answers("--batch-size", metavar="N")] = None,
    seed: Annotated[int | None, _answers("--seed", metavar="N")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="eval.json, elsewhere than in the run.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.")] = "auto",
    trust_code: TrustCode = False,
    allow_key: AllowKey = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: every figure with its n and 95 % interval, to eval.json and a table."""
    from alignkit import console
    from alignkit.evaluate.options import combine, judge_source, name_runs, request_stages, sources
    from alignkit.recipe.schema import EvaluateOptions, FeedbackModel

    if (source is None) == (recipe is None):
        raise typer.BadParameter("give a RUN or --recipe FILE")
    base, folder = EvaluateOptions(), Path.cwd()
    loaded = None
    if recipe is not None:
        from alignkit.recipe import load_recipe

        loaded = load_recipe(recipe, overrides=overrides or ())
        base, folder = loaded.evaluate, recipe.resolve().parent
    elif stage is not None:
        raise typer.BadParameter("--stage belongs to --recipe; of a RUN it is the directory, such as runs/RECIPE/STAGE")
    elif overrides:
        base = _read_overrides(overrides)
    if out is not None and loaded is not None and stage is None and len(loaded.order) > 1:
        raise typer.BadParameter("--out is one file, and the recipe has several stages; name one with --stage")
    if split is not None and not data:
        raise typer.BadParameter("--split belongs to --data")
    given = {
        "data": sources(data or (), split), "max_rows": max_rows, "metrics": metrics, "reference": reference,
        "reward": reward, "against": against, "judge": judge_source(judge, judge_name),
        "constitution": constitution,
        "best_of": best_of, "tasks": tasks, "shots": shots, "samples": samples, "temperature": temperature,
        "max_new_tokens": max_new_tokens, "batch_size": batch_size,
    }  # fmt: skip
    options = combine(base, given)
    typed = getattr(context.get_parameter_source("allow_key"), "name", "") == "COMMANDLINE"  # not in the environment
    if typed and not (isinstance(options.judge, FeedbackModel) and options.judge.api_key_env):
        raise typer.BadParameter(
            "--allow-key has no effect here; name the key of a judge as evaluate.judge.api_key_env in a --recipe"
        )
    if loaded is not None:
        from alignkit.recipe import resolve

        requests = request_stages(loaded, options, [resolve(loaded, stage).name] if stage is not None else None)
    elif source is not None:
        from alignkit.evaluate.target import list_siblings
        from alignkit.models.files import require_available

        require_available(source, as_run=True)
        named = name_runs(options, list_siblings(source), strict=False)
        for other in (named.against, named.reference):
            if other is not None:
                require_available(other, as_run=True)
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
