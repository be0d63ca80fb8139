"""One run: its files read into one object, without their secrets, and what a page or a card says of them."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alignkit.console import redact
from alignkit.errors import RunError
from alignkit.recipe.methods import TASKS
from alignkit.report.text import DASH, WORDS, count, duration, figure, share, short_count, short_name, window
from alignkit.runs.directory import RunDir
from alignkit.runs.files import describe_bytes, read_json, read_lines, read_record

_SHOWN_REJECTS = 20
_SHOWN_LABELS = 8
_SHOWN_ERROR_CHARS = 4000
# What the trainers count along with the metrics, and what a reader of curves does not look for.
_BOOKKEEPING = re.compile(r"step|epoch|.*runtime|.*(samples|steps)_per_second|.*num_tokens|episodes")


class Facts:
    """One run: its files as plain data without their secrets, absent ones empty."""

    def __init__(self, path: Path) -> None:
        """Read a run directory; records it can do without are left out with a warning where they are damaged."""
        run = RunDir(path)
        if not run.stage.is_file():
            what = "is no run: it has no stage.json; name a run directory such as runs/demo/sft"
            raise RunError(what, where=str(path))
        self.path = run.path
        records = (run.result, run.evaluation, run.path / "report.json", run.preview)  # the third is of row makers
        self.result, self.evaluation, self.feedback, preview = (_clean(read_record(file)) for file in records)
        self.preview: list[dict[str, Any]] = preview.get("rows", [])
        self.metrics, self.samples, self.warnings, self.labels = (
            _clean(read_lines(file)[:most]) for file, most in (
                (run.metrics, None), (run.samples, None), (run.warnings, None),
                (run.path / "labels.jsonl", _SHOWN_LABELS),
            )
        )  # fmt: skip
        rejects = read_lines(run.rejects)
        self.rejects, self.num_rejects = _clean(rejects[:_SHOWN_REJECTS]), len(rejects)
        error, self.recipe = (_clean(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else ""
                              for file in (run.error_log, run.recipe))  # fmt: skip
        self.error = "" if run.result.is_file() else error[-_SHOWN_ERROR_CHARS:]
        self.stage: dict[str, Any] = _clean(read_json(run.stage))
        stage = self.stage
        self.name, self.method = str(stage.get("stage", self.path.name)), str(stage.get("method", ""))
        self.full_name = "/".join(filter(None, (str(stage.get("recipe", "")), self.name)))
        objective = (stage.get("options") or {}).get("objective")
        self.task: str | None = objective if objective in TASKS else None  # of a classifier
        self.sources: list[dict[str, Any]] = (stage.get("data") or {}).get("sources") or []
        self.is_finished = self.result.get("status") == "finished"
        # The last step that is known to have been taken; how many were planned, None where only the rows say so.
        self.step = int(self.result.get("step") or max((row.get("step", 0) for row in self.metrics), default=0))
        planned = (stage.get("trl") or {}).get("max_steps") or -1
        self.num_steps = int(planned) if planned > 0 else (self.step if self.is_finished else None)
        self.start = str(stage.get("start_stage") or short_name((stage.get("model") or {}).get("path", "its start")))
        # The stages of the same recipe that it needs: its start, then its reward models.
        self.parents = [*filter(None, [stage.get("start_stage"), *(stage.get("reward_stages") or {}).values()])]

    def series(self, name: str) -> list[tuple[float, float]]:
        """List (step, value) of one metric; a value that is not finite is NaN, and the last one of a step counts."""
        found: dict[float, float] = {}
        for row in self.metrics:
            value = row.get(name)
            if value in ("nan", "inf", "-inf"):  # as `JsonLines` writes them
                found[float(row["step"])] = float("nan")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found[float(row["step"])] = float(value)
        return sorted(found.items())

    @property
    def metric_names(self) -> list[str]:
        """The names of all metrics in the order of their first appearance, held-out ones without prefix."""
        names = dict.fromkeys(name.removeprefix("eval_") for row in self.metrics for name in row)
        return [name for name in names if not _BOOKKEEPING.fullmatch(name)]

    def mean_of_last(self, name: str) -> tuple[float | None, int]:
        """Average the last tenth of a metric's logged values, ten of them at most, and say how many those are."""
        values = [value for _, value in self.series(name)]
        number = min(max(len(values) // 10, 1), 10)
        return (sum(values[-number:]) / number if values else None), number

    def last(self, name: str) -> float | None:
        """Find the final value of a metric: that of result.json, or the newest logged one."""
        value = self.result.get("metrics", {}).get(name)
        points = self.series(name)
        return float(value) if isinstance(value, int | float) else (points[-1][1] if points else None)


def _clean(value: Any) -> Any:
    """Replace every secret in the texts of plain data."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


def find_runs(directory: Path) -> list[Path]:
    """Find the run directories right below `directory`, oldest first; those that --force set aside do not count."""
    stages = [path for path in directory.glob("*/stage.json") if ".old-" not in path.parent.name]
    return [path.parent for path in sorted(stages, key=lambda path: (path.stat().st_mtime, str(path)))]


def order_runs(runs: Sequence[Facts]) -> list[Facts]:
    """Order the runs so that each comes after the one it starts from and those that reward it, else as given."""
    left, done = list(runs), list[Facts]()
    while left:
        waiting = {run.name for run in left}
        ready = next((run for run in left if not waiting & ({*run.parents} - {run.name})), left[0])
        left.remove(ready)
        done.append(ready)
    return done


# What a page or a card says about one run, as labelled texts.

Pair = tuple[str, str]
METHODS: dict[str, str] = WORDS["methods"]
_ROW_MAKERS = ("critique", "label")  # stages without a model of their own


# How a figure of words.json is written.
_SHOW: dict[str, Callable[[Any], str]] = {
    "figure": figure, "share": share, "count": count, "some": lambda number: count(number or None),
    "mean": lambda value: f"{value:.1f}" if value and isinstance(value, int | float) else "",
    "size": lambda num_bytes: describe_bytes(num_bytes) if num_bytes else "",
    "kinds": lambda kinds: ", ".join(f"{count(n)} {kind}" for kind, n in (kinds or {}).items()),
}  # fmt: skip


def describe_status(run: Facts) -> str:
    if run.is_finished or run.method in _ROW_MAKERS:
        return "finished" if run.is_finished else "not finished"
    return f"not finished, at step {count(run.step)}" + (f" of {count(run.num_steps)}" if run.num_steps else "")


def headline(run: Facts) -> list[Pair]:
    """List the one to three figures that say how a run went, by its method, with their n or the window of a mean."""
    wanted, num_rows = WORDS["headlines"].get(run.method, ()), (run.stage.get("eval_lengths") or {}).get("num_rows")
    found = []
    for name, label, show in wanted:
        if name.startswith("eval_") or run.method in _ROW_MAKERS:
            value = run.last(name)
            more = f", {count(num_rows)} held-out rows" if num_rows else ", held out" if name[:5] == "eval_" else ""
        else:
            value, number = run.mean_of_last(name)
            more = f", {window(number, 'rollout' if run.method == 'ppo' else 'logged value', last=True)}"
        if value is not None:
            found.append((label + more, _SHOW[show](value)))
    loss, number = run.mean_of_last("loss")
    return found or ([(f"training loss, {window(number, last=True)}", figure(loss))] if loss is not None else [])


def cost_tiles(run: Facts) -> list[Pair]:
    unit = "rows" if run.method in _ROW_MAKERS else "steps"
    if not run.result:
        return [(unit, count(run.step))] if unit == "steps" else []
    tokens, seconds = run.result.get("tokens"), run.result.get("wall_seconds")
    return [(unit, count(run.step)), ("tokens", short_count(tokens)), ("wall time", duration(seconds))]


def gather_warnings(run: Facts) -> list[Pair]:
    """List each warning once, evaluation's included, with when it was first said and how often."""
    said = [(str(row["message"]), str(row["time"]).replace("T", " ").removesuffix("+00:00")) for row in run.warnings]
    said += [(str(message), "evaluation") for message in run.evaluation.get("warnings", [])]
    numbers, times = Counter(message for message, _ in said), dict(reversed(said))
    return [(text, times[text] + (f", {number} times" if number > 1 else "")) for text, number in numbers.items()]


def list_lineage(run: Facts) -> list[dict[str, Any]]:
    """List what a run was made from, from the base on, then its reward models: name, role, and link to a page."""
    found: dict[str, dict[str, Any]] = {}
    actions = {"continue": ", continued", "merge": ", merged", "stack": ", stacked"}
    for entry in run.stage.get("lineage") or []:
        path, role = str(entry.get("path", "")), str(entry.get("role", "")) + actions.get(entry.get("action", ""), "")
        found[path] = {"name": short_name(path), "role": role}
    start = list(found)[-1:]
    for path, name in (run.stage.get("reward_stages") or {}).items():
        if path not in start:
            found[path] = {"name": name, "role": "gives the reward"}
    if teacher := run.stage.get("teacher"):
        found[teacher] = {"name": short_name(teacher), "role": "teaches"}
    for path, entry in found.items():
        stage = Path(path).parent.name
        has_page = Path(path).name == "model" and (run.path.parent / stage / "report.html").is_file()
        entry["link"] = f"../{quote(stage)}/report.html" if has_page else ""
    return list(found.values())


def describe_start(run: Facts) -> str:
    """Say in a few words what a run starts from, and what rewards it."""
    stage, model = run.stage, run.stage.get("model") or {}
    start = stage.get("start_stage")
    if start is None:
        path = str(stage.get("start_dir") or model.get("path", ""))
        start = short_name(path) + (" (random weights)" if model.get("init") == "scratch" else "")
    rewards = [name for name in dict.fromkeys((stage.get("reward_stages") or {}).values()) if name != start]
    return f"from {start}" + (f", rewarded by {', '.join(rewards)}" if rewards else "")


def list_data(run: Facts) -> list[Pair]:
    """List what was made, read, kept, left out and found in the rows."""
    trained = (run.stage.get("lengths") or {}).get("num_rows")
    unit = "prompts" if run.method == "ppo" else "rows"
    made = run.feedback  # by a critique or label stage
    pairs = [(label, figure(made[key])) for key, label in WORDS["counts"].items() if made.get(key)]
    for part in (made, made.get("check") or {}):
        pairs += [(f"abstained: {why}", figure(n)) for why, n in (part.get("abstained_because") or {}).items()]
    pairs += [("probability on (A) and (B)", share(made.get("option_mass"))),
              ("texts cut off", share(made.get("cut_off_share"))), (f"{unit} trained on", count(trained))]  # fmt: skip
    for label, part, key, show in WORDS["data"]:
        value = (run.stage.get(part) or {}).get(key)
        pairs.append((f"{unit} {label}" if label == "held out" else label, _SHOW[show](value)))
    return [(label, text) for label, text in pairs if text not in ("", DASH)]


def describe_cost(run: Facts) -> list[Pair]:
    """List what the run took: time, tokens, memory, steps, parameters, requests to a judge."""
    result, parameters = run.result, run.stage.get("parameters") or {}
    trainable, total, quantized = (parameters.get(key) for key in ("trainable", "total", "quantized"))
    of_total = f" of {count(total)} ({share(trainable / total)})" if trainable and total and trainable < total else ""
    spent = [each for key in ("spent", "spent_on_answers") if (each := run.feedback.get(key))]
    bits = f", {parameters.get('bits_per_quantized_parameter', 0):.3f} bits each"
    pairs = [
        ("wall time", duration(result["wall_seconds"]) if "wall_seconds" in result else ""),
        ("tokens, all sittings", count(result.get("tokens"))),
        ("tokens per second", figure(result.get("tokens_per_second") or None)),
        ("peak memory", _SHOW["size"](result.get("peak_memory_bytes"))),
        ("optimizer steps", count(run.step) if run.method not in _ROW_MAKERS else ""),
        ("trainable parameters", count(trainable) + of_total if trainable and total else ""),
        ("model in memory", _SHOW["size"](parameters.get("bytes"))),
        ("quantised parameters", count(quantized) + bits if quantized else ""),
        ("labels per second", figure(run.feedback.get("labels_per_second") or None, 3)),
    ]
    if spent:
        again = sum(sum((each.get("retries") or {}).values()) for each in spent)
        pairs.append(("requests to servers", figure(sum(each.get("requests", 0) for each in spent))))
        pairs.append(("of them tried again", figure(again)))
    if costs := [cost for each in spent if (cost := each.get("cost")) is not None]:
        pairs.append(("price of the tokens", figure(sum(costs, 0.0))))
    for role in run.stage.get("roles") or []:
        pairs.append((", ".join(role.get("roles", [])), f"{role.get('what')}, {describe_bytes(role.get('bytes', 0))}"))
    return [(label, text) for label, text in pairs if text not in ("", DASH)]


def describe_hardware(run: Facts) -> list[Pair]:
    found, git = run.stage.get("hardware") or {}, run.stage.get("git") or {}
    pairs = [
        *((str(name), str(text)) for name, text in (found.get("devices") or {}).items()),
        ("processor", str(found.get("processor", ""))), ("cores", count(found.get("cores"))),
        ("memory", _SHOW["size"](found.get("memory_bytes"))), ("system", str(found.get("system", ""))),
        ("processes", count(run.stage.get("num_processes"))),
        ("git", f"{git.get('commit', '')[:12]}{', with changes' if git.get('dirty') else ''}" if git else ""),
    ]  # fmt: skip
    return [(label, text) for label, text in pairs if text]


def list_settings(run: Facts) -> list[tuple[str, Any, str]]:
    """List key, value and origin ("default", or where the recipe gave it) of every setting of a stage."""
    stage, origins = run.stage, run.stage.get("origins") or {}
    values = {"seed": stage.get("seed")}
    for part in ("model", "lora", "launch", "options", "trainer"):
        section = run.name if part in ("options", "trainer") else part
        values |= {f"{section}.{key}": value for key, value in (stage.get(part) or {}).items()}
    values.pop(f"{run.name}.method", None)
    return [(key, value, str(origins.get(key, "default"))) for key, value in values.items()]


def group_samples(run: Facts) -> list[list[dict[str, Any]]]:
    """Group the rows of samples.jsonl by prompt, each in the order of its steps."""
    by_number = defaultdict[Any, list[dict[str, Any]]](list)
    for row in sorted(run.samples, key=lambda row: row["step"]):
        by_number[row.get("number")].append(row)
    return list(by_number.values())


def find_rewards(row: Mapping[str, Any]) -> dict[str, float]:
    others = ("step", "number", "when", "prompt", "answer", "reference", "answers", "rewards")
    return {name: float(value) for name, value in row.items()
            if name not in others and isinstance(value, int | float)}  # fmt: skip
