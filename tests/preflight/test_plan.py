"""What `alignkit plan` predicts, against what a card measured, hand-worked numbers and the whole model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.recipes import SHIPPED, plan_shipped, read_claim
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from alignkit.errors import UsageError
from alignkit.preflight.plan import Device, Plan, plan_recipe
from alignkit.recipe import load_recipe, resolve
from alignkit.train import setup, trace

ROOT = Path(__file__).parents[2]
GIB = 2**30
LLAMA = {  # hidden size, layers, intermediate size; as tests/benchmarks/gpu.py has them
    "1B": (2048, 16, 8192),
    "8B": (4096, 32, 14336),
    "wide": (2048, 2, 8192),  # as deep as is traced anyway
    "small": (512, 2, 1024),
}
CARD = Device("H100", "cuda", 80 * GIB)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of Llama's shapes that hold a config and nothing else."""
    root = tmp_path_factory.mktemp("shapes")
    for name, (hidden, layers, intermediate) in LLAMA.items():
        LlamaConfig(
            vocab_size=128_256, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
            tie_word_embeddings=name != "8B", architectures=["LlamaForCausalLM"],
        ).save_pretrained(root / name)  # fmt: skip
    return root


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Traces of the tests lie in a directory of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    def plan(text: str, device: Device = CARD, **options: Any) -> Plan:
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return plan_recipe(load_recipe(file), device, **options)

    return plan


def measured() -> dict[str, tuple[str, int, float]]:
    """What torch's allocator counted on an H200: method, rows and GiB, by what was trained."""
    text = (ROOT / "tests" / "benchmarks" / "GPU.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| ((\w+) [18]B [^|]+) \| (\d) \| alignkit \|[^|]+\|[^|]+\| ([\d.]+) \|", text, re.MULTILINE)
    return {name: (method, int(rows), float(gib)) for name, method, rows, gib in found}


FIRST = ("sft 8B QLoRA, no recomputation", "rm 8B QLoRA", "sft 1B full")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in measured()]
)
def test_the_peak_is_what_a_card_measured(name: str, shapes: Path, tmp_path: Path) -> None:
    method, rows, gib = measured()[name]
    shape, lora = name.split()[1], "LoRA" in name
    recomputes = (lora and "no recomputation" not in name) or ", recomputation" in name
    kind = f", quantization: {'nf4' if 'QLoRA' in name else 'none'}"
    text = f"model: {{path: {shapes / shape}{kind}}}\nlaunch: {{device: cuda}}\n"
    text += f"{'lora: {dropout: 0.0}' if lora else ''}\n{method}: {{data: builtin:instructions, batch_size: {rows}, "
    (tmp_path / "r.yaml").write_text(f"{text}gradient_checkpointing: {str(recomputes).lower()}}}\n")
    stage = resolve(load_recipe(tmp_path / "r.yaml"), method)
    tokens = 2048 if method == "sft" else 1024
    found = setup.predict_memory(stage, setup.read_shape(stage), micro=rows, tokens=tokens, device="cuda")
    assert found.notes == [] and found.total / GIB == pytest.approx(gib, rel=0.04)


QUICK = ("smoke",)
NAMED = {"llama-qlora": 24, "ppo-llama-qlora": 48, "rlaif-llama": 48, "qwen-lora": 8, "hh-real": 8, "full-finetune": 80}


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow) for path in SHIPPED]
)
def test_a_shipped_recipe_fits_the_card_that_it_names(path: Path, tmp_path: Path) -> None:
    devices, device = read_claim(path)
    assert (device.kind == "cuda", device.bytes / GIB) == (path.stem in NAMED, NAMED.get(path.stem, 8))
    found = plan_shipped(path, tmp_path)
    assert found.devices == devices
    assert [stage["stage"] for stage in found.stages if not stage["fits"] or not stage["micro_up_to"]] == []


def test_a_rollout_and_its_steps_peak_as_a_card_measured(shapes: Path, tmp_path: Path) -> None:
    text = (ROOT / "tests" / "benchmarks" / "GPU.md").read_text(encoding="utf-8")
    (measured_gib,) = re.findall(r"^\| ppo 1B full \|.* ([\d.]+) \|$", text, re.MULTILINE)
    text = f"model: {{path: {shapes / '1B'}}}\nlaunch: {{device: cuda}}\nppo: {{data: builtin:prompts, batch_size: 64, "
    text += "reward: builtin:true-reward, max_new_tokens: 128, min_new_tokens: 128, ppo_epochs: 1, "
    (tmp_path / "r.yaml").write_text(text + "gradient_checkpointing: false}\n")
    stage = resolve(load_recipe(tmp_path / "r.yaml"), "ppo")
    # 129 tokens of a prompt, as tests/benchmarks/gpu.py writes them
    found = setup.predict_memory(stage, setup.read_shape(stage), micro=8, tokens=257, device="cuda")
    # Measured with a float32 reference; since then its linear layers lie in the 16 bits that autocast reads.
    saved = 2 * 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192) / GIB
    assert found.notes == [] and found.total / GIB == pytest.approx(float(measured_gib) - saved, rel=0.05)


