from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alignkit.errors import ModelError
from alignkit.models.files import find_model_dir, fingerprint_weights, inspect_model_dir


def write_model(path: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]} | (config or {})))
    save_file(tensors or {"wte.weight": torch.zeros(4, 3), "b": torch.zeros(5)}, path / "model.safetensors")
    return path


def write_adapter(path: Path, config: dict[str, Any], key: str = "base_model.model.h.lora_A.weight") -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    save_file({key: torch.zeros(2, 3)}, path / "adapter_model.safetensors")
    return path


def refusal(path: Path, *, trust_code: bool = False) -> str:
    with pytest.raises(ModelError) as caught:
        inspect_model_dir(path, trust_code=trust_code)
    return str(caught.value).replace(str(path), "DIR")


def test_looking_at_a_model_imports_no_ml_library() -> None:
    code = "import sys, alignkit.models.files; print({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_full_model_adapter_and_reward_models_are_told_apart(tmp_path: Path) -> None:
    full = inspect_model_dir(write_model(tmp_path / "full"), trust_code=False)
    assert (full.kind, full.reward, full.num_parameters, full.has_tokenizer) == ("full", False, 17, False)
    reward = write_model(tmp_path / "reward", {"architectures": ["LlamaForSequenceClassification"]})
    assert inspect_model_dir(reward, trust_code=False).reward
    adapter = write_adapter(tmp_path / "adapter", {"base_model_name_or_path": "gpt2", "task_type": "CAUSAL_LM"})
    found = inspect_model_dir(adapter, trust_code=False)
    assert (found.kind, found.base, found.reward, found.num_parameters) == ("adapter", "gpt2", False, 6)
    scored = write_adapter(
        tmp_path / "scored", {"base_model_name_or_path": "gpt2"}, key="base_model.model.score.weight"
    )
    assert inspect_model_dir(scored, trust_code=False).reward


def test_weights_only_as_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (canary,)

    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.ckpt", "weights.pkl"):
        (model / name).write_bytes(pickle.dumps(Trap()))
    assert refusal(model) == (
        "DIR: weights only as pickles (model.ckpt, pytorch_model.bin, weights.pkl), which can run code when opened; "
        "convert them to safetensors where you trust them: from_pretrained(...).save_pretrained(...)"
    )
    assert not canary.exists()


def test_pickles_beside_safetensors_are_no_reason_to_refuse(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "training_args.bin").write_bytes(b"x")
    assert inspect_model_dir(model, trust_code=False).kind == "full"


