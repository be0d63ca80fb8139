"""Run alignkit's own code on the device of `card`, and on the CPU; a line of JSON for each check. See test_device."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import card
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import T5Config

from alignkit.models.frozen import score_ids
from alignkit.models.generation import generate_answers, stream_tokens
from alignkit.models.heads import ScoreHead
from alignkit.models.logprobs import Sampling, pad_answers
from alignkit.models.parameters import take_probe
from alignkit.models.scoring import score_tokens
from alignkit.models.start import builtin_config, builtin_tokenizer, choose_family, random_model
from alignkit.recipe import load_recipe, resolve
from alignkit.runs.directory import RunDir
from alignkit.train.ppo.math import kl_losses, policy_losses, token_weights, value_losses
from alignkit.train.ppo.roles import Roles, critic_from_policy, critic_on_policy, read_answers
from alignkit.train.ranks import clip_gradients

PROMPTS, ANSWERS = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]]
ENDS: dict[str, Any] = {"eos_ids": [500], "max_new_tokens": 6}
CONFIG = builtin_config("builtin:tiny-llama")
PAIRS = "data: {path: builtin:preferences, max_rows: 8}"
ROWS = "data: {path: builtin:instructions, max_rows: 8}"
TRANSLATIONS = "objective: seq2seq, data: builtin:translation?rows=8"
ASKED = "data: {path: builtin:prompts, max_rows: 8}, max_new_tokens: 4"
MIXED = "batch_size: 4, micro_batch_size: 2, ptx: {data: {path: builtin:reviews, max_rows: 8}, coef: 0.5}"
SMALL = "{hidden_size: 16, embedding_size: 12, alignment_size: 16, maxout_size: 8}"
RECIPES = {
    "{path: builtin:tiny-llama}": f"""
lora: {{r: 4}}
sft: {{{ROWS}}}
packed: {{method: sft, packing: true, {ROWS}}}
distill: {{method: sft, objective: distill, teacher: ./teacher, {ROWS}}}
classify: {{method: sft, objective: classify, data: tones.jsonl}}
dpo: {{{PAIRS}}}
own: {{method: dpo, loss_type: simpo, {PAIRS}}}
kto: {{method: dpo, loss_type: kto, {PAIRS}}}
rm: {{{PAIRS}}}
best: {{method: rm, loss: best_of, {PAIRS}}}
ppo: {{reward: ./scores, {ASKED}, {MIXED}}}
""",
    "{path: builtin:tiny-llama, quantization: nf4}": f"lora: {{r: 4}}\nnf4: {{method: sft, {ROWS}}}\n",
    f"{{path: builtin:rnnsearch, config: {SMALL}}}": f"rnnsearch: {{method: sft, {TRANSLATIONS}}}\n",
    "{path: t5, init: scratch, tokenizer: builtin:words}": f"t5: {{method: sft, {TRANSLATIONS}}}\n",
}
STEPS = ("sft", "packed", "distill", "classify", "dpo", "own", "kto", "rm", "best", "nf4", "rnnsearch", "t5")
planted: str | None = None  # a mistake in all models: "host" leaves a norm there, "wait" reads a number at every pass


def put(model: Any, device: Any) -> Any:
    """Move a model to the device, with the mistake that is planted."""
    kinds = [[m for m in model.modules() if type(m).__name__.endswith(kind)] for kind in ("Norm", "Linear")]
    norm = next(filter(None, kinds))[-1]
    if planted == "host":
        norm.to("cpu")
        norm._apply = lambda *_: norm
    if planted == "wait":
        norm.register_forward_hook(lambda _, inputs, found: print(end="\n" if found.isnan().any() else ""))
    packed = [(layer, layer.weight.quant_state) for layer in model.modules() if isinstance(layer, Linear4bit)]
    for layer, _ in packed:  # a Params4bit cannot be made of a tensor that has a class already
        layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    model.to(device)
    for layer, state in packed:
        state.to(device)
        layer.weight.quant_state = state
    if tie := getattr(model, "tie_weights", None):  # a weight in two places has become two
        tie()
    return model


def set_up(name: str, device: Any) -> Any:
    """The trainer of a stage with its models on the device."""
    torch.manual_seed(0)
    model, stages = next((model, stages) for model, stages in RECIPES.items() if f"{name}: {{" in stages)
    Path("recipe.yaml").write_text(f"model: {model}\n{stages}")
    stage = resolve(load_recipe(Path("recipe.yaml")), name, out=Path(tempfile.mkdtemp(dir=".")))
    run = RunDir(Path(stage.run_dir))
    run.cache.mkdir(parents=True, exist_ok=True)
    trainer: Any = importlib.import_module(f"alignkit.train.{stage.method}").build(stage, run).trainer
    put(trainer.model, device).train()
    for holder in (trainer, getattr(trainer, "teacher", None)):  # models beside it
        for key in ("ref_model", "model") if holder is not trainer else ("ref_model",):
            if (other := getattr(holder, key, None)) is not None:
                setattr(holder, key, other.to(device))
    return trainer


def training_step(name: str, _: Any, device: Any) -> list[float]:
    """The loss of a stage's own trainer on its own rows, and after one step."""
    trainer = set_up(name, device)
    batch = next(iter(trainer.get_train_dataloader()))

    def loss() -> Any:
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        return trainer.compute_loss(trainer.model, moved)

    # What the trainer takes for its device; it was made where there is none.
    with patch.object(type(trainer.args), "device", device), patch.object(Accelerator, "device", device):
        first = loss()
        first.backward()
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        norm = clip_gradients(trained, 1.0)
        torch.optim.AdamW(trained, lr=1e-2).step()
        return [float(first.detach()), float(norm), float(loss().detach())]


