"""Measure alignkit side by side with what it is built on; writes RESULTS.md and prints it.

python tests/benchmarks/run.py [--only CASE]... [--runs N]
python tests/benchmarks/run.py --quick      what each change is held against, in five minutes: one round, printed alone
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from few_shot import measure_few_shot
from grpo import measure_grpo
from labels import measure_labels
from ppo import OTHER_PYTHON, measure_ppo
from processes import measure_processes
from sampling import measure_sampling
from short_run import measure_short_run
from start_up import measure_bad_recipe, measure_help
from steady import measure_growth, measure_preparation, measure_profile, measure_real_model, measure_throughput
from table import Row, describe_machine, format_table, save_rows

Cases = dict[str, tuple[Callable[..., Sequence[Row]], int]]  # name -> (measure, rounds)
QUICK: Cases = {  # one round of each
    "help": (measure_help, 5),
    "bad-recipe": (measure_bad_recipe, 3),
    "throughput": (partial(measure_throughput, sizes=["0.14 M"]), 1),
    "profile": (measure_profile, 1),
}
CASES: Cases = {
    "help": (measure_help, 15),
    "bad-recipe": (measure_bad_recipe, 15),
    "short-run": (measure_short_run, 2),
    "throughput": (measure_throughput, 2),
    "real": (measure_real_model, 1),
    "profile": (measure_profile, 1),
    "growth": (measure_growth, 1),
    "preparation": (measure_preparation, 2),
    "processes": (measure_processes, 2),
    "ppo": (measure_ppo, 2),
    "grpo": (measure_grpo, 2),
    "sampling": (measure_sampling, 2),
    "labels": (measure_labels, 3),
    "few-shot": (measure_few_shot, 3),
}
# They measure processor seconds of one thread in their own process: two of them share the machine.
TOGETHER = ("labels", "few-shot", "sampling")


def measure_all(cases: Cases, wanted: Sequence[str], runs: int | None) -> Iterator[tuple[str, Sequence[Row]]]:
    """Yield each wanted case with its rows, as they come."""
    calls = {case: (case, cases[case][0], runs or cases[case][1]) for case in wanted}
    for case in (case for case in calls if case not in TOGETHER):
        yield case, _measure(*calls[case])
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = {case: pool.submit(_measure, *calls[case]) for case in TOGETHER if case in calls}
        yield from ((case, future.result()) for case, future in found.items())


def _measure(case: str, measure: Callable[..., Sequence[Row]], runs: int) -> Sequence[Row]:
    print(f"{case}:", file=sys.stderr, flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="alignkit-bench-") as directory:
        found = measure(Path(directory), runs=runs)
    print(f"{case}: {(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(CASES), help="measure this case; repeatable")
    parser.add_argument("--runs", type=int, help="counted rounds of each comparison")
    parser.add_argument("--quick", action="store_true", help="one round of a few cases; leaves RESULTS.md as it is")
    options = parser.parse_args()
    cases, table = QUICK if options.quick else CASES, ""
    wanted = list(options.only or cases)
    if "ppo" in wanted and not OTHER_PYTHON.exists():
        print(f"ppo: left as it was: {OTHER_PYTHON} is missing; ppo.py says how to make it", file=sys.stderr)
        wanted.remove("ppo")
    rows: dict[str, list[dict[str, object]]] = {}
    for case, found in measure_all(cases, wanted, options.runs):
        if options.quick:
            rows[case] = [asdict(row) for row in found]
        else:  # at once: what comes later may be stopped
            table = save_rows({case: found}, order=list(CASES))
    print(format_table(rows, describe_machine()) if options.quick else table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
