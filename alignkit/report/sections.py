"""What a page or a card says about one run: figures, settings, data and costs as labelled texts, lineage and tables."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alignkit.report.facts import Facts
from alignkit.report.text import DASH, WORDS, count, duration, figure, share, short_count, short_name, window
from alignkit.runs.files import describe_bytes

Pair = tuple[str, str]
METHODS: dict[str, str] = WORDS["methods"]
_ROW_MAKERS = ("critique", "label")  # stages without a model of their own


def _size(num_bytes: float | None) -> str:
    return describe_bytes(num_bytes) if num_bytes else ""


def _mean(value: Any) -> str:
    return f"{value:.1f}" if value and isinstance(value, int | float) else ""


# How a figure of words.json is written.
_SHOW: dict[str, Callable[[Any], str]] = {
    "figure": figure, "share": share, "count": count, "mean": _mean, "some": lambda number: count(number or None),
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
    """List what was read, kept, left out and found in the rows."""
    trained = (run.stage.get("lengths") or {}).get("num_rows")
    unit = "prompts" if run.method == "ppo" else "rows"
    pairs = [*_list_counts(run.feedback), (f"{unit} trained on", count(trained))]
    for label, part, key, show in WORDS["data"]:
        value = (run.stage.get(part) or {}).get(key)
        pairs.append((f"{unit} {label}" if label == "held out" else label, _SHOW[show](value)))
    return [(label, text) for label, text in pairs if text not in ("", DASH)]


def _list_counts(report: Mapping[str, Any]) -> Iterator[Pair]:
    """List how many texts or comparisons a critique or label stage made, and what became of them."""
    yield from ((label, figure(report[key])) for key, label in WORDS["counts"].items() if report.get(key))
    for part in (report, report.get("check") or {}):
        for reason, number in (part.get("abstained_because") or {}).items():
            yield f"abstained: {reason}", figure(number)
    yield "probability on (A) and (B)", share(report.get("option_mass"))
    yield "texts cut off", share(report.get("cut_off_share"))


def describe_cost(run: Facts) -> list[Pair]:
    """List what the run took: time, tokens, memory, steps, parameters, requests to a judge."""
    result, parameters = run.result, run.stage.get("parameters") or {}
    trainable, total, quantized = (parameters.get(key) for key in ("trainable", "total", "quantized"))
    of_total = f" of {count(total)} ({share(trainable / total)})" if trainable and total and trainable < total else ""
    spent = [each for key in ("spent", "spent_on_answers") if (each := run.feedback.get(key))]
    speed = run.feedback.get("labels_per_second")
    pairs = [
        ("wall time", duration(result["wall_seconds"]) if "wall_seconds" in result else ""),
        ("tokens, all sittings", count(result.get("tokens"))),
        ("tokens per second", figure(result["tokens_per_second"]) if result.get("tokens_per_second") else ""),
        ("peak memory", _size(result.get("peak_memory_bytes"))),
        ("optimizer steps", count(run.step) if run.method not in _ROW_MAKERS else ""),
        ("trainable parameters", count(trainable) + of_total if trainable and total else ""),
        ("model in memory", _size(parameters.get("bytes"))),
        ("quantised parameters", f"{count(quantized)}, {parameters.get('bits_per_quantized_parameter', 0):.3f} bits "
         "each" if quantized else ""),
        ("labels per second", figure(speed, 3) if speed else ""),
    ]  # fmt: skip
    if spent:
        again = sum(sum((each.get("retries") or {}).values()) for each in spent)
        pairs.append(("requests to servers", figure(sum(each.get("requests", 0) for each in spent))))
        pairs.append(("of them tried again", figure(again)))
    if costs := [cost for each in spent if (cost := each.get("cost")) is not None]:
        pairs.append(("price of the tokens", figure(sum(costs, 0.0))))
    for role in run.stage.get("roles") or []:
        pairs.append((", ".join(role.get("roles", [])), f"{role.get('what')}, {describe_bytes(role.get('bytes', 0))}"))
    return [(label, text) for label, text in pairs if text]


def describe_hardware(run: Facts) -> list[Pair]:
    found, git = run.stage.get("hardware") or {}, run.stage.get("git") or {}
    pairs = [
        *((str(name), str(text)) for name, text in (found.get("devices") or {}).items()),
        ("processor", str(found.get("processor", ""))), ("cores", count(found.get("cores"))),
        ("memory", _size(found.get("memory_bytes"))), ("system", str(found.get("system", ""))),
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


def show_setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def group_samples(run: Facts) -> list[list[dict[str, Any]]]:
    """Group the rows of samples.jsonl by prompt, each in the order of its steps."""
    by_number: dict[Any, list[dict[str, Any]]] = {}
    for row in sorted(run.samples, key=lambda row: row["step"]):
        by_number.setdefault(row.get("number"), []).append(row)
    return list(by_number.values())


def find_rewards(row: Mapping[str, Any]) -> dict[str, float]:
    others = ("step", "number", "when", "prompt", "answer", "reference", "answers", "rewards")
    return {name: float(value) for name, value in row.items()
            if name not in others and isinstance(value, int | float)}  # fmt: skip
