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

import card
import torch
from peft import LoraConfig, get_peft_model

from alignkit.models.frozen import score_ids
from alignkit.models.generation import generate_answers, stream_tokens
from alignkit.models.heads import ScoreHead
from alignkit.models.logprobs import Sampling, pad_answers, score_tokens
from alignkit.models.parameters import take_probe
from alignkit.models.start import builtin_config, builtin_tokenizer, choose_family, random_model
from alignkit.recipe import load_recipe, resolve
from alignkit.runs.directory import RunDir
from alignkit.train.ppo.math import kl_losses, policy_losses, token_weights, value_losses
from alignkit.train.ppo.roles import Roles, critic_from_policy, critic_on_policy, read_answers
from alignkit.train.shards import clip_gradients

PROMPTS, ANSWERS = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]]
ENDS: dict[str, Any] = {"eos_ids": [500], "max_new_tokens": 6}
CONFIG = builtin_config("builtin:tiny-llama")
PAIRS = "data: {path: builtin:preferences, max_rows: 8}"
ROWS = "data: {path: builtin:instructions, max_rows: 8}"
RECIPE = f"""
model: builtin:tiny-llama
lora: {{r: 4}}
sft: {{{ROWS}}}
packed: {{method: sft, packing: true, {ROWS}}}
distill: {{method: sft, objective: distill, teacher: ./teacher, {ROWS}}}
dpo: {{{PAIRS}}}
own: {{method: dpo, loss_type: simpo, {PAIRS}}}
rm: {{{PAIRS}}}
best: {{method: rm, loss: best_of, {PAIRS}}}
"""
STEPS = ("sft", "packed", "distill", "dpo", "own", "rm", "best")
planted: str | None = None  # a mistake in all models: "host" leaves a norm there, "wait" reads a number at every pass


def put(model: Any, device: Any) -> Any:
    """Move a model to the device, with the mistake that is planted."""
    *_, norm = (module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm")
    if planted == "host":
        norm.to("cpu")
        norm._apply = lambda *_: norm
    if planted == "wait":
        norm.register_forward_hook(lambda _, inputs, found: print(end="\n" if found.isnan().any() else ""))
    return model.to(device)


def training_step(name: str, _: Any, device: Any) -> list[float]:
    """The loss of a stage's own trainer on its own rows, and after one step."""
    torch.manual_seed(0)
    stage = resolve(load_recipe(Path("recipe.yaml")), name, out=Path(tempfile.mkdtemp(dir=".")))
    run = RunDir(Path(stage.run_dir))
    run.cache.mkdir(parents=True, exist_ok=True)
    trainer: Any = importlib.import_module(f"alignkit.train.{stage.method}").build(stage, run).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    model = put(trainer.model, device).train()
    for holder in (trainer, getattr(trainer, "teacher", None)):  # models beside it
        for key in ("ref_model", "model") if holder is not trainer else ("ref_model",):
            if (other := getattr(holder, key, None)) is not None:
                setattr(holder, key, other.to(device))

    def loss() -> Any:
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        return trainer.compute_loss(model, moved)

    first = loss()
    first.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = clip_gradients(trained, 1.0)
    torch.optim.AdamW(trained, lr=1e-2).step()
    return [float(first), float(norm), float(loss())]


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


def rewarded(policy: Any, device: Any) -> list[Any]:
    """Rewards of whole answers."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(2)
    model = choose_family(config, reward=True).from_config(config).eval()
    model.score.__class__ = ScoreHead
    return score_ids(put(model, device), [[1, 2, 3], [4, 5]], pad_id=0).tolist()


def probed(policy: Any, device: Any) -> list[Any]:
    """The fingerprint of a saved model."""
    return take_probe(put(policy, device), vocab_size=512, reward=False)["values"]


CHECKS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "ppo step": ppo_step, "critic": own_critic, "sampler": sampled, "judge": judge, "evaluation": evaluated,
    "chat": chatted, "reward": rewarded, "probe": probed,
} | {name: partial(training_step, name) for name in STEPS}  # fmt: skip

if __name__ == "__main__":
    device = card.install()
    os.chdir(tempfile.mkdtemp())
    Path("recipe.yaml").write_text(RECIPE)
    random_model(CONFIG, seed=7, dtype=torch.float32).save_pretrained("teacher")
    builtin_tokenizer().save_pretrained("teacher")
    for name, check in CHECKS.items():
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
