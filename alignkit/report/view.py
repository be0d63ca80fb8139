"""What a page says about one run, in words and formatted numbers, ready for the template.

It decides what is shown; how it looks is the template's and the style's.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from alignkit.report.curves import Curve, draw_curves
from alignkit.report.evaluation import Examples, Row, draw_calibration, list_examples, tabulate
from alignkit.report.facts import Facts
from alignkit.report.feedback import list_cases, list_costs, list_counts, with_feedback
from alignkit.report.numbers import count, duration, figure, share, short_count
from alignkit.report.samples import Sample, arrange_samples
from alignkit.runs.files import describe_bytes

Pair = tuple[str, str]
METHODS = {
    "sft": "supervised fine-tuning",
    "rm": "reward modelling",
    "dpo": "direct preference optimisation",
    "ppo": "reinforcement learning with PPO",
    "critique": "critiques and revisions",
    "label": "comparisons by a judge",
}
ROW_MAKERS = ("critique", "label")  # stages without a model of their own


@dataclass(frozen=True)
class RunView:
    """One run as the template shows it."""

    name: str
    method: str
    method_name: str
    status: str
    state: str  # done, stopped: for the style
    tiles: list[Pair]
    warnings: list[Pair]  # text, and how often or when
    error: str
    curves: list[Curve]
    other_curves: list[Curve]
    evaluation: list[Row]
    calibration: Markup
    examples: list[Examples]
    samples: list[Sample]
    preview: list[dict[str, Any]]
    data: list[Pair]
    sources: list[tuple[str, str, str, str, str]]
    rejects: list[Pair]
    num_rejects: int
    trained_share: float | None
    cost: list[Pair]
    hardware: list[Pair]
    versions: list[Pair]
    settings: list[tuple[str, str, str]]
    defaults: list[tuple[str, str, str]]
    recipe: str


def view_run(run: Facts) -> RunView:
    """Return everything the page says about a run."""
    judged = with_feedback(run)
    main, others = draw_curves(run)
    given, defaults = _settings(run)
    lengths = run.stage.get("lengths") or {}
    tokens, trained = lengths.get("num_tokens"), lengths.get("num_trained_tokens")
    return RunView(
        name=run.name,
        method=run.method,
        method_name=METHODS.get(run.method, run.method),
        status=describe_status(run),
        state="done" if run.is_finished else "stopped",
        tiles=[*headline(run), *cost_tiles(run)],
        warnings=gather_warnings(run),
        error=run.error,
        curves=main,
        other_curves=others,
        evaluation=tabulate([judged]),
        calibration=draw_calibration(judged),
        examples=[*list_examples(run), *list_cases(run)],
        samples=arrange_samples(run),
        preview=run.preview,
        data=_data(run),
        sources=[_source(source) for source in (run.stage.get("data") or {}).get("sources", [])],
        rejects=[_reject(row) for row in run.rejects],
        num_rejects=run.num_rejects,
        trained_share=trained / tokens if tokens and trained else None,
        cost=describe_cost(run),
        hardware=describe_hardware(run),
        versions=[(name, str(version)) for name, version in (run.stage.get("versions") or {}).items()],
        settings=given,
        defaults=defaults,
        recipe=run.recipe,
    )


def describe_status(run: Facts) -> str:
    """Return how far a run has come."""
    if run.is_finished:
        return "finished"
    if run.method in ROW_MAKERS:
        return "not finished"
    of = f" of {count(run.num_steps)}" if run.num_steps else ""
    return f"not finished, at step {count(run.step)}{of}"


def headline(run: Facts) -> list[Pair]:
    """Return the one to three figures that say how a run went, by its method."""
    wanted = {
        "sft": (("eval_loss", "held-out loss", figure), ("eval_mean_token_accuracy", "token accuracy", share)),
        "rm": (("eval_accuracy", "pair accuracy, held out", share), ("eval_margin", "margin, held out", figure)),
        "dpo": (
            ("eval_rewards/accuracies", "pair accuracy, held out", share),
            ("eval_rewards/margins", "implicit margin", figure),
        ),
        "label": (
            ("check_accuracy", "right on known answers", share),
            ("order_agreement", "both orders agree", share),
        ),
        "ppo": (("reward", "reward", figure), ("gold", "gold reward", figure), ("objective/kl", "KL, nats", figure)),
    }.get(run.method, ())
    found = [(label, show(value)) for name, label, show in wanted if (value := run.last(name)) is not None]
    if not found and (loss := run.last("loss")) is not None:
        found = [("training loss", figure(loss))]
    return found


def cost_tiles(run: Facts) -> list[Pair]:
    if not run.result:
        return [] if run.method in ROW_MAKERS else [("steps", count(run.step))]
    return [
        ("rows" if run.method in ROW_MAKERS else "steps", count(run.step)),
        ("tokens", short_count(run.result.get("tokens"))),
        ("wall time", duration(run.result.get("wall_seconds"))),
    ]


def gather_warnings(run: Facts) -> list[Pair]:
    """Return each warning once, evaluation's included, with when it was first said and how often."""
    times: dict[str, str] = {}
    numbers: Counter[str] = Counter()
    for row in run.warnings:
        message = str(row.get("message", ""))
        times.setdefault(message, str(row.get("time", "")).replace("T", " ").removesuffix("+00:00"))
        numbers[message] += 1
    for message in run.evaluation.get("warnings", []):
        times.setdefault(str(message), "evaluation")
        numbers[str(message)] += 1
    return [
        (message, f"{time}, {numbers[message]} times" if numbers[message] > 1 else time)
        for message, time in times.items()
    ]


