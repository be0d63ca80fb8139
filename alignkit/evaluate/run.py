"""`alignkit eval`: measure a model on its rows and keep the figures in eval.json, the newest of each."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.data import Row
from alignkit.errors import AlignKitError, EnvironmentProblem, JudgeError, RunError, Stopped, UsageError
from alignkit.evaluate.context import Context, Figure, Metric, compare_rows, load_metrics
from alignkit.evaluate.options import name_runs
from alignkit.evaluate.policy import Policy
from alignkit.evaluate.target import Target, find_target, find_trained, list_siblings, read_measured
from alignkit.feedback.cache import Store
from alignkit.models.chat import Chat
from alignkit.models.files import find_model_dir
from alignkit.models.frozen import Causal, fingerprint_causal, load_tokenizer_of
from alignkit.recipe import Stage
from alignkit.recipe.schema import METRICS, EvaluateOptions
from alignkit.report.evaluation import name_all_data
from alignkit.report.publish import show
from alignkit.rewards import Workspace
from alignkit.rewards.kinds import check_judge
from alignkit.rewards.kinds.judge import Comparer
from alignkit.runs.directory import RunDir, form_of
from alignkit.runs.files import read_record, write_json
from alignkit.runs.record import versions

SCHEMA = 1
_BY_START = ", by its start "


def evaluate(
    source: str, options: EvaluateOptions, *, seed: int | None = None, out: Path | None = None, device: str = "auto",
    trust_code: bool = False, folder: Path | None = None, lenient: bool = False, judge: Comparer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a model and return what eval.json holds now.
    It is written into the run, or to `out`, answers and scores beside it. `folder` is where functions are looked up,
    too; `judge` is one that options cannot name. With `lenient` what cannot be measured is left out with a warning,
    else it raises UsageError; when the judge gave up JudgeError, after writing the other figures."""
    began, target = time.monotonic(), find_target(source, trust_code=trust_code)
    seed = seed if seed is not None else int(target.stage.get("seed", 0))
    path = out.expanduser().absolute() if out else target.run.evaluation if target.run else None
    if out is not None and out.is_dir():
        raise UsageError(f"{out} is a directory; name the file of the figures", where="--out")
    cache = Store(path.with_name("eval-cache.jsonl") if path else None)
    space = Workspace(device, options.batch_size, trust_code, folder or Path.cwd(), cache)
    judged = path.with_name("eval-judged.jsonl") if path else None
    context = Context(target, options, *_read(target, options, space), space, seed=seed, judged=judged)
    if judge is not None:
        context.judge = judge
    trained = find_trained(target, context.rows)
    if trained:
        what = f"{trained['rows']} of {trained['of']} rows of {context.label} have a prompt that"
        space.warn(f"{what} {' and '.join(trained['by'])} trained on: figures on them are not of held-out rows")
    try:
        figures, failure = _measure(context, lenient=lenient)
        if options.start is not False:
            begun = _measure_start(context)
            figures = [compare_rows(each, begun.get(_key(each)), context.target.start_name, resamples=options.resamples)
                       for each in figures]  # fmt: skip
            figures += begun.values() if options.start else ()
    except KeyboardInterrupt:
        kept = "answers so far are kept; the same command goes on" if path else "nothing is kept without --out"
        raise Stopped(f"interrupted while measuring {target.name}: {kept}", exit_code=130) from None
    figures = [replace(each, trained=trained) if each.data == context.label else each for each in figures]
    for message in space.warnings:
        console.warn(message)
    facts = {"name": target.name, "model": target.source, "weights": fingerprint_causal(target.source), "seed": seed}
    data = describe(figures, seconds=time.monotonic() - began, warnings=space.warnings, **facts)
    if path is not None:
        with cache.exclusive():  # another evaluation of this run may be writing its figures
            try:
                data = merge(read_record(path), data)
            except (AttributeError, TypeError):
                console.warn(f"{path}: holds what is no figure of ours; none of it is kept")
            write_json(path, data)
    if out is None and target.run is not None:
        show(target.run)  # its page and its card show the figures
    if failure is not None:
        kept = f"; the other figures are in {path.name}, and no verdict will be asked for again" if path else ""
        advice = "run the same command to go on (with a higher limit where it was the budget)"
        raise JudgeError(f"{target.name}: win_rate: {failure}{kept}: {advice}")
    return data


