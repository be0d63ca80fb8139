"""Run directories written by hand, file by file as training writes them: a helper of tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE = (
    "</script></style><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)>\"'><b>&amp; "
    "`|` [x](javascript:alert(3))\u2028\u202e"
)
SECRET = "hf_" + "A1b2C3d4" * 4

WriteRun = Callable[..., Path]


def figure(metric: str, value: float | None, low: float | None = None, high: float | None = None, **more: Any) -> dict:
    """Return one result of eval.json."""
    return {"metric": metric, "value": value, "low": low, "high": high, "n": 200, "unit": "", "better": None,
            "interval": "bootstrap", "slice": None, "data": "builtin:reviews[test]", "settings": {}, "details": None,
            **more}  # fmt: skip


def metrics_of(method: str, num_steps: int) -> list[dict[str, Any]]:
    """Return logged rows with the names of a method, one a step."""
    rows: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        row = {"step": step, "loss": 2 / step, "grad_norm": 1.0 + step % 3, "learning_rate": 1e-4 * (1 - step / 100),
               "entropy": 2.0, "epoch": step / num_steps, "num_tokens": 100 * step,
               "tokens_per_second": 50.0}  # fmt: skip
        if method == "ppo":
            kl = 0.1 * step
            row |= {"reward": -2 + 0.1 * step, "gold": 0.01 * step, "objective/kl": kl, "sqrt_kl": math.sqrt(kl),
                    "response_length": 20 + step, "kl_coef": 0.05}  # fmt: skip
        if method == "dpo":
            row |= {"rewards/chosen": -0.1 * step, "rewards/rejected": -0.2 * step, "rewards/margins": 0.1 * step,
                    "rewards/accuracies": 0.8, "logps/chosen": -60.0, "logps/rejected": -70.0}  # fmt: skip
        if method == "rm":
            row |= {"accuracy": 0.5 + step / 100, "margin": 0.1 * step, "mean_reward": 0.0}
        rows.append(row)
        if step % 4 == 0:
            held_out = {"eval_loss": 2.1 / step} | ({"eval_accuracy": 0.7} if method == "rm" else {})
            rows.append({"step": step, "eval_runtime": 1.0, **held_out})
    return rows


def writer(directory: Path) -> WriteRun:
    """Return a function that writes a run below `directory` and returns its path; keywords replace whole files."""

    def write(
        name: str = "sft",
        method: str = "sft",
        *,
        num_steps: int = 12,
        finished: bool = True,
        start_stage: str | None = None,
        rewards: dict[str, str] | None = None,
        stage: dict[str, Any] | None = None,
        text: str = "The plot was good.",
        evaluation: list[dict] | None = None,
        warnings: list[str] | None = None,
        metrics: list[dict] | None = None,
    ) -> Path:
        run = directory / "runs" / "demo" / name
        model = run / "model"
        model.mkdir(parents=True)

        def put(file: str, data: Any) -> None:
            (run / file).write_text(json.dumps(data))

        def put_lines(file: str, rows: list[Any]) -> None:
            (run / file).write_text("".join(json.dumps(row) + "\n" for row in rows))

        put("stage.json", {
            "recipe": "demo", "recipe_path": "demo.yaml", "stage": name, "method": method, "seed": 0,
            "model": {"path": "builtin:tiny-gpt2", "init": "scratch"}, "lora": None, "launch": {"device": "auto"},
            "options": {"method": method, "start_from": start_stage, "batch_size": 32,
                        "data": [{"path": "builtin:reviews"}]},
            "trainer": {"learning_rate": 1e-4}, "trl": {"max_steps": num_steps},
            "origins": {f"{name}.batch_size": "demo.yaml:7", "model.path": "demo.yaml:3"},
            "start_stage": start_stage, "reward_stages": rewards or {},
            "data": {"rows": 90, "read": 100, "rejected": 1, "kinds": {"pair": 90}, "duplicates": 2, "overlap": 0,
                     "mean_prompt_chars": 50.5, "longer_chosen_share": 0.495,
                     "sources": [{"path": "builtin:reviews", "read": 100, "kept": 90, "formats": {"text": 90},
                                  "ignored_columns": {"extra": 1}}]},
            "lengths": {"num_rows": 80, "num_tokens": 4000, "num_trained_tokens": 1000, "longest_tokens": 77},
            "eval_lengths": {"num_rows": 10},
            "lineage": [{"role": "base", "path": "builtin:tiny-gpt2"}],
            "parameters": {"trainable": 322176, "total": 322176, "bytes": 1288704},
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "hardware": {"system": "Linux", "processor": "Some CPU", "cores": 2, "memory_bytes": 2**30,
                         "devices": {"cpu": "2 threads"}},
            "num_processes": 1, "git": {"commit": "0123456789abcdef", "dirty": True},
            **(stage or {}),
        })  # fmt: skip
        put_lines("metrics.jsonl", metrics_of(method, num_steps) if metrics is None else metrics)
        put("preview.json", {"rows": [{"sequences": [{"label": "", "num_left_out": 0, "spans": [
            {"kind": "read", "tokens": ["<|user|>", "Say", "\n"]}, {"kind": "learnt", "tokens": [text, "<|end|>"]},
        ]}]}]})  # fmt: skip
        put_lines("rejects.jsonl", [{"file": "rows.jsonl", "line": 7, "reason": f"no answer: {text}"}])
        (run / "recipe.yaml").write_text(f"name: demo  # {text}\n")
        prompt = [{"role": "user", "content": f"How was it? {text}"}]
        if method == "rm":
            answers = [[{"role": "assistant", "content": each}] for each in (text, "Bad.")]
            put_lines("samples.jsonl", [
                {"step": step, "when": when, "number": 0, "prompt": prompt, "answers": answers,
                 "rewards": [step, -step]}
                for step, when in ((0, "before"), (6, "during"), (num_steps, "after"))
            ])  # fmt: skip
        else:
            put_lines("samples.jsonl", [
                {"step": step, "when": when, "number": 0, "prompt": prompt, "answer": f"{when}: {text}",
                 "reward": 0.5 * step, "reference": [{"role": "assistant", "content": text}]}
                for step, when in ((0, "before"), (6, "during"), (num_steps, "after"))
            ])  # fmt: skip
        put_lines("warnings.jsonl", [
            {"time": "2026-11-23T03:10:00+00:00", "message": message} for message in warnings or []
        ])  # fmt: skip
        if evaluation is not None:
            put("eval.json", {"schema": 1, "results": evaluation, "warnings": []})
        (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
        (model / "config.json").write_text('{"model_type": "gpt2"}')
        (model / "chat_template.jinja").write_text("{{ messages }}")
        if finished:
            put("result.json", {
                "stage": name, "status": "finished", "step": num_steps, "model_dir": str(model), "tokens": 123456,
                "wall_seconds": 74.2, "tokens_per_second": 293.8, "peak_memory_bytes": 780_000_000,
                "metrics": {"loss": 0.5, **({"eval_accuracy": 0.816} if method == "rm" else {})},
            })  # fmt: skip
        else:
            (run / "error.log").write_text(f"Traceback\nValueError: {text}\n")
        return run

    return write
