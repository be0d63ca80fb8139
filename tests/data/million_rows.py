"""Write rows as JSON lines, prepare their tables as a stage does, and print the most private memory in KiB on the way.

Run by test_store.py in a process of its own: million_rows.py DIRECTORY COUNT.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from alignkit.data import Rejects  # noqa: E402
from alignkit.models.chat import load_chat  # noqa: E402
from alignkit.recipe import load_recipe, resolve  # noqa: E402
from alignkit.train.tables import prepare_tables  # noqa: E402


def private_kib() -> int:
    """Memory of this process without files mapped into it: those the system takes back when it needs to."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def main() -> None:
    directory, count = Path(sys.argv[1]), int(sys.argv[2])
    for name, numbers in (("train", range(count)), ("eval", range(count - 10, count + 10))):
        with (directory / f"{name}.jsonl").open("w") as out:
            for number in numbers:
                out.write(json.dumps({"prompt": f"{number} + 1 =", "completion": f" {number + 1}"}) + "\n")
    recipe = directory / "r.yaml"
    recipe.write_text(
        "name: a\nmodel: {path: builtin:tiny-gpt2}\n"
        f"sft: {{data: {directory}/train.jsonl, eval: {directory}/eval.jsonl}}\n"
    )
    stage, peak, ended = resolve(load_recipe(recipe), "sft"), private_kib(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, private_kib())

    watching = threading.Thread(target=watch)
    watching.start()
    chat = load_chat(stage)
    tables = prepare_tables(stage, chat, directory / "cache", rejects=Rejects())
    report = tables.report.to_dict()
    ended.set()
    watching.join()
    assert (len(tables.train), report["overlap"], report["duplicate_prompts"]) == (count, 10, 10)
    last = chat.tokenizer.decode(tables.train[count - 1]["input_ids"])
    assert f"{count - 1} + 1 =" in last and f"{count}<" in last
    print(max(peak, private_kib()))


main()