def test_layers_that_repeat_are_as_many_as_the_whole_has(shapes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {shapes / '1B'}}}\nlora: {{}}\n"
        "sft: {data: builtin:instructions}\nrm: {data: builtin:preferences, gradient_checkpointing: false}\n"
    )
    config = LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=512)  # fmt: skip
    for name, kind in (("sft", "words"), ("rm", "score")):
        stage, shape = resolve(load_recipe(tmp_path / "r.yaml"), name), trace.Shape(2, 96, kind)
        found = trace.trace(stage, config, shape, "cuda")
        assert trace.trace(stage, config, shape, "cuda") == found  # read from the cache
        with monkeypatch.context() as patch:
            patch.setattr(trace, "_depths", lambda *_: (0, 0))
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
            whole = trace.trace(stage, config, shape, "cuda")
        assert found.rest == whole.rest and found.trained == whole.trained
        for phase, parts in found.phases.items():
            assert sum(parts.values()) == pytest.approx(sum(whole.phases[phase].values()), rel=0.002)


TINY = "model: {path: builtin:tiny-llama}\nlaunch: {device: cpu}\n"


def test_what_can_be_counted_is_counted(plan: Callable[..., Plan]) -> None:
    text = TINY + "sft: {data: {path: builtin:instructions, max_rows: 40}, batch_size: 16}\n"
    text += "dpo: {data: builtin:preferences, start_from: sft, optim: sgd, micro_batch_size: 16}\n"
    sft, dpo = plan(text, Device("CPU", "cpu", 4 * GIB)).stages
    weights = sft["parts"]["weights"]
    from alignkit.models.chat import load_tokenizer
    from alignkit.models.load import draw_base

    stage = resolve(load_recipe_text(text), "sft")
    model = draw_base(stage, load_tokenizer(stage), torch.float32)
    size = sum(-(-parameter.nbytes // 64) * 64 for parameter in model.parameters())
    assert weights * GIB == pytest.approx(size, rel=0.01)  # and what rotary embeddings keep
    assert sft["parts"]["optimizer"] * GIB == pytest.approx(2 * sum(p.nbytes for p in model.parameters()))
    assert "optimizer" not in dpo["parts"] and dpo["parts"]["reference"] == pytest.approx(weights)
    assert (sft["micro"], dpo["micro"]) == (8, 16) and sft["fits"]
    assert sft["steps"] == 3 and sft["tokens"] < 1024 and sft["notes"] == []
    checkpoint = 3 * sum(p.nbytes for p in model.parameters())  # weights and two moments
    assert sft["disk"] * GIB == pytest.approx(3 * checkpoint + weights * GIB, rel=0.01)


def test_a_row_of_ranked_answers_counts_as_many_sequences(plan: Callable[..., Plan], tmp_path: Path) -> None:
    parts = []
    for number in (2, 4):
        row = {"prompt": "Which?", "completions": [f"{letter}" * 60 for letter in "abcd"[:number]]}
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row | {"ranking": [*range(1, number + 1)]}) + "\n")
        rows = f"rm: {{data: {tmp_path}/{number}.jsonl, batch_size: 1, gradient_checkpointing: false}}\n"
        (stage,) = plan(TINY + rows, Device("CPU", "cpu", 4 * GIB)).stages
        parts.append(stage["parts"])
    assert parts[1]["weights"] == parts[0]["weights"]
    assert parts[1]["activations"] == pytest.approx(2 * parts[0]["activations"], rel=0.1)


def load_recipe_text(text: str) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "recipe.yaml")
        file.write_text(text)
        return load_recipe(file)


