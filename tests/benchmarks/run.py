"""Measure alignkit side by side with what it is built on; writes RESULTS.md and prints it.

python tests/benchmarks/run.py [--only CASE]... [--runs N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from labels import measure_labels
from ppo import OTHER_PYTHON, measure_ppo
from processes import measure_processes
from short_run import measure_short_run
from start_up import measure_bad_recipe, measure_help
from steady import measure_preparation, measure_throughput
from table import Row, save_rows

CASES: dict[str, tuple[Callable[..., Sequence[Row]], int]] = {  # name -> (measure, rounds)
    "help": (measure_help, 15),
    "bad-recipe": (measure_bad_recipe, 15),
    "short-run": (measure_short_run, 5),
    "throughput": (measure_throughput, 3),
    "preparation": (measure_preparation, 3),
    "processes": (measure_processes, 3),
    "ppo": (measure_ppo, 3),
    "labels": (measure_labels, 3),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(CASES), help="measure this case; repeatable")
    parser.add_argument("--runs", type=int, help="counted rounds of each comparison")
    options = parser.parse_args()
    measured: dict[str, Sequence[Row]] = {}
    for case in options.only or CASES:
        measure, runs = CASES[case]
        if case == "ppo" and not OTHER_PYTHON.exists():
            print(f"ppo: left as it was: {OTHER_PYTHON} is missing; ppo.py says how to make it", file=sys.stderr)
            continue
        print(f"{case}:", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="alignkit-bench-") as directory:
            measured[case] = measure(Path(directory), runs=options.runs or runs)
    print(save_rows(measured, order=list(CASES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
