"""What several processes load: rank 0 makes or fetches it once, and the others find it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Two adapters' bases that go through files: one drawn from the seed, one with an earlier adapter merged into it.
RECIPE = """
name: t
model: builtin:tiny-llama
lora: {r: 4}
sft: {data: {path: builtin:instructions, max_rows: 8}, batch_size: 4, max_steps: 1, samples: {num: 0}}
dpo: {start_from: sft, adapter: merge, data: {path: builtin:preferences, max_rows: 8}, batch_size: 4, max_steps: 1,
      samples: {num: 0}}
"""
WORKER = """
import json, os, time
from pathlib import Path
from alignkit.models import load
from alignkit.recipe import load_recipe, resolve
from alignkit.train import dpo, sft

rank, write, made = os.environ["RANK"], load.write_base, []

def watched(base, *args):
    made.append(base.parent.name)
    time.sleep(1)  # the others wait for it
    write(base, *args)

load.write_base = watched
for module in (sft, dpo):
    stage = resolve(load_recipe(Path("recipe.yaml")), module.__name__.rpartition(".")[2])
    Path(stage.run_dir).mkdir(parents=True, exist_ok=True)
    module.run(stage, Path(stage.run_dir))
Path(f"made-{rank}.json").write_text(json.dumps(made))
"""


def test_a_base_is_drawn_or_merged_by_rank_0_alone_and_read_by_the_others(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads((tmp_path / f"made-{rank}.json").read_text()) for rank in range(2)] == [["sft", "dpo"], []]
    # What was made is whole, and nothing of another try lies beside it.
    for stage in ("sft", "dpo"):
        assert (tmp_path / f"runs/t/{stage}/base/model.safetensors").is_file()
        assert not [*(tmp_path / f"runs/t/{stage}").glob("base.tmp*")]
