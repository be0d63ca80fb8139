"""How large the code is and how far a reader must walk: `make figures` prints both.

Lines and files of alignkit/, functions and imports of its own modules per 100 lines, modules that only one other
imports, and what `alignkit dpo` on four rows enters before its first optimizer step. With the root of another checkout
as its argument it measures that one.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
RECIPE = """\
name: walk
model: {path: builtin:tiny-gpt2}
launch: {device: cpu}
dpo: {data: {path: rows.jsonl}, max_steps: 1, batch_size: 4, samples: {num: 0}}
"""
# Runs in a process of its own: profiles every call until the trainer's first step.
WALK = """\
import os, sys, threading
package = sys.argv[1] + os.sep
entered = set()
def profile(frame, event, argument):
    code = frame.f_code
    # The body of a class runs once, as its module is imported: it is no function (CO_OPTIMIZED).
    is_function = code.co_flags & 1 and not code.co_name.startswith("<")
    if event == "call" and is_function and code.co_filename.startswith(package):
        entered.add((code.co_filename[len(package):], code.co_qualname))
from transformers import Trainer
def first_step(*_, **__):
    sys.setprofile(None)
    files = {name for name, _ in entered}
    print("WALK", len(entered), len(files), flush=True)
    os._exit(0)
Trainer.training_step = first_step
from alignkit.cli import main
sys.argv = ["alignkit", "dpo", "-r", "recipe.yaml"]
sys.setprofile(profile)
main()
"""


def measure(root: Path) -> dict[str, float]:
    """Count lines, files, functions, imports and single importers of `root`/alignkit."""
    files = {path: path.read_text(encoding="utf-8") for path in sorted((root / "alignkit").rglob("*.py"))}
    lines = sum(text.count("\n") for text in files.values())
    functions = imports = 0
    importers: dict[str, set[Path]] = defaultdict(set)
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            functions += isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alignkit"):
                imports += 1
                modules = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys() or {node.module or ""}
                for module in modules:
                    importers[module].add(path)
    return {
        "lines": lines,
        "files": len(files),
        "functions per 100 lines": round(100 * functions / lines, 1),
        "imports of its own modules per 100 lines": round(100 * imports / lines, 1),
        "modules with a single importer": sum(len(importers[name]) == 1 for name in names),
        "lines of tests": sum(path.read_text().count("\n") for path in (root / "tests").rglob("*.py")),
        "bytes of README.md": (root / "README.md").stat().st_size,
    }


def walk(root: Path) -> dict[str, int]:
    """Return the functions and files that `alignkit dpo` on four rows enters before its first optimizer step."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "recipe.yaml").write_text(RECIPE)
        rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea."} for n in range(4)]
        Path(directory, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WALK, str(root / "alignkit")]
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    found = next((line.split()[1:] for line in done.stdout.splitlines() if line.startswith("WALK")), None)
    if found is None:
        raise SystemExit(f"the walk did not reach a step:\n{done.stdout}{done.stderr}")
    return {"functions before the first step of dpo": int(found[0]), "files before it": int(found[1])}


if __name__ == "__main__":
    for name, value in {**measure(ROOT), **walk(ROOT)}.items():
        print(f"{value:>8}  {name}")