def measure_in_training(stage: Stage, model: Any, chat: Chat, *, step: int) -> dict[str, float]:
    """Measure the metrics of `evaluate:` on the weights that are being trained, as `evaluate` does on a run's.
    Where it names none, answers and perplexity. No global generator is drawn from: training goes on as without it."""
    run, options = RunDir(Path(stage.run_dir).absolute()), stage.evaluate or EvaluateOptions()
    options = name_runs(options, list_siblings(str(run.path)), strict=False)
    options = options.model_copy(update={"metrics": options.metrics or ["answers", "perplexity"]})
    device, folder = str(next(model.parameters()).device), Path(stage.recipe_path).resolve().parent
    space = Workspace(device.partition(":")[0], options.batch_size, stage.trust_code, folder)
    target = Target(str(run.path), run, False, read_record(run.stage))
    context = Context(target, options, *_read(target, options, space), space, seed=stage.seed)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context.policy = Policy(target.source, space, (Causal(model, chat.tokenizer, positions, f"step {step}"), chat))
    figures = [figure for metric in _choose(context, lenient=True).values() for figure in metric.measure(context)]
    return {figure.metric: figure.value for figure in figures if figure.slice is None and figure.value is not None}


def _measure(context: Context, *, lenient: bool) -> tuple[list[Figure], JudgeError | None]:
    """Measure all that was asked for; a judge that gives up takes nothing from the other metrics."""
    figures, failure, chosen = list[Figure](), None, _choose(context, lenient=lenient)
    for metric in chosen.values():
        metric.prepare(context)
    for name, metric in chosen.items():
        console.note(f"{context.target.name}: measuring {name}")
        try:
            figures += metric.measure(context)
        except EnvironmentProblem as problem:
            if context.options.metrics is not None or not metric.optional:
                raise
            context.space.warn(str(problem))
        except JudgeError as error:
            failure = error
    return figures, failure


def _key(figure: Figure) -> tuple[str, str | None, str]:
    return figure.metric, figure.slice, figure.data.partition(_BY_START)[0]


def _measure_start(context: Context) -> dict[tuple[str, str | None, str], Figure]:
    """Measure what a run started from on its rows: unasked only what costs little, and what cannot be is no error."""
    target, options = context.target, context.options
    start = None if target.reward else target.start()
    wanted = options.metrics or METRICS
    if options.start is None:
        known = {"sft": ("perplexity",), "dpo": ("answers", "perplexity"), "ppo": ("answers", "perplexity")}
        fitting = known.get(str(target.stage.get("method")), ())
        wanted = [name for name in wanted if name in fitting and load_metrics()[name].find_lack(context) is None]
    # KL, pairs and wins are measured of a run beside its start already.
    wanted = [name for name in wanted if name not in ("kl", "pairs", "win_rate")]
    if start is None or not wanted:
        return {}
    alone = {"metrics": wanted if options.metrics or options.start is None else None, "reference": None,
             "against": None, "best_of": [], "frontier": None}  # fmt: skip
    begun = replace(target, source=start, run=None, stage=target.stage | {"stage": target.start_name})
    chosen, label = options.model_copy(update=alone), f"{context.label}{_BY_START}{target.start_name}"
    before = Context(begun, chosen, context.rows, label, context.space, seed=context.seed)
    try:
        return {_key(figure): figure for figure in _measure(before, lenient=True)[0]}
    except AlignKitError as error:
        if options.start:
            raise
        context.space.warn(f"not compared with its start {target.start_name}: {error}")
        return {}


def _choose(context: Context, *, lenient: bool) -> dict[str, Metric]:
    """Find the metrics to measure; raises UsageError for one that was asked for and cannot be."""
    known, options = load_metrics(), context.options
    lacks = {name: metric.find_lack(context) for name, metric in known.items()}
    if options.metrics is None:
        for name, metric in known.items():
            if metric.key and getattr(options, metric.key) and lacks[name]:
                raise UsageError(f"{name} cannot be measured: {lacks[name]}")
        if all(lacks.values()):
            raise UsageError(f"nothing can be measured: {'; '.join(dict.fromkeys(map(str, lacks.values())))}")
    problems = [f"{name}: {lacks[name]}" for name in options.metrics or () if lacks[name]]
    if problems and not lenient:
        raise UsageError(f"--metric {'; '.join(problems)}")
    for problem in problems:
        context.space.warn(f"not measured: {problem}")
    return {name: known[name] for name in options.metrics or known if lacks[name] is None}


