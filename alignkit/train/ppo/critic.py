"""The critic: a value for every token of an answer, from one of three trunks.

    own      a sequence classifier of its own, from the reward model or from the policy with a zero head (InstructGPT)
    adapter  an adapter on the policy's base, from the reward model's adapter and head
    head     a zero head on the policy's own hidden states (Ziegler 2019): its loss also reaches the policy's adapter

The value of a token is what is expected before it is sampled.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from alignkit.errors import ModelError, RunError
from alignkit.models.adapters import copy_adapter
from alignkit.models.files import REWARD_NORM
from alignkit.models.frozen import load_classifier
from alignkit.models.heads import ScoreHead
from alignkit.models.hub import quiet_transformers
from alignkit.models.logprobs import Batch
from alignkit.models.start import know_classifier
from alignkit.runs.files import write_json
from alignkit.train import ranks, shards
from alignkit.train.ppo.roles import CRITIC, REWARD, Roles, read_answers, return_logps
from alignkit.train.trainer import switch_off_dropout

CRITIC_FILE = "critic.safetensors"


class Critic:
    """Values of answer tokens, and the parameters, state and files of whatever computes them."""

    def __init__(
        self, roles: Roles, head: nn.Linear, *, model: PreTrainedModel | None = None, from_reward: bool = False
    ) -> None:
        self.roles, self.head, self.model, self.from_reward = roles, head, model, from_reward
        self.has_adapter = model is None and CRITIC in getattr(roles.policy, "peft_config", {})

    @property
    def shares_hidden(self) -> bool:
        """Whether it reads the policy's hidden states, so that both come from one forward pass."""
        return self.model is None and not self.has_adapter

    def values(self, batch: Batch, hidden_NH: Tensor | None = None) -> Tensor:
        """Values, float32 (N,); `hidden_NH` is the policy's, where it is shared."""
        if self.model is not None:
            return read_answers(self.model, batch)
        if self.has_adapter:
            hidden_NH = self.roles.hidden_states(batch, (CRITIC,))
        assert hidden_NH is not None
        return self.head(hidden_NH).squeeze(-1)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what the critic's loss trains and the policy's optimizer groups do not hold."""
        if self.model is not None:
            yield from ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            return
        if self.has_adapter:
            named = self.roles.policy.named_parameters()
            yield from ((name, p) for name, p in named if f".{CRITIC}." in name and "lora_" in name)
        yield from ((f"head.{name}", p) for name, p in self.head.named_parameters())

    @torch.no_grad()
    def rescale(self, gain: float, bias: float) -> None:
        """Let a critic that starts from the reward model start from gain * r + bias, which is what PPO's scores are."""
        if self.model is not None:
            shards.reshard(self.model)  # FSDP would drop what is done to a whole weight
        self.head.weight.mul_(gain)
        self.head.bias.mul_(gain).add_(bias)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def save_state(self, directory: Path) -> None:  # all ranks call it, rank 0 writes
        state = shards.gather(self.named_parameters())
        if state is not None:
            save_file(state, directory / CRITIC_FILE, metadata={"format": "pt"})

    def load_state(self, directory: Path) -> None:
        saved, mine = load_file(directory / CRITIC_FILE), dict(self.named_parameters())
        if saved.keys() != mine.keys():
            raise RunError("holds another critic; start over with --force", where=str(directory / CRITIC_FILE))
        shards.scatter_model(mine, saved)

    def save(self, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write the critic as a user loads it: a sequence classifier, its adapter, or the bare head.

        All ranks call it, for the weights may be sharded; rank 0 writes.
        """
        policy: Any = self.roles.policy
        tensors = {} if self.model is None else self.model.state_dict(keep_vars=True)
        if self.has_adapter:
            own = policy.state_dict(keep_vars=True)
            tensors = get_peft_model_state_dict(policy, own, adapter_name=CRITIC, save_embedding_layers=False)
        state = shards.gather(tensors.items()) or {}
        ranks.once(lambda: self._write(out, state, tokenizer))

    def _write(self, out: Path, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast) -> None:
        policy = self.roles.policy
        out.mkdir(parents=True, exist_ok=True)
        head = {name: p.detach().float().cpu().contiguous() for name, p in self.head.named_parameters()}
        if self.from_reward:  # transformers' classifiers have no bias: it goes where a reward model keeps its own
            bias = state.pop("score.bias") if self.model is not None else head["bias"]
            write_json(out / REWARD_NORM, {"gain": 1.0, "bias": float(bias)})
        if self.shares_hidden:
            save_file({f"value_head.{name}": tensor for name, tensor in head.items()}, out / "value_head.safetensors")
            return
        tokenizer.save_pretrained(out)
        if self.model is not None:
            with quiet_transformers():
                self.model.save_pretrained(out, state_dict=state)
            return
        state |= {"base_model.model.score.weight": head["weight"]}
        save_file(state, out / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(policy.peft_config[CRITIC])
        config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], True
        config.save_pretrained(out)


def critic_on_policy(roles: Roles) -> Critic:
    """A zero head on the policy's hidden states."""
    size = roles.policy.get_input_embeddings().weight.size(1)
    head = ScoreHead(getattr(roles.policy.config.get_text_config(), "hidden_size", size), 1, device=roles.policy.device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return Critic(roles, head)


def critic_on_base(roles: Roles) -> Critic:
    """An adapter on the shared base that starts as the reward model's, with its head."""
    assert isinstance(roles.policy, PeftModel) and roles.reward_head is not None
    with roles.policy_kept():
        copy_adapter(roles.policy, REWARD, CRITIC)
    for name, parameter in roles.policy.named_parameters():
        if f".{CRITIC}." in name and "lora_" in name:
            parameter.requires_grad_(True)
    return Critic(roles, _with_bias(roles.reward_head).float(), from_reward=True)


def critic_from_policy(roles: Roles) -> Critic:
    """A model of its own: the policy's trunk and a zero head."""
    policy = roles.policy
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    know_classifier(config)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    model.score.weight.data.zero_()
    model.score.__class__ = ScoreHead
    return _own(roles, model.to(policy.device), from_reward=False)


def critic_from_reward(roles: Roles, directory: Path, *, where: str, trust_code: bool = False) -> Critic:
    """A trainable copy of a reward model; an adapter is folded into its base, two labels into their log-odds."""
    policy = roles.policy
    how: dict[str, Any] = {"device": str(policy.device), "dtype": policy.dtype, "trust_code": trust_code}
    model: Any = load_classifier(str(directory), **how).model
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    if not isinstance(getattr(model, "score", None), nn.Linear) or getattr(model.config, "is_encoder_decoder", False):
        what = f"a {model.config.model_type} classifier gives no value per token; set value_init: policy"
        raise ModelError(what, where=where)
    model.score, model.num_labels, model.config.num_labels = _with_bias(model.score), 1, 1
    return _own(roles, model.to(policy.dtype), from_reward=True)


def _with_bias(head: nn.Linear) -> nn.Linear:
    """Copy a score head, with a bias to train where it has none; of two labels, their difference is the score."""
    state = {"bias": torch.zeros(head.out_features)} | head.state_dict()
    if head.out_features == 2:
        state = {name: tensor[1:] - tensor[:1] for name, tensor in state.items()}
    copied = ScoreHead(head.in_features, 1, device=head.weight.device, dtype=head.weight.dtype)
    copied.load_state_dict(state)
    return copied


def _own(roles: Roles, model: Any, *, from_reward: bool) -> Critic:
    model.config.use_cache = False
    model.config.pad_token_id = roles.policy.config.pad_token_id
    model.requires_grad_(True)
    model.train()
    switch_off_dropout(model)  # values of a rollout and of its training must be of one function
    return_logps(model, lambda model, hidden_NH: model.score(hidden_NH).squeeze(-1))
    return Critic(roles, model.score, model=model, from_reward=from_reward)
