"""Run alignkit's own code on the device of `card`, and on the CPU; a line of JSON for each check. See test_device."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
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
from alignkit.models.start import builtin_config, choose_family, random_model
from alignkit.train.ppo.math import kl_losses, policy_losses, token_weights, value_losses
from alignkit.train.ppo.roles import Roles, critic_from_policy, critic_on_policy, read_answers
from alignkit.train.shards import clip_gradients

PROMPTS, ANSWERS = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]]
ENDS: dict[str, Any] = {"eos_ids": [500], "max_new_tokens": 6}
CONFIG = builtin_config("builtin:tiny-llama")


def adapted(policy: Any) -> Any:
    """The policy with a LoRA adapter that has moved from its start."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(policy.requires_grad_(False), config)


def ppo_step(policy: Any, device: Any) -> list[float]:
    """Read a rollout, lose against older log-probabilities and values, and take one step."""
    model = adapted(policy).to(device)
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
    with torch.no_grad():
        critic.head.weight.fill_(0.1)
    values_N = critic.values(pad_answers(PROMPTS, ANSWERS, pad_id=0, device=device))
    values_N.sum().backward()
    return [*values_N.tolist(), *critic.head.weight.grad[0, :4].tolist()]


def sampled(policy: Any, device: Any) -> list[Any]:
    """Answers drawn with each row's own numbers, of prompts that come twice."""
    return generate_answers(policy.to(device).eval(), [*PROMPTS, *PROMPTS], [1, 2, 3, 4], pad_id=0, temperature=0.7,
                            top_p=0.9, **ENDS)  # fmt: skip


def judge(policy: Any, device: Any) -> list[Any]:
    """Options after questions that begin alike, which is read once."""
    question = list(range(1, 101))
    pairs = [(question, [7, 9]), (question, [3]), ([*question[:-4], 5, 6], [4, 2])]
    return score_tokens(policy.to(device).eval(), pairs, pad_id=0, batch_size=3)


def evaluated(policy: Any, device: Any) -> list[Any]:
    """Log-probabilities of continuations."""
    return score_tokens(policy.to(device).eval(), [([1, 2, 3], [4, 5]), ([], [2, 3, 4])], pad_id=0)


def chatted(policy: Any, device: Any) -> list[Any]:
    """Tokens one by one."""
    return list(stream_tokens(policy.to(device).eval(), [1, 2, 3], temperature=0, **ENDS))


def rewarded(policy: Any, device: Any) -> list[Any]:
    """Rewards of whole answers."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(2)
    model = choose_family(config, reward=True).from_config(config).eval()
    model.score.__class__ = ScoreHead
    return score_ids(model.to(device), [[1, 2, 3], [4, 5]], pad_id=0).tolist()


def probed(policy: Any, device: Any) -> list[Any]:
    """The fingerprint of a saved model."""
    return take_probe(policy.to(device), vocab_size=512, reward=False)["values"]


def planted(policy: Any, device: Any) -> list[Any]:
    """A mask of the host on scores of the device: a mistake that only a device shows."""
    return (torch.zeros(3, device=device) + torch.ones(3)).tolist()


CHECKS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "ppo step": ppo_step, "critic": own_critic, "sampler": sampled, "judge": judge, "evaluation": evaluated,
    "chat": chatted, "reward": rewarded, "probe": probed, "planted": planted,
}  # fmt: skip

if __name__ == "__main__":
    device = card.install()
    for name, check in CHECKS.items():
        found: dict[str, Any] = {"name": name}
        found["cpu"] = check(random_model(CONFIG, seed=0, dtype=torch.float32), torch.device("cpu"))
        try:
            with card.Card():
                card.SYNCS.clear()
                found["card"] = check(random_model(CONFIG, seed=0, dtype=torch.float32), device)
        except Exception as error:
            if "-v" in sys.argv:
                raise
            found["error"] = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps(found | {"syncs": dict(card.SYNCS)}), flush=True)