def evaluate_all(
    requests: Sequence[tuple[str, EvaluateOptions]], *, skip: bool, trust_code: bool, **settings: Any
) -> Iterator[dict[str, Any]]:
    """Measure models one after another, each as it is asked for, and yield what `evaluate` returns; it has `settings`.
    With `skip` a run that is not finished is left out with a word, and what a stage cannot be measured on is too.
    Raises RunError when none is finished, and the last stage's error when none could be measured."""
    finished = []
    for source, options in requests:
        if skip and not RunDir(Path(source).expanduser().absolute()).is_finished():
            console.note(f"{source}: not finished, left out")
            continue
        finished.append((source, options))
        check_judge(options)
        for other in () if skip else (options.against, options.reference):
            if other is not None:
                find_model_dir(other)  # refuses a path that is not there before anything is measured
    if not finished:
        raise RunError("no stage is finished; train first, with alignkit run --recipe FILE")
    several, num_measured = skip and len(finished) > 1, 0
    for source, options in finished:
        chosen, run = options, _directory(source)
        if several and find_target(source, trust_code=trust_code).reward:
            chosen = options.model_copy(update={"against": None, "best_of": [], "tasks": []})
        elif several:  # nothing is measured beside itself
            named = {key: getattr(options, key) for key in ("reference", "against")}
            same = {key: None for key, other in named.items() if other is not None and _directory(other) == run}
            chosen = options.model_copy(update=same)
        references = [options.reference]
        if options.frontier is not None and options.reference is None:  # then others may have started from this one
            others = [path.parent for path in run.parent.glob("*/stage.json") if RunDir(path.parent).model.is_dir()]
            references = [find_target(str(other), trust_code=False).reference() for other in others]
        if options.frontier is not None and run not in [_directory(each) for each in references if each is not None]:
            kept = None if chosen.metrics is None else [name for name in chosen.metrics if name != "frontier"]
            chosen = chosen.model_copy(update={"frontier": None, "metrics": kept})
            if kept == []:
                console.note(f"{source}: no stage is held near it, left out")
                continue
        try:
            yield evaluate(source, chosen, trust_code=trust_code, lenient=several, **settings)
        except UsageError as error:
            if not several or (source == finished[-1][0] and not num_measured):
                raise
            console.warn(f"{source}: {error}; left out")
        else:
            num_measured += 1


def _directory(source: str) -> Path:
    path = Path(source).expanduser().absolute()
    return path.parent if path.name == "model" else path


def _read(target: Target, options: EvaluateOptions, space: Workspace) -> tuple[list[Row], str]:
    """Read the rows to measure on, held out by the seed of the run, and their name; none for tasks alone."""
    wants = options.metrics or ()
    if options.tasks and (set(wants) == {"tasks"} or not (wants or options.data or target.stage)):
        return [], ""
    sources, share = (options.data, None) if options.data else target.held_out()
    form = form_of(target.stage.get("data") or {})
    for source in sources:
        if form and source.chat != "auto" and source.chat != (form == "chat"):
            trained = "turns of a chat" if form == "chat" else "text"
            said = f"{source.path} has chat: {str(source.chat).lower()}"
            raise UsageError(f"{said}, and {target.name} was trained on {trained}; take it out")
    if form == "text" and options.data:  # prompts end as they did in training
        mark = target.stage["options"]["data"][0]["separator"]
        sources = [source if "separator" in source.model_fields_set else source.model_copy(update={"separator": mark})
                   for source in sources]  # fmt: skip
    template = form == "chat" if form else load_tokenizer_of(target.source).chat_template is not None
    seed = int(target.stage.get("seed", 0))
    return read_measured(
        sources, share=share, seed=seed, max_rows=options.max_rows, warn=space.warn, template=template,
        method=target.head["objective"] if target.head else None,
    )  # fmt: skip


def describe(figures: Sequence[Figure], *, seconds: float, warnings: Sequence[str], **facts: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA, **facts,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "wall_seconds": round(seconds, 3),
        "versions": versions() | versions(("lm_eval", "rouge-score", "sacrebleu")), "warnings": list(warnings),
        "results": [figure.to_dict() for figure in figures],
    }  # fmt: skip


def merge(before: Mapping[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Add to `now` the results of `before` that were not measured again; of other weights nothing is kept."""
    if before.get("schema") != SCHEMA or before.get("weights") != now["weights"]:
        return now

    def whole(result: Mapping[str, Any]) -> str:
        return repr((result.get("metric"), result.get("data"), sorted(result.get("settings", {}).items(), key=str)))

    # A slice belongs to its whole: the cut into slices may have changed.
    again = {whole(result) for result in now["results"]}
    measured = {(whole(result), result.get("slice")) for result in now["results"]}
    kept = [result for result in before.get("results", ()) if (whole(result), result.get("slice")) not in measured
            and not (result.get("slice") and whole(result) in again)]  # fmt: skip
    warnings = list(dict.fromkeys([*before.get("warnings", ()), *now["warnings"]])) if kept else now["warnings"]
    return {**now, "warnings": warnings, "results": [*kept, *now["results"]]}


def table(results: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    columns = ("metric", "value", "95 % interval", "n", "unit", "on")
    rows = []
    for result, data in zip(results, name_all_data(results), strict=True):
        says_nothing = result["low"] is None or result["low"] == result["high"]
        between = None if says_nothing else f"{result['low']:.4g} to {result['high']:.4g}"
        name = result["metric"] if result["slice"] is None else f"  {result['metric']}, {result['slice']}"
        rows.append((name, result["value"], between, result["n"], result["unit"] or None, data))
    return columns, rows
