"""The generated configs, read by the real `accelerate launch`, and by DeepSpeed where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.launch import accelerate
from alignkit.launch.accelerate import launcher_strategy
from alignkit.launch.placement import Command, place
from alignkit.recipe import Stage
from alignkit.recipe.schema import LaunchOptions
from alignkit.runs.directory import RunDir

# Stands in for alignkit: a worker that writes down what accelerate has set, and what it makes of it.
WORKER = """
import json, os, sys
from pathlib import Path
found = {key: value for key, value in os.environ.items()
         if key.startswith(("ACCELERATE_", "FSDP_")) or key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from accelerate import FullyShardedDataParallelPlugin
    plugin = FullyShardedDataParallelPlugin()
    found["plugin"] = [plugin.fsdp_version, plugin.reshard_after_forward, str(plugin.state_dict_type),
                       plugin.cpu_ram_efficient_loading, plugin.cpu_offload is not None and bool(plugin.cpu_offload)]
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    from accelerate import DeepSpeedPlugin
    plugin = DeepSpeedPlugin()
    found["plugin"] = [plugin.zero_stage, plugin.deepspeed_config["zero_optimization"]]
Path(f"seen-{os.environ['RANK']}.json").write_text(json.dumps(found))
"""
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"
)


@pytest.fixture
def stage_of(make_stage: Callable[..., Stage]) -> Callable[[str], Stage]:
    return lambda launch: make_stage(f"processes: 2, device: cpu, {launch}")


@pytest.fixture
def launch(stage_of: Callable[[str], Stage], tmp_path: Path) -> Callable[[str], dict[str, object]]:
    """Return a function that runs the real command line with a worker of this test; it returns what rank 1 saw."""

    def run(options: str) -> dict[str, object]:
        stage = stage_of(options)
        found = place(stage, environment={})
        directory = RunDir(Path(stage.run_dir)).launch
        directory.mkdir(parents=True)
        for name, text in accelerate.make_configs(stage, found).items():
            (directory / name).write_text(text)
        line = accelerate.command_line(Command(stage, ()), found)
        line[line.index("UNKNOWN")] = "0"
        (tmp_path / "alignkit.py").write_text(WORKER)  # found before the package: the working directory comes first
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        extra = os.environ.get("PYTHONPATH")
        ended = subprocess.run(
            line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
            env=environment | ({"PYTHONPATH": extra} if extra else {}),
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        seen: dict[str, object] = json.loads((tmp_path / "seen-1.json").read_text())
        assert (seen["RANK"], seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"]) == ("1", "2", "2")
        return seen

    return run


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_ddp(launch: Callable, precision: str) -> None:
    seen = launch(f"strategy: ddp, mixed_precision: '{precision}'")
    assert seen["ACCELERATE_MIXED_PRECISION"] == precision
    assert launcher_strategy(seen) == "ddp"  # type: ignore[arg-type]


def test_fsdp_and_what_torchrun_workers_set_themselves(launch: Callable, stage_of: Callable) -> None:
    options = "strategy: fsdp, offload: all, activation_checkpointing: true"
    seen = launch(options)
    assert launcher_strategy(seen) == "fsdp"
    assert seen["plugin"] == [2, True, "StateDictType.FULL_STATE_DICT", False, True]
    assert seen["FSDP_ACTIVATION_CHECKPOINTING"] == "true"
    environment = {name: seen[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    accelerate.apply_strategy(stage_of(options), environment)  # type: ignore[arg-type]
    assert len(environment) > 8
    for name, value in environment.items():
        assert seen[name] == value, name


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "offload"), [("zero2", "optimizer"), ("zero3", "all")])
def test_zero(launch: Callable, stage_of: Callable, strategy: str, offload: str) -> None:
    options = f"strategy: {strategy}, offload: {offload}, mixed_precision: bf16"
    seen = launch(options)
    assert launcher_strategy(seen) == strategy
    zero = accelerate.deepspeed_config(stage_of(options))["zero_optimization"]
    assert seen["plugin"] == [int(strategy[-1]), zero]
    assert seen["ACCELERATE_MIXED_PRECISION"] == "bf16"


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_accepts_its_config(stage_of: Callable, strategy: str, tmp_path: Path) -> None:
    config = accelerate.deepspeed_config(stage_of(f"strategy: {strategy}, offload: optimizer"))
    text = json.dumps(config)
    numbers = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4,
               "gradient_clipping": 1.0}  # fmt: skip
    (tmp_path / "read.py").write_text(
        "import json, sys\n"
        "from deepspeed.runtime.config import DeepSpeedConfig\n"
        "config = json.loads(sys.argv[1])\n"
        f"config.update({numbers!r})\n"
        "config['bf16']['enabled'], config['fp16']['enabled'] = True, False\n"
        "zero = config['zero_optimization']\n"
        "zero.update({key: 10 for key, value in zero.items() if value == 'auto'})\n"
        "read = DeepSpeedConfig(config)\n"
        "print(int(read.zero_config.stage), read.zero_config.offload_optimizer.device)\n"
    )
    ended = subprocess.run(
        [sys.executable, "read.py", text], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert ended.stdout.splitlines()[-1:] == [f"{strategy[-1]} cpu"], ended.stderr


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_accelerate_knows_every_key(stage_of: Callable, strategy: str, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    stage = stage_of(f"strategy: {strategy}")
    texts = accelerate.make_configs(stage, place(stage, environment={}))
    (tmp_path / accelerate.CONFIG).write_text(texts[accelerate.CONFIG])
    config = ClusterConfig.from_yaml_file(str(tmp_path / accelerate.CONFIG))  # raises for a key it does not know
    assert (config.num_processes, config.num_machines, config.same_network) == (2, 1, True)
    # With a DeepSpeed file of its own, accelerate refuses to hear of the precision here.
    assert config.mixed_precision == (None if strategy.startswith("zero") else "no")
    assert (accelerate.DEEPSPEED_CONFIG in texts) == strategy.startswith("zero")


def test_every_strategy_of_a_recipe_has_a_config(stage_of: Callable) -> None:
    strategies = LaunchOptions.model_json_schema()["properties"]["strategy"]["enum"]
    kinds = set()
    for strategy in strategies:
        stage = stage_of(f"strategy: {strategy}")
        text = accelerate.make_configs(stage, place(stage, environment={}))[accelerate.CONFIG]
        kinds.add(json.loads(text.partition("distributed_type: ")[2].splitlines()[0]))
    assert kinds == {"MULTI_GPU", "FSDP", "DEEPSPEED"}