def test_what_does_not_fit_does_with_the_keys_that_are_named(plan: Callable, shapes: Path, tmp_path: Path) -> None:
    full = f"model: {{path: {shapes / 'wide'}}}\n"
    full += "sft: {data: builtin:instructions, batch_size: 8, micro_batch_size: 4}\n"
    lora = full + "lora: {}\n"
    four, two = (plan(lora.replace("size: 4", f"size: {micro}"), tokens=1024).stages[0]["needs"] for micro in (4, 2))
    assert two < four
    for text, gib, keys in ((lora, (two + four) / 2, []), (full, 5, ["lora: {}"]), (full, 0.5, None)):
        card = Device("card", "cuda", gib * GIB)
        (stage,) = plan(text, card, tokens=1024).stages
        assert not stage["fits"]
        if keys is None:
            assert "shorter rows or a smaller model" in stage["notes"][0]
            continue
        said = re.match(r"does not fit; it does with (.*) \((.*) GiB\)", stage["notes"][0])
        assert said is not None and float(said[2]) <= gib
        *others, micro = said[1].split(", ")
        assert others == keys
        changed = text.replace("micro_batch_size: 4", micro.removeprefix("sft.")) + "\n".join(others)
        (again,) = plan(changed, card, tokens=1024).stages
        assert again["fits"] and again["needs"] == pytest.approx(float(said[2]), abs=0.05)


def test_strategies_divide_what_they_shard(plan: Callable[..., Plan], shapes: Path) -> None:
    text = f"model: {{path: {shapes / 'small'}}}\nlaunch: {{strategy: STRATEGY}}\n"
    text += "sft: {data: builtin:instructions, batch_size: 8}\n"
    one = plan(text.replace("STRATEGY", "ddp"), tokens=512).stages[0]["parts"]
    for strategy, sharded in (("ddp", ()), ("fsdp", ("weights", "optimizer")), ("zero2", ()), ("zero3", ())):
        parts = plan(text.replace("STRATEGY", strategy), tokens=512, devices=8).stages[0]["parts"]
        for name in sharded:
            assert parts[name] == pytest.approx(one[name] / 8, rel=1e-4)  # what no strategy casts, rotary embeddings
        if strategy == "fsdp":  # the head, 16 bits a weight, as it arrives and in place
            assert parts["whole layers"] * GIB == 2 * 2 * 128_256 * 512
        if strategy == "zero3":  # of fewer than 10^9 weights all stay
            assert parts["whole layers"] == pytest.approx(one["weights"] / 2, rel=1e-4)
            assert parts["weights"] == pytest.approx(one["weights"] / 16, rel=1e-4)
            assert parts["gradients"] == pytest.approx(one["weights"] / 16, rel=1e-4)
        if strategy == "ddp":
            assert parts["buckets"] == pytest.approx(one["optimizer"] / 2) and parts["weights"] == one["weights"]
        if strategy == "zero2":  # 16-bit weights; float32 ones and two moments are shared
            assert parts["weights"] == pytest.approx(one["weights"] / 2, rel=1e-4)
            assert parts["optimizer"] == pytest.approx(one["optimizer"] * 1.5 / 8)


def test_deepspeed_has_the_policy_of_ppo_alone(plan: Callable[..., Plan]) -> None:
    text = TINY.replace("cpu}", "cpu, processes: 2, strategy: STRATEGY}")
    text += "ppo: {data: builtin:prompts, batch_size: 8, reward: builtin:true-reward, advantage: gae}\n"
    cpu = Device("CPU", "cpu", 4 * GIB)
    found = {name: plan(text.replace("STRATEGY", name), cpu).stages[0]["parts"]
             for name in ("ddp", "fsdp", "zero2", "zero3")}  # fmt: skip
    whole = found["ddp"]
    for name, critic, reference in (("fsdp", 2, 2), ("zero2", 1, 1), ("zero3", 1, 2)):
        assert found[name]["critic"] == pytest.approx(whole["critic"] / critic)
        assert found[name]["reference"] == pytest.approx(whole["reference"] / reference)


def test_a_critic_of_its_own_has_no_lm_head(plan: Callable[..., Plan], shapes: Path, tmp_path: Path) -> None:
    config = json.loads((shapes / "small/config.json").read_text())
    for tied, head in ((True, 0.0), (False, 4 * 128_256 * 512 / GIB)):  # float32
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        text = f"model: {{path: {tmp_path}}}\n"
        text += "ppo: {data: builtin:prompts, batch_size: 8, reward: builtin:true-reward, advantage: gae}\n"
        parts = plan(text, tokens=64).stages[0]["parts"]
        assert parts["critic"] == pytest.approx(4 * (parts["weights"] - head), rel=1e-4)