@pytest.mark.parametrize(
    ("file", "config", "key"),
    [
        ("config.json", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ("config.json", {"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
        ("config.json", {"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ("config.json", {"text_config": {"auto_map": {}}}, "text_config.auto_map"),
        ("config.json", {"keypoint_config": {"trust_remote_code": True}}, "keypoint_config.trust_remote_code"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "auto_map"),
    ],
)
def test_code_that_comes_with_a_model_needs_trust(tmp_path: Path, file: str, config: dict[str, Any], key: str) -> None:
    model = write_model(tmp_path / "model", config if file == "config.json" else None)
    if file != "config.json":
        (model / file).write_text(json.dumps(config))
    assert refusal(model) == f"DIR/{file}: {key} would run code that comes with the model; --trust-code allows it"
    assert inspect_model_dir(model, trust_code=True).kind == "full"


def test_damaged_safetensors_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    file = model / "model.safetensors"
    whole = file.read_bytes()
    expected = {
        whole[:-4]: f"it has {len(whole) - 4} bytes but its header promises {len(whole)}: the copy is incomplete",
        whole + b"\0": f"it has {len(whole) + 1} bytes but its header promises {len(whole)}: the copy is incomplete",
        whole[:3]: "it is shorter than a safetensors header",
        b"": "it is shorter than a safetensors header",
        whole[:20]: "its header is damaged or cut off",
        struct.pack("<Q", 2**60) + whole[8:]: "its header is damaged or cut off",
        whole[:8] + b"x" + whole[9:]: "its header is damaged",
    }
    for content, what in expected.items():
        file.write_bytes(content)
        assert refusal(model) == f"DIR/model.safetensors: {what}; copy or save the file again"


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00003.safetensors")
    assert refusal(model) == "DIR: shards without model.safetensors.index.json; copy the model again"
    names = {f"w{n}": f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert refusal(model) == (
        "DIR: 2 of 3 shards are missing (model-00002-of-00003.safetensors, model-00003-of-00003.safetensors); copy the "
        "model again"
    )


def test_all_problems_of_a_directory_come_together(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"auto_map": {}})
    (adapter / "adapter_model.safetensors").unlink()
    assert refusal(adapter) == (
        "DIR/adapter_config.json: auto_map would run code that comes with the model; --trust-code allows it\n"
        "DIR: no adapter_model.safetensors; copy the model again\n"
        "DIR/adapter_config.json: base_model_name_or_path is missing: the adapter does not say which base it belongs "
        "to; add it"
    )


def test_directories_without_a_model_say_what_they_hold(tmp_path: Path) -> None:
    assert "no config.json and no adapter_config.json: not a model directory (it is empty);" in refusal(tmp_path)
    (tmp_path / "data.jsonl").touch()
    assert "(it holds data.jsonl)" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "DIR/config.json: is not readable JSON" in refusal(tmp_path)


def test_paths_name_a_directory_a_run_or_nothing_local(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_model(run / "model")
    (run / "stage.json").write_text("{}")
    assert find_model_dir(str(run)) == run / "model"
    assert find_model_dir(str(run / "model")) == run / "model"
    assert find_model_dir("builtin:tiny-gpt2") is None
    assert find_model_dir("meta-llama/Llama-3.1-8B") is None
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "stage.json").write_text("{}")
    for path, what in {
        str(tmp_path / "absent"): "does not exist",
        "./absent": "does not exist",
        str(run / "stage.json"): "is a file",
        str(tmp_path / "unfinished"): "is a run that has no model yet",
    }.items():
        with pytest.raises(ModelError, match=what):
            find_model_dir(path)


def test_fingerprint_follows_the_bytes_not_the_place(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    third = write_model(tmp_path / "c", **{"wte.weight": torch.ones(4, 3), "b": torch.zeros(5)})
    assert fingerprint_weights(first) == fingerprint_weights(second) != fingerprint_weights(third)


def test_a_missing_run_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo/sft").mkdir(parents=True)
    (tmp_path / "runs/demo/sft/stage.json").write_text("{}")
    with pytest.raises(ModelError, match=r"^runs/dmo does not exist; did you mean demo\?$"):
        find_model_dir("runs/dmo")
    with pytest.raises(ModelError, match="^runs/other does not exist; runs holds demo$"):
        find_model_dir("runs/other")
    assert find_model_dir("Qwen/Qwen2.5-0.5B") is None
    assert find_model_dir("gpt2") is None


def test_a_hub_without_address_is_said_at_once(tmp_path: Path) -> None:
    code = "from alignkit.models.files import require_available; require_available('org/model')"
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path)}
    proxies = [name for name in environment if name.lower().endswith("_proxy")]
    for name in proxies:
        del environment[name]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=20)
    said = "org/model is not on this machine and the hub cannot be reached (https://hub.invalid); download it first, or"
    assert done.stderr.splitlines()[-1].endswith(f"{said} look at the network")


def test_neighbours_that_may_not_be_looked_at_do_not_hide_the_message(tmp_path: Path) -> None:
    (tmp_path / "model-a").mkdir()
    (tmp_path / "model-c").symlink_to("/proc/1/cwd/x")  # of another user's process
    with pytest.raises(ModelError, match="model-b does not exist; did you mean model-a"):
        find_model_dir(str(tmp_path / "model-b"))