def _data(run: Facts) -> list[Pair]:
    """Return what was read, kept, left out and found in the rows."""
    report, lengths = run.stage.get("data") or {}, run.stage.get("lengths") or {}
    held_out = run.stage.get("eval_lengths") or {}
    unit = "prompts" if run.method == "ppo" else "rows"
    kinds = ", ".join(f"{count(number)} {kind}" for kind, number in (report.get("kinds") or {}).items())
    pairs = [
        (f"{unit} trained on", _whole(lengths.get("num_rows"))),
        (f"{unit} held out", _whole(held_out.get("num_rows"))),
        ("read from the sources", _whole(report.get("read"))),
        ("kinds", kinds),
        ("left out", _whole(report.get("rejected"))),
        ("duplicates kept", _whole(report.get("duplicates"))),
        ("held-out rows that share a prompt", _whole(report.get("overlap"))),
        ("tokens", _whole(lengths.get("num_tokens"))),
        ("tokens learnt", _whole(lengths.get("num_trained_tokens") or None)),
        ("longest row, tokens", _whole(lengths.get("longest_tokens"))),
        ("cut to max_length", _whole(lengths.get("num_truncated"))),
        ("left out as too long", _whole(lengths.get("num_too_long"))),
        ("mean characters of a prompt", _mean(report.get("mean_prompt_chars"))),
        ("mean characters of an answer", _mean(report.get("mean_completion_chars"))),
        ("pairs where the longer answer is chosen", share(report.get("longer_chosen_share"))),
        ("mean characters, chosen", _mean(report.get("mean_chosen_chars"))),
        ("mean characters, rejected", _mean(report.get("mean_rejected_chars"))),
    ]
    return [(label, text) for label, text in [*list_counts(run), *pairs] if text not in ("", "\u2013")]


def _whole(value: Any) -> str:
    return count(int(value)) if isinstance(value, int | float) else ""


def _mean(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) and value else ""


def _source(source: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Return path, rows read, rows kept, formats found, and the columns that nothing reads."""
    path, read, kept = str(source.get("path", "")), _whole(source.get("read")), _whole(source.get("kept"))
    formats, ignored = ", ".join(source.get("formats") or {}), ", ".join(source.get("ignored_columns") or {})
    return path, read, kept, formats, ignored or "\u2013"


def _reject(row: dict[str, Any]) -> Pair:
    number = next((f"{unit} {row[unit]}" for unit in ("line", "row") if unit in row), "")
    return f"{row.get('file', '')} {number}".strip(), str(row.get("reason", ""))


def describe_cost(run: Facts) -> list[Pair]:
    """Return what the run took: time, tokens, memory, steps, parameters."""
    result, parameters = run.result, run.stage.get("parameters") or {}
    pairs = [
        ("wall time", duration(result["wall_seconds"]) if "wall_seconds" in result else ""),
        ("tokens, all sittings", _whole(result.get("tokens"))),
        ("tokens per second", figure(result["tokens_per_second"]) if result.get("tokens_per_second") else ""),
        ("peak memory", describe_bytes(result["peak_memory_bytes"]) if result.get("peak_memory_bytes") else ""),
        *([] if run.method in ROW_MAKERS else [("optimizer steps", count(run.step))]),
        ("trainable parameters", _of_total(parameters)),
        ("model in memory", describe_bytes(parameters["bytes"]) if parameters.get("bytes") else ""),
    ]
    if quantized := parameters.get("quantized"):
        bits = parameters.get("bits_per_quantized_parameter", 0)
        pairs.append(("quantised parameters", f"{count(quantized)}, {bits:.3f} bits each"))
    pairs += list_costs(run)
    for role in run.stage.get("roles") or []:
        pairs.append((", ".join(role.get("roles", [])), f"{role.get('what')}, {describe_bytes(role.get('bytes', 0))}"))
    return [(label, text) for label, text in pairs if text]


def _of_total(parameters: dict[str, Any]) -> str:
    trainable, total = parameters.get("trainable"), parameters.get("total")
    if not trainable or not total:
        return ""
    return (
        count(trainable) if trainable == total else f"{count(trainable)} of {count(total)} ({share(trainable / total)})"
    )


def describe_hardware(run: Facts) -> list[Pair]:
    """Return what the run was trained on."""
    found = run.stage.get("hardware") or {}
    pairs = [(str(name), str(text)) for name, text in (found.get("devices") or {}).items()]
    pairs += [
        ("processor", str(found.get("processor", ""))),
        ("cores", _whole(found.get("cores"))),
        ("memory", describe_bytes(found["memory_bytes"]) if found.get("memory_bytes") else ""),
        ("system", str(found.get("system", ""))),
        ("processes", _whole(run.stage.get("num_processes"))),
    ]
    if git := run.stage.get("git"):
        pairs.append(("git", f"{git.get('commit', '')[:12]}{', with changes' if git.get('dirty') else ''}"))
    return [(label, text) for label, text in pairs if text]


def _settings(run: Facts) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Return key, value and origin of what the recipe gave, and of what it left to defaults."""
    stage, origins = run.stage, run.stage.get("origins") or {}
    sections = [("model", stage.get("model")), ("lora", stage.get("lora")), ("launch", stage.get("launch")),
                (run.name, stage.get("options")), (run.name, stage.get("trainer"))]  # fmt: skip
    rows = [("seed", _show(stage.get("seed")), str(origins.get("seed", "default")))]
    rows += [
        (f"{section}.{key}", _show(value), str(origins.get(f"{section}.{key}", "default")))
        for section, values in sections
        for key, value in (values or {}).items()
    ]
    rows = [row for row in rows if row[0] != f"{run.name}.method"]
    return [row for row in rows if row[2] != "default"], [row for row in rows if row[2] == "default"]


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
