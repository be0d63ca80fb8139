"""Write rows as JSON lines, read them as a stage does, store them, and print the private memory in KiB at its peak.

Run by test_store.py in a process of its own: million_rows.py DIRECTORY COUNT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from conftest import make_stage  # noqa: E402

from alignkit.data import DataReport, Rejects, read_rows, write_table  # noqa: E402
from alignkit.recipe.schema import DataSource  # noqa: E402

_peak = 0


def private_kib() -> int:
    """Memory of this process without files mapped into it: those the system takes back when it needs to."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def batches(path: Path) -> Iterator[dict[str, list[list[int]]]]:
    global _peak
    rows = read_rows(make_stage("sft"), [DataSource(path=str(path))], report=DataReport(), rejects=Rejects())
    while batch := list(islice(rows, 1000)):
        yield {"input_ids": [list(str(row.completions[0]).encode()) for row in batch]}
        _peak = max(_peak, private_kib())


def main() -> None:
    directory, count = Path(sys.argv[1]), int(sys.argv[2])
    path = directory / f"{count}.jsonl"
    with path.open("w") as out:
        for number in range(count):
            out.write(json.dumps({"prompt": f"{number} + 1 =", "completion": f" {number + 1}"}) + "\n")
    table = write_table(directory / f"{count}.arrow", batches(path))
    assert len(table) == count
    assert bytes(table[count - 1]["input_ids"]).decode() == f" {count}"
    print(max(_peak, private_kib()))


main()
