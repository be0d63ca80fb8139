"""Train the stages listed in a JSON file one after another: in one process, or in one of several.

A list pays for the import of the libraries once. Each job names recipe, stage and out; `from` and `step` go on from
another run's checkpoint, `terminate` sends SIGTERM to one rank at a step, `rank_set` overrides values on one rank.
How each job ended is written to `<out>.outcome-RANK.json`.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))


def main(spec: Path) -> None:
    from alignkit.cli import quiet_libraries

    quiet_libraries()
    for job in json.loads(spec.read_text()):
        began = time.monotonic()
        outcome = run(job)
        Path(f"{job['out']}.outcome-{RANK}.json").write_text(json.dumps(outcome))
        print(f"{RANK} {job['out']} {time.monotonic() - began:.1f} s {outcome}", file=sys.stderr, flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    from alignkit.errors import AlignKitError
    from alignkit.recipe import load_recipe, resolve

    out = Path(job["out"])
    if RANK == 0:
        copy_checkpoint(job, out)
    overrides = [*job.get("set", ()), *job.get("rank_set", {}).get(str(RANK), ())]
    stage = resolve(
        load_recipe(Path(job["recipe"]), overrides=overrides),
        job["stage"],
        out=out,
        trust_code=job.get("trust_code", False),
    )
    if "terminate" in job and job["terminate"]["rank"] == RANK:
        threading.Thread(target=terminate_at, args=(out, job["terminate"]["step"]), daemon=True).start()
    try:
        result = importlib.import_module(f"alignkit.train.{stage.method}").run(stage, Path(stage.run_dir))
    except AlignKitError as error:
        return {"error": type(error).__name__, "text": str(error), "code": error.exit_code, "shared": error.shared}
    return {"step": result.step, "metrics": result.metrics}


def copy_checkpoint(job: dict[str, Any], out: Path) -> None:
    """Make a run that was stopped at a step out of one that went on."""
    out.mkdir(parents=True, exist_ok=True)
    if "from" not in job:
        return
    shutil.copytree(job["from"], out, dirs_exist_ok=True)
    for path in (out / "result.json", out / "probe.json"):
        path.unlink()
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").glob("checkpoint-*"):
        if path.name != f"checkpoint-{job['step']}":
            shutil.rmtree(path)


def terminate_at(out: Path, step: int) -> None:
    """Send this process SIGTERM once the metrics tell that the step was taken."""
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
