"""Tasks solved from K examples in the prompt: ours in GPT-3's form, and those of lm-evaluation-harness.

A task of ours is JSON lines of {"context", "completion"}, as openai/gpt-3 publishes them (Brown et al. 2020, arXiv
2005.14165, section 2.4); with "choices" the completion is one of them, and "answer_context" is what GPT-3 divides by
("Answer: "). Free-form answers are greedy, the paper's use 4 beams. lm_eval:TASK has prompts, scoring and standard
errors of its own library, and data from the hub; its results are not in our cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from alignkit.data.files import read_file
from alignkit.data.rows import BadRow
from alignkit.errors import DataError, EnvironmentProblem, Problem, suggest
from alignkit.evaluate.context import POLICY, Better, Context, Figure, Metric, Z, make_figure, mean, wilson
from alignkit.evaluate.policy import Policy
from alignkit.models.generation import plainly

_SPARE_TOKENS = 8  # that an answer may be longer than the longest right one before it is cut
_SHOWN = 8
_HARNESS = "lm_eval:"
_SHARES = ("acc", "exact_match")  # of the harness: means of right and wrong, for which Wilson's interval holds


def _read_tasks(context: Context) -> dict[str, list[Item]]:
    """Read the tasks of ours; raises DataError for one that is not there."""
    own = [task for task in context.options.tasks if not task.startswith(_HARNESS)]
    return {task: read_task(Path(task).expanduser(), max_rows=context.options.max_rows) for task in own}


def measure(context: Context) -> list[Figure]:
    options, seed, own, figures = context.options, context.seed, _read_tasks(context), []
    policy, shots, max_rows = context.policy, list(dict.fromkeys(options.shots)), options.max_rows
    for task in dict.fromkeys(options.tasks):
        if task in own:
            found = measure_few_shot(policy, own[task], shots=shots, seed=seed, resamples=options.resamples)
        else:
            limits = max_rows, options.batch_size
            found = measure_harness(policy, task.removeprefix(_HARNESS), *limits, shots=shots, seed=seed)
        common = {"max_rows": max_rows, "seed": seed}
        figures += [replace(each, data=task, settings=common | each.settings) for each in found]
    return figures


_NEEDS = (lambda context: context.options.tasks, "no task is named (--task)")
METRIC = Metric(measure, (POLICY, _NEEDS), prepare=_read_tasks)


@dataclass(frozen=True)
class Item:
    """One question of a task."""

    context: str
    completion: str
    choices: tuple[str, ...] = ()
    answer_context: str | None = None


def read_task(path: Path, *, max_rows: int | None = None) -> list[Item]:
    """Read the items of a task; raises DataError with every line that does not fit."""
    if not path.is_file():
        raise DataError("there is no such task; give a JSONL file or lm_eval:TASK", where=str(path))
    items: list[Item] = []
    problems: list[Problem] = []
    for place, record in read_file(path):
        try:
            if isinstance(record, BadRow):
                raise record
            context, completion, choices = record.get("context"), record.get("completion"), record.get("choices") or []
            if not isinstance(context, str) or not isinstance(completion, str) or not completion.strip():
                raise BadRow(f"needs the texts context and completion; the row has {', '.join(record) or 'nothing'}")
            if not isinstance(choices, list) or any(not isinstance(choice, str) or not choice for choice in choices):
                raise BadRow("choices: must be a list of texts")
            if not choices and "\n" in completion.strip():
                raise BadRow("completion: has several lines, and an answer ends with its first; give choices")
            if choices and completion not in choices:
                raise BadRow(f"choices: the completion {completion!r} is not one of them")
            if len(set(choices)) < len(choices) or len(choices) == 1:
                raise BadRow("choices: must be two or more, each of them once")
            if not isinstance(answer_context := record.get("answer_context"), str | None):
                raise BadRow("answer_context: must be a text")
            if items and bool(choices) != bool(items[0].choices):
                first = "has" if items[0].choices else "has none"
                raise BadRow(f"choices: the first item {first}, this one differs; items with and without are two tasks")
            "".join([context, completion, *choices, answer_context or ""]).encode()
            items.append(Item(context, completion, tuple(choices), answer_context))
        except (BadRow, UnicodeEncodeError) as bad:
            half = "a text holds half of a surrogate pair, which is not valid Unicode"
            problems.append(Problem(bad.reason if isinstance(bad, BadRow) else half, place))
        if len(items) == max_rows:
            break
    if problems or not items:
        raise DataError(problems or [Problem("holds no item", str(path))])
    return items


def write_prompt(items: Sequence[Item], number: int, *, shots: int, seed: int) -> str:
    """Write K other items with their completions, drawn anew each time, an empty line between, and its context."""
    if shots >= len(items):
        raise DataError(f"{shots} examples need a task of more than {shots} rows; it has {len(items)}")
    chosen = Random(f"{seed} {shots} {number}").sample([at for at in range(len(items)) if at != number], shots)
    between = "" if items[number].context.startswith("\n") else "\n\n"
    return between.join([*(items[place].context + items[place].completion for place in chosen), items[number].context])


def measure_few_shot(
    policy: Policy, items: Sequence[Item], *, shots: Sequence[int], seed: int, resamples: int
) -> list[Figure]:
    """Measure, for each K, exact match of greedy answers, or accuracy by likelihood where the items have choices."""
    figures: list[Figure] = []
    for number in shots:
        prompts = [write_prompt(items, place, shots=number, seed=seed) for place in range(len(items))]
        found = _rank_choices(policy, items, prompts) if items[0].choices else _match(policy, items, prompts, resamples)
        figures += [replace(figure, better="higher", slice=f"K={number}") for figure in found]
    return figures


def _match(policy: Policy, items: Sequence[Item], prompts: Sequence[str], resamples: int) -> list[Figure]:
    """Compare the greedy answer up to the first line break, blanks around it aside, with the completion."""
    wanted = [item.completion for item in items]
    scored, answers = zip(*policy.match(prompts, wanted, spare_tokens=_SPARE_TOKENS, num_whole=_SHOWN), strict=True)
    right = [answer.strip() == item.completion.strip() for answer, item in zip(answers, items, strict=True)]
    details = [
        {"prompt": prompt, "answer": answer, "reference": item.completion, "right": ok}
        for prompt, answer, item, ok in list(zip(prompts, answers, items, right, strict=True))[:_SHOWN]
    ]
    per_token = mean([item.logp / item.tokens for item in scored], resamples=resamples)
    return [
        make_figure("exact_match", wilson(sum(right), len(right)), unit="share", details=details),
        make_figure("completion_logp", per_token, unit="nats per token"),
    ]


def _rank_choices(policy: Policy, items: Sequence[Item], prompts: Sequence[str]) -> list[Figure]:
    """Take the choice with the highest log p: as it is, per token, and relative to p(choice | answer context)."""
    asked = [(prompt, choice) for prompt, item in zip(prompts, items, strict=True) for choice in item.choices]
    scored = policy.score_continuations([prompt for prompt, _ in asked], [choice for _, choice in asked])
    rules = {
        "likelihood_accuracy": [item.logp / max(item.tokens, 1) for item in scored],
        "likelihood_accuracy_sum": [item.logp for item in scored],
    }
    if all(item.answer_context is not None for item in items):
        contexts = [item.answer_context or "" for item in items for _ in item.choices]
        alone = policy.score_continuations(contexts, [choice for _, choice in asked])
        relative = [item.logp - other.logp for item, other in zip(scored, alone, strict=True)]
        rules["likelihood_accuracy_relative"] = relative
    figures = []
    for name, values in rules.items():
        waiting, right = iter(values), 0
        for item in items:
            own = [next(waiting) for _ in item.choices]
            right += item.choices[own.index(max(own))] == item.completion
        figures.append(make_figure(name, wilson(right, len(items)), unit="share"))
    return figures


def measure_harness(
    policy: Policy, task: str, max_rows: int | None, batch_size: int, *, shots: Sequence[int], seed: int
) -> list[Figure]:
    """Read every figure of a task for each K; `task` is a name or the path of a task's YAML file."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from ruamel.yaml import YAML
    except ImportError as error:
        missing = "is not installed" if error.name == "lm_eval" else f"cannot be imported ({error})"
        what = f"lm-evaluation-harness {missing}; pip install 'alignkit[eval]', or leave its tasks out"
        raise EnvironmentProblem(what) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the console is ours
    name, file = task, Path(task).expanduser()
    if file.suffix in (".yaml", ".yml"):
        if not file.is_file():
            raise DataError("there is no such task file", where=str(file))
        content = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("task"), str):
            raise DataError("needs `task: NAME`", where=str(file))
        manager, name = TaskManager(include_path=str(file.parent.resolve())), content["task"]
    elif task not in (manager := TaskManager()).all_tasks:
        hint = suggest(task, set(manager.all_tasks))
        raise DataError(f"{_HARNESS}{task}: lm-evaluation-harness has no such task{hint}")
    figures: list[Figure] = []
    for number in shots:
        loaded = policy.loaded
        with plainly(loaded.model):
            results = lm_eval.simple_evaluate(
                model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size), tasks=[name],
                task_manager=manager, num_fewshot=number, limit=max_rows, log_samples=False, random_seed=seed,
                numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        for each, values in results["results"].items():
            n = int(results["n-samples"].get(each, {}).get("effective", 0))
            higher = results.get("higher_is_better", {}).get(each, {})
            for key, value in values.items():
                metric, _, filtered = key.partition(",")
                if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not filtered:
                    continue
                spread = values.get(f"{metric}_stderr,{filtered}")
                found = Figure("", float(value), None, None, n)
                if metric.startswith(_SHARES) and n and 0 <= value <= 1:
                    found = wilson(value * n, n)
                elif isinstance(spread, (int, float)):
                    low, high = value - Z * spread, value + Z * spread
                    found = Figure("", float(value), low, high, n, interval="normal")
                better: dict[bool | None, Better] = {True: "higher", False: "lower"}
                shown = f"{_HARNESS[:-1]}/{each}/{metric}" + ("" if filtered == "none" else f"/{filtered}")
                figures.append(make_figure(shown, found, better=better.get(higher.get(metric)), slice=f"K={number}"))
    return figures