def ppo_rollout(_: Any, device: Any) -> list[float]:
    """A rollout by the trainer of ppo: sampled, scored and read, and a step on it and on pre-training rows."""
    trainer = set_up("ppo", device)
    for model in (trainer.critic.head, *trainer.collector.rewards.modules):
        model.to(device)
    trainer._bind_parameters()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    with patch.object(type(trainer.args), "device", device), patch.object(Accelerator, "device", device):
        losses = [float(trainer.training_step(trainer.model, {"turn": turn}, None)) for turn in range(2)]
        norm = trainer._clip_grad_norm(trainer.model)
        trained = [*trainer._policy_parameters.values(), *trainer._critic_parameters]
        torch.optim.AdamW(trained, lr=1e-2).step()
    found = trainer._metrics["train"]
    return [*losses, float(norm), *(found[name][0] for name in ("ptx_loss", "value_loss", "entropy", "reward"))]


def adapted(policy: Any) -> Any:
    """The policy with a LoRA adapter that has moved from its start."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(policy.requires_grad_(False), config)


def ppo_step(policy: Any, device: Any) -> list[float]:
    """Read a rollout, lose against older log-probabilities and values, and take one step."""
    model = put(adapted(policy), device)
    roles = Roles(SimpleNamespace(model=model, reference="adapter_off"), reference=None)  # type: ignore[arg-type]
    critic = critic_on_policy(roles)
    batch = pad_answers(PROMPTS, ANSWERS, pad_id=0, device=device, sampling=Sampling(0.7, 1, (2,)))
    logps_N, entropy_N, hidden_NH = read_answers(model, batch)
    reference_N, values_N = roles.reference_logps(batch), critic.values(batch, hidden_NH)
    old_N = (logps_N + 0.1).detach()
    weights_BT = token_weights(batch.mask_BT, "token", longest=4)
    loss = (policy_losses(logps_N, old_N, old_N, clip=0.2) * weights_BT[batch.mask_BT]).sum()
    loss = loss + value_losses(values_N, values_N.detach() + 1, old_N, clip=0.2).mean()
    loss = loss + kl_losses(logps_N, reference_N).mean()
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] + critic.parameters()
    norm = clip_gradients(trained, 1.0)
    torch.optim.AdamW(trained, lr=1e-2).step()
    after_N = read_answers(model, batch)[0]
    return [float(loss), float(norm), *logps_N.tolist(), *entropy_N.tolist(), *after_N.tolist()]


def own_critic(policy: Any, device: Any) -> list[float]:
    """A critic of its own, with gradients."""
    roles = Roles(SimpleNamespace(model=policy.to(device), reference="model"), reference=None)  # type: ignore[arg-type]
    critic = critic_from_policy(roles)
    put(critic.model, device)
    with torch.no_grad():
        critic.head.weight.fill_(0.1)
    values_N = critic.values(pad_answers(PROMPTS, ANSWERS, pad_id=0, device=device))
    values_N.sum().backward()
    return [*values_N.tolist(), *critic.head.weight.grad[0, :4].tolist()]


def sampled(policy: Any, device: Any) -> list[Any]:
    """Answers drawn with each row's own numbers, of prompts that come twice."""
    return generate_answers(put(policy, device).eval(), [*PROMPTS, *PROMPTS], [1, 2, 3, 4], pad_id=0, temperature=0.7,
                            top_p=0.9, **ENDS)  # fmt: skip


