"""Tasks of lm-evaluation-harness, run by its own library on the model that is loaded here.

Its prompts, its scoring and its standard errors; only the interval is drawn from them here. Its data sets come from the
hub unless the task says otherwise, and its results are not in our cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, EnvironmentProblem
from alignkit.evaluate.figures import Better, Figure, Interval, make_figure
from alignkit.evaluate.intervals import wilson
from alignkit.evaluate.policy import Policy
from alignkit.models.generation import plainly

PREFIX = "lm_eval:"
_Z = 1.959963984540054
_SHARES = ("acc", "exact_match")  # means of right and wrong, for which Wilson's interval holds


def measure_harness(
    policy: Policy, task: str, *, shots: Sequence[int], max_rows: int | None, batch_size: int, seed: int
) -> list[Figure]:
    """Return every figure of a task for each K; `task` is a name or the path of a task's YAML file.

    Raises EnvironmentProblem without lm-eval, DataError for an unknown task.
    """
    library, hflm = _require()
    manager, names = _find_task(task)
    figures: list[Figure] = []
    for number in shots:
        loaded = policy.loaded
        with _quiet(), plainly(loaded.model):
            results = library.simple_evaluate(
                model=hflm(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size),
                tasks=names,
                task_manager=manager,
                num_fewshot=number,
                limit=max_rows,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        figures += _read_results(results, number)
    return figures


def _find_task(task: str) -> tuple[Any, list[str]]:
    from lm_eval.tasks import TaskManager

    file = Path(task).expanduser()
    with _quiet():
        if file.suffix in (".yaml", ".yml"):
            if not file.is_file():
                raise DataError("there is no such task file", where=str(file))
            return TaskManager(include_path=str(file.parent.resolve())), [_name_of(file)]
        manager = TaskManager()
        known = set(manager.all_tasks)
    if task not in known:
        from difflib import get_close_matches

        near = get_close_matches(task, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"{PREFIX}{task}: lm-evaluation-harness has no such task{hint}")
    return manager, [task]


def _name_of(file: Path) -> str:
    from ruamel.yaml import YAML

    content = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise DataError("needs `task: NAME`", where=str(file))
    return str(content["task"])


def _read_results(results: dict[str, Any], shots: int) -> list[Figure]:
    figures = []
    for task, values in results["results"].items():
        n = int(results["n-samples"].get(task, {}).get("effective", 0))
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not filtered:
                continue
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric)
            better: Better | None = None if higher is None else "higher" if higher else "lower"
            name = f"{PREFIX[:-1]}/{task}/{metric}" + ("" if filtered == "none" else f"/{filtered}")
            error = values.get(f"{metric}_stderr,{filtered}")
            found = _interval(metric, float(value), error, n)
            figures.append(make_figure(name, found, better=better, slice=f"K={shots}"))
    return figures


def _interval(metric: str, value: float, error: Any, n: int) -> Interval:
    if metric.startswith(_SHARES) and n and 0 <= value <= 1:
        return wilson(value * n, n)
    if isinstance(error, (int, float)):
        return Interval(value, value - _Z * error, value + _Z * error, n, "normal")
    return Interval(value, None, None, n, "none")


def _require() -> tuple[Any, Any]:
    """Return the library and its class of Hugging Face models."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        missing = "is not installed" if error.name == "lm_eval" else f"cannot be imported ({error})"
        raise EnvironmentProblem(
            f"lm-evaluation-harness {missing}; pip install 'alignkit[eval]', or leave its tasks out"
        ) from error
    return lm_eval, HFLM


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the library logs to warnings: the console is ours."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
