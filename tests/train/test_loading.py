"""What several processes load: rank 0 makes or fetches it once, and the others find it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from forks import Forks
from ranked_runs import free_port

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


def test_a_base_is_drawn_or_merged_by_rank_0_alone_and_read_by_the_others(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    log = tmp_path / "log.txt"
    codes = forks.run(*(
        {"main": "forks:run_code", "argv": ["", WORKER], "cwd": str(tmp_path), "stdout": str(log), "stderr": str(log),
         "env": os.environ | meet | {"RANK": rank, "LOCAL_RANK": rank}}
        for rank in "01"
    ))  # fmt: skip
    assert codes == [0, 0], log.read_text()[-2000:]
    assert [json.loads((tmp_path / f"made-{rank}.json").read_text()) for rank in range(2)] == [["sft", "dpo"], []]
    # What was made is whole, and nothing of another try lies beside it.
    for stage in ("sft", "dpo"):
        assert (tmp_path / f"runs/t/{stage}/base/model.safetensors").is_file()
        assert not [*(tmp_path / f"runs/t/{stage}").glob("base.tmp*")]