def two_processes() -> Iterator[Any]:
    """What the allocators of two real processes counted: how they trained, and MiB predicted and of either."""
    text = (ROOT / "tests" / "benchmarks" / "SHARDS.md").read_text(encoding="utf-8")
    row = r"^\| (sft|dpo|rm) \| (full|LoRA) \| (no|bf16) \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|"
    for number, found in enumerate(re.findall(row, text, re.MULTILINE)):
        yield pytest.param(*found[:4], *map(float, found[4:]), marks=[pytest.mark.slow] * (number % 4 != 1))


@pytest.mark.parametrize(("method", "kind", "mixed", "strategy", "mib", "rank0", "rank1"), [*two_processes()])
def test_a_strategy_holds_what_two_processes_held(
    method: str, kind: str, mixed: str, strategy: str, mib: float, rank0: float, rank1: float, tmp_path: Path
) -> None:
    LlamaConfig(  # as tests/benchmarks/setup.py has it
        hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8192, max_position_embeddings=2048,
    ).save_pretrained(tmp_path / "shape")  # fmt: skip
    text = f"model: {{path: {tmp_path / 'shape'}}}\n{'lora: {dropout: 0.0}' if kind == 'LoRA' else ''}\n"
    text += f"launch: {{device: cpu, processes: 2, strategy: {strategy}, mixed_precision: '{mixed}'}}\n"
    text += (
        f"{method}: {{data: builtin:preferences, batch_size: 4, micro_batch_size: 2, gradient_checkpointing: false}}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    stage = resolve(load_recipe(tmp_path / "r.yaml"), method)
    found = setup.predict_memory(stage, setup.read_shape(stage), micro=2, tokens=128, device="cpu").total / 2**20
    off = 0.11 if (strategy, mixed) == ("zero3", "no") else 0.1  # float32: something of DeepSpeed's is not counted
    assert found == pytest.approx(mib, rel=0.01) and found == pytest.approx(max(rank0, rank1), rel=off)


def test_ppo_holds_its_roles_and_the_cache_of_what_it_writes(plan: Callable[..., Plan], shapes: Path) -> None:
    text = f"model: {{path: {shapes / 'small'}, quantization: nf4}}\nlora: {{}}\n"
    text += "rm: {data: builtin:preferences, batch_size: 2}\n"
    text += "ppo: {data: builtin:prompts, reward: rm, batch_size: 2, max_new_tokens: 128, start_from: sft}\n"
    text += "sft: {data: builtin:instructions, batch_size: 2}\nevaluate: {data: builtin:prompts, batch_size: 4}\n"
    found = {stage["stage"]: stage for stage in plan(text, tokens=1024).stages}
    ppo = found["ppo"]["parts"]
    adapters = ppo["adapters"]
    assert ppo["reference"] == ppo["reward"] == pytest.approx(adapters, rel=0.01)
    assert ppo["critic"] == pytest.approx(4 * adapters, rel=0.01)
    # keys and values of 2 layers, 8 heads of 16, in 16 bits: of 4 prompts when the last layer has read them
    cache = 2 * 2 * 8 * 16 * 2 * 4 * 1024
    assert found["evaluate"]["parts"]["KV cache"] * GIB == pytest.approx(cache, rel=0.01)


def test_every_reward_model_is_whole_on_each_device(plan: Callable[..., Plan], tmp_path: Path) -> None:
    shape = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_labels=1)
    scores = LlamaForSequenceClassification(shape)
    scores.save_pretrained(tmp_path / "scores")
    size, model = 4 * scores.num_parameters(), f"{{model: {tmp_path / 'scores'}}}"
    cpu = Device("CPU", "cpu", 4 * GIB)

    def held(ppo: str, launch: str = "", lora: str = "", device: Device = cpu) -> dict[str, float]:
        text = TINY.replace("cpu}", f"cpu{launch}}}") + lora
        text += "rm: {data: builtin:preferences}\n" if "reward: rm" in ppo else ""
        text += f"ppo: {{data: builtin:prompts, batch_size: 8, max_steps: 4, {ppo}}}\n"
        return {name: part * GIB for name, part in plan(text, device).stages[-1]["parts"].items()}

    two, shared = f"reward: [{model}, {model}], gold: {model}", ", processes: 2, strategy: "
    for strategy in ("ddp", "fsdp", "zero2", "zero3"):
        found = held(two, shared + strategy)
        assert (found["reward"], found["gold"]) == (2 * size, size)
    assert held(two, device=CARD)["reward"] == 2 * size  # another's, in the numbers of its files
    without = held(f"{two}, advantage: grpo")
    assert without["reward"] == 2 * size and "critic" not in without
    # One of our own, although no critic starts from it; a copy of the policy, or an adapter on its base.
    own = held("reward: rm, value_init: policy")
    assert own["reward"] == pytest.approx(own["weights"], rel=1e-3)
    on_base = held("reward: rm, value_init: policy", lora="lora: {}\n")
    assert on_base["reward"] == pytest.approx(on_base["adapters"], rel=0.01) and "critic" not in on_base
    # Another base: whole beside the adapters, and the critic is a head on the policy.
    other = held(f"reward: {model}", lora="lora: {}\n")
    assert other["reward"] == size and "critic" not in other