def continuous(policy: Any, device: Any) -> list[Any]:
    """The same answers by continuous batching, two at a time; its thread knows the device, and not the mode."""
    return generate_answers(put(policy, device).eval(), [*PROMPTS, *PROMPTS], [1, 2, 3, 4], pad_id=0, temperature=0.7,
                            top_p=0.9, in_flight=2, **ENDS)  # fmt: skip


def judge(policy: Any, device: Any) -> list[Any]:
    """Options after questions that begin alike, which is read once."""
    question = list(range(1, 101))
    pairs = [(question, [7, 9]), (question, [3]), ([*question[:-4], 5, 6], [4, 2])]
    return score_tokens(put(policy, device).eval(), pairs, pad_id=0, batch_size=3)


def evaluated(policy: Any, device: Any) -> list[Any]:
    """Log-probabilities of continuations."""
    return score_tokens(put(policy, device).eval(), [([1, 2, 3], [4, 5]), ([], [2, 3, 4])], pad_id=0)


def chatted(policy: Any, device: Any) -> list[Any]:
    """Tokens one by one."""
    return list(stream_tokens(put(policy, device).eval(), [1, 2, 3], temperature=0, **ENDS))


def scorer() -> Any:
    """A reward model that has learnt nothing."""
    config = copy.deepcopy(CONFIG)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(2)
    return choose_family(config, reward=True).from_config(config)


def rewarded(_: Any, device: Any) -> list[Any]:
    """Rewards of whole answers."""
    model = scorer().eval()
    model.score.__class__ = ScoreHead
    return score_ids(put(model, device), [[1, 2, 3], [4, 5]], pad_id=0).tolist()


def probed(policy: Any, device: Any) -> list[Any]:
    """The fingerprint of a saved model."""
    return take_probe(put(policy, device), vocab_size=512, reward=False)["values"]


CHECKS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "ppo step": ppo_step, "ppo": ppo_rollout, "critic": own_critic, "sampler": sampled, "continuous": continuous,
    "judge": judge, "evaluation": evaluated, "chat": chatted, "reward": rewarded, "probe": probed,
} | {name: partial(training_step, name) for name in STEPS}  # fmt: skip


def main() -> None:
    global planted
    device = card.install()
    T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0).save_pretrained("t5")
    tones = [{"text": f"{tone} film {number}", "label": tone} for tone in ("bad", "good") for number in range(4)]
    Path("tones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tones))
    random_model(CONFIG, seed=7, dtype=torch.float32).save_pretrained("teacher")
    scorer().save_pretrained("scores")
    for name in ("teacher", "scores"):
        builtin_tokenizer().save_pretrained(name)
    Path("scores/chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    for name, check in CHECKS.items():
        if len(sys.argv) > 1 and name not in sys.argv:
            continue
        found: dict[str, Any] = {"name": name}
        found["cpu"] = check(random_model(CONFIG, seed=0, dtype=torch.float32), torch.device("cpu"))
        for planted in (None, "host", "wait"):
            key = planted or "card"
            try:
                with card.Card():
                    card.SYNCS.clear()
                    found[key] = check(random_model(CONFIG, seed=0, dtype=torch.float32), device)
            except Exception as error:
                if "-v" in sys.argv and planted != "host":
                    raise
                found[f"{key} error"] = f"{type(error).__name__}: {error}"[:500]
            found[f"{key} syncs"] = dict(card.SYNCS)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        main()