def test_a_judge_on_the_hub_is_counted_and_said(plan: Callable[..., Plan], shapes: Path) -> None:
    text = f"model: {{path: {shapes / 'small'}}}\nlora: {{}}\n"
    text += "label: {data: builtin:prompts, judge: {model: some/judge}, constitution: builtin:helpfulness}\n"
    (stage,) = plan(text, tokens=256).stages
    # embeddings, which are the head too, and of 2 layers: q and o, k and v, three of the MLP, two norms, and the last
    number = 128_256 * 512 + 2 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1024 + 2 * 512) + 512
    assert stage["parts"]["judge"] * GIB == 2 * number
    assert stage["notes"] == ["some/judge taken as large as the policy, as its config is not here"]


def test_a_gpu_that_nobody_knows_is_refused_with_the_nearest() -> None:
    assert Device.find("rtx 4090", None)[:2] == Device.find("4090", None)[:2] == ("RTX-4090", "cuda")
    assert Device.find("NVIDIA H100", None).bytes == 80 * GIB and Device.find(None, 12).bytes == 12 * GIB
    with pytest.raises(UsageError, match=r"--gpu: no GPU called H1000 is known; did you mean H100\?; --memory GIB"):
        Device.find("H1000", None)
    with pytest.raises(UsageError, match=r"--memory: H100 has 80 GiB and not 20; give one of the two"):
        Device.find("H100", 20)
    assert Device.find("H100", 80) == Device.find("H100", None) == Device.find("NVIDIA H100 80GB HBM3", None)
    assert Device.find("A100 80GB", None)[0] == Device.find("NVIDIA A100-SXM4-80GB", None)[0] == "A100"
    assert Device.find("A100-SXM4-40GB", None)[0] == "A100-40GB"
    with pytest.raises(UsageError, match="no GPU called A100-20GB is known"):
        Device.find("A100-20GB", None)


def test_auto_takes_what_fits_on_the_card(shapes: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {shapes / '1B'}}}\nlora: {{}}\nsft: {{data: builtin:instructions, batch_size: 64}}\n"
    )
    stage, table = resolve(load_recipe(tmp_path / "r.yaml"), "sft"), Dataset.from_dict({"length": [100, 1024]})
    # No card is here: what is asked of it is answered in its place.
    monkeypatch.setattr(setup, "pick_device", lambda *_, **__: "cuda")
    config = setup.read_shape(stage)
    two = setup.predict_memory(stage, config, micro=2, tokens=1024, device="cuda").needs
    for free, micro in ((80 * GIB, 8), (two + 1, 2), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 80 * GIB))
        setup._fit_micro_batch(stage, table)
        assert setup.micro_batch_size(stage) == micro
    packed = replace(stage, run_dir="other", trainer={**stage.trainer, "packing": True})
    assert setup.micro_batch_size(packed) == 1  # all rows of a micro batch would share a dense mask
    flash = replace(packed, model=packed.model.model_copy(update={"attn_implementation": "flash_attention_2"}))
    assert setup.micro_batch_size(flash) == 8


def test_the_command_prints_one_table_and_json(run_alignkit: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TINY + "sft: {data: builtin:instructions, max_steps: 10}\n")
    done = run_alignkit("plan", "r.yaml", "--tokens-per-second", "1000")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  sft +8 +\d+ .* yes +\d+$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"GiB: MiB of each\n.*weights.*\n.*\n  sft .* 0\.60 ", done.stdout), done.stdout
    done = run_alignkit("plan", "r.yaml", "--memory", "0.1", "--json", "--set", "sft.batch_size=1")  # little to try
    probed = run_alignkit("plan", "r.yaml", "--gpu", "H100", "--probe")
    assert probed.returncode == 2 and "--probe: measures this machine, which is not H100; leave" in probed.stderr
    found = json.loads(done.stdout)
    assert done.returncode == 0 and not found["fits"] and found["stages"][0]["steps"] == 10
