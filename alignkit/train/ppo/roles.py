"""The four roles of PPO as adapters and heads on one base, or as models of their own.

With `lora:` policy, reference, a reward model of the same base and the critic share the base's weights; which adapter
acts is switched per forward pass. The critic gives each token of an answer a value, expected before it is sampled, from
a sequence classifier of its own, from an adapter on the policy's base, or from a head on the policy's hidden states
(Ziegler 2019), whose loss also reaches the policy's adapter.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from alignkit import console
from alignkit.errors import ModelError, RecipeError
from alignkit.models.adapters import REFERENCE, START, add_scoring_adapter, cast_adapters, copy_adapter
from alignkit.models.files import REWARD_NORM, find_model_dir, inspect_model_dir, is_builtin
from alignkit.models.frozen import load_classifier, read_norm
from alignkit.models.heads import ScoreHead
from alignkit.models.hub import quiet_transformers
from alignkit.models.load import Loaded
from alignkit.models.logprobs import Batch, pad_answers, run_trunk, sampled_logps
from alignkit.models.start import find_base, is_same_model, know_classifier
from alignkit.recipe import Stage
from alignkit.recipe.methods import PpoOptions
from alignkit.runs.files import write_json
from alignkit.train import ranks
from alignkit.train.trainer import switch_off_dropout

REWARD, CRITIC = "reward", "critic"  # adapter names beside those of the models room


def return_logps(model: Any, read: Callable[[Any, Tensor], Any] | None = None) -> None:
    """Let `model(..., batch=)` return `read(base, hidden states (N, H))` of a batch's answers instead of logits;
    without `read` log-probs (N,), entropies (N,) and hidden states, and with `hidden_only=True` the last alone.

    Part of the model's own forward, so that it works through the wrappers of PEFT, accelerate, DDP and FSDP; without
    `batch` the forward is what it was. TRL's `add_fused_lm_head` does the same and scores prompts too.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    original = base.forward

    @functools.wraps(type(base).forward)  # `generate` looks at the signature
    def forward(*args: Any, batch: Batch | None = None, hidden_only: bool = False, **kwargs: Any) -> Any:
        if batch is None:
            return original(*args, **kwargs)
        if read is not None:
            return read(base, batch.pick(base.base_model(**kwargs, use_cache=False).last_hidden_state))
        hidden_BLH, _ = run_trunk(original, base.get_output_embeddings(), **kwargs, use_cache=False)
        hidden_NH = batch.pick(hidden_BLH)
        return hidden_NH if hidden_only else (*sampled_logps(base, hidden_NH, batch), hidden_NH)

    base.forward = forward


def read_answers(model: Any, batch: Batch, **kwargs: Any) -> Any:
    """Call a model of `return_logps`, or its wrapper: log-probs (N,), entropies (N,) and hidden states (N, H)."""
    return model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL, batch=batch, **kwargs)


class Roles:
    """Forward passes of the policy and its reference; the critic and a reward adapter share the policy's base."""

    def __init__(self, loaded: Loaded, *, reference: PreTrainedModel | None) -> None:
        """Take the models before any trainer wraps the policy; `reference` is None where adapters of it stand in."""
        self.policy, self.reference = loaded.model, reference
        adapters = {"ref_adapter": (REFERENCE,), "base_adapter": (START,)}
        self._reference_adapters = adapters.get(str(loaded.reference), ())  # none is the bare base
        self.reward_head: nn.Linear | None = None
        for model in filter(None, (self.policy, reference)):
            return_logps(model)

    @torch.no_grad()
    def reference_logps(self, batch: Batch) -> Tensor:
        """Log-probs of the reference, (N,)."""
        with nullcontext() if self.reference is not None else self.act_as(self._reference_adapters):
            logps_N: Tensor = read_answers(self.policy if self.reference is None else self.reference, batch)[0]
        return logps_N

    @contextmanager
    def act_as(self, names: Sequence[str]) -> Iterator[None]:
        """Let only the named adapters act on the shared base; none: the bare base. PEFT's own `set_adapter` also turns
        gradients on and off, which would lose the policy's while the critic computes."""
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self._adapted()]
        for layer, *_ in before:
            layer._active_adapter, layer._disable_adapters = list(names), not names
        try:
            yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled

    def _adapted(self) -> list[Any]:
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        return [module for module in self.policy.modules() if isinstance(module, kinds)]

    def hidden_states(self, batch: Batch, adapters: Sequence[str]) -> Tensor:
        """Hidden states of the shared base with these adapters acting, (N, H)."""
        with self.act_as(adapters):
            hidden_NH: Tensor = read_answers(self.policy, batch, hidden_only=True)
        return hidden_NH

    @contextmanager
    def policy_kept(self) -> Iterator[None]:
        """Put back what acts and what trains after PEFT has added an adapter."""
        model: Any = self.policy
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        dtype = next(p.dtype for name, p in model.named_parameters() if name in trained and ".lora_" in name)
        active = list(model.active_adapters)
        yield
        if getattr(model.get_base_model(), "is_quantized", False):
            cast_adapters(model, dtype)
        for layer in self._adapted():
            layer._active_adapter, layer._disable_adapters = active, False
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Sequence[int]], *, pad_id: int, batch_size: int) -> Tensor:
        """Score token sequences by the reward adapter, as `frozen.score_ids` does; (B,) float32 on the CPU.
        As in transformers' classifiers the score is read at the last token that is not the pad token. Where pad and
        eos are one token, no score sees the end of an answer."""
        assert self.reward_head is not None
        scores: list[Tensor] = []
        for start in range(0, len(sequences), batch_size):
            part = sequences[start : start + batch_size]
            lasts = [max((at for at, token in enumerate(ids) if token != pad_id), default=0) for ids in part]
            # The last token is the "answer", and the score is read at it, not before it.
            before, at_last = zip(*((ids[:n], ids[n : n + 1]) for ids, n in zip(part, lasts, strict=True)), strict=True)
            batch = pad_answers(before, at_last, pad_id=pad_id, device=self.policy.device)
            hidden_BH = self.hidden_states(replace(batch, columns_N=batch.columns_N + 1), (REWARD,))
            scores.append(self.reward_head(hidden_BH).squeeze(-1).cpu())
        return torch.cat(scores)


def hold_reward(roles: Roles, source: str, *, trust_code: bool) -> Path | None:
    """Hold a reward model of the policy's own base as an adapter and a head on it; its directory, else None."""
    directory = None if is_builtin(source) else find_model_dir(source)
    if not isinstance(roles.policy, PeftModel) or directory is None:
        return None
    files = inspect_model_dir(directory, trust_code=trust_code)
    # PEFT names both heads; other modules trained in full would not be the base's.
    own_modules = set(files.config.get("modules_to_save") or ()) - {"score", "classifier"}
    plain = files.config.get("peft_type") == "LORA" and not files.config.get("trainable_token_indices")
    if files.kind != "adapter" or not files.reward or own_modules or not plain:
        return None
    if not is_same_model(roles.policy.get_base_model().name_or_path, find_base(files)):
        return None
    with roles.policy_kept():
        weight = add_scoring_adapter(roles.policy, directory, REWARD)
    roles.reward_head = ScoreHead(weight.size(1), 1, bias=False, device=roles.policy.device).requires_grad_(False)
    roles.reward_head.weight.copy_(weight)
    return directory


class Critic:
    """Values of answer tokens, and the parameters and files of whatever computes them."""

    def __init__(
        self, roles: Roles, head: nn.Linear, *, model: PreTrainedModel | None = None, from_reward: bool = False
    ) -> None:
        self.roles, self.head, self.model, self.from_reward = roles, head, model, from_reward
        self.has_adapter = model is None and CRITIC in getattr(roles.policy, "peft_config", {})
        self.shares_hidden = model is None and not self.has_adapter  # one forward pass serves it and the policy

    def values(self, batch: Batch, hidden_NH: Tensor | None = None) -> Tensor:
        """Values, float32 (N,); `hidden_NH` is the policy's, where it is shared."""
        if self.model is not None:
            return read_answers(self.model, batch)
        return self.head(self.roles.hidden_states(batch, (CRITIC,)) if self.has_adapter else hidden_NH).squeeze(-1)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what the critic's loss trains and the policy's optimizer groups do not hold."""
        if self.model is not None:
            yield from ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            return
        if self.has_adapter:
            named = self.roles.policy.named_parameters()
            yield from ((name, p) for name, p in named if f".{CRITIC}." in name and "lora_" in name)
        yield from ((f"head.{name}", p) for name, p in self.head.named_parameters())

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    @torch.no_grad()
    def rescale(self, gain: float, bias: float) -> None:
        """Let a critic that starts from the reward model start from gain * r + bias, which is what PPO's scores are."""
        if self.model is not None:
            ranks.reshard(self.model)  # FSDP would drop what is done to a whole weight
        self.head.weight.mul_(gain)
        self.head.bias.mul_(gain).add_(bias)

    def save(self, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write the critic as a user loads it: a sequence classifier, its adapter, or the bare head.
        All ranks call it, for the weights may be sharded; rank 0 writes."""
        policy: Any = self.roles.policy
        tensors = {} if self.model is None else self.model.state_dict(keep_vars=True)
        if self.has_adapter:
            own = policy.state_dict(keep_vars=True)
            tensors = get_peft_model_state_dict(policy, own, adapter_name=CRITIC, save_embedding_layers=False)
        state = ranks.gather_tensors(tensors.items()) or {}

        def write() -> None:
            out.mkdir(parents=True, exist_ok=True)
            head = {name: p.detach().float().cpu().contiguous() for name, p in self.head.named_parameters()}
            if self.from_reward:  # transformers' classifiers have no bias: it goes where a reward model keeps its own
                bias = state.pop("score.bias") if self.model is not None else head["bias"]
                write_json(out / REWARD_NORM, {"gain": 1.0, "bias": float(bias)})
            if self.shares_hidden:
                named = {f"value_head.{name}": tensor for name, tensor in head.items()}
                save_file(named, out / "value_head.safetensors")
                return
            tokenizer.save_pretrained(out)
            if self.model is not None:
                with quiet_transformers():
                    self.model.save_pretrained(out, state_dict=state)
                return
            whole = {**state, "base_model.model.score.weight": head["weight"]}
            save_file(whole, out / "adapter_model.safetensors", metadata={"format": "pt"})
            config = copy.deepcopy(policy.peft_config[CRITIC])
            config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], True
            config.save_pretrained(out)

        ranks.once(write)


def build_critic(stage: Stage, roles: Roles) -> Critic:
    """Build the critic that value_init asks for; omitted: from the reward where that is one model that can be one."""
    options, policy = stage.expect(PpoOptions), roles.policy
    key = f"{stage.name}.value_init"
    only = options.reward[0].model if len(options.reward) == 1 else None
    directory = find_model_dir(only) if only and not is_builtin(only) else None
    if options.critic_start != "reward":
        own = options.critic_start == "policy" and stage.lora is None
        return critic_from_policy(roles) if own else critic_on_policy(roles)
    if directory is None:
        what = f"{key}: reward needs one reward model on disk as the reward; use value_init: policy"
        raise RecipeError(what, where=stage.where(key))
    splits_adapters = stage.launch.strategy == "zero3" and roles.reward_head is not None
    if splits_adapters and options.value_init is None:
        console.note(f"{stage.name}: zero3 splits adapters with their base, so the critic is a zero head on the policy")
        return critic_on_policy(roles)
    if splits_adapters:
        what = f"{key} is reward, an adapter that zero3 would split with the policy's base; use value_init: policy"
        raise RecipeError(what, where=stage.where(key))
    if roles.reward_head is not None:  # an adapter on the shared base that starts as the reward model's, with its head
        with roles.policy_kept():
            copy_adapter(policy, REWARD, CRITIC)
        for name, parameter in policy.named_parameters():
            if f".{CRITIC}." in name and "lora_" in name:
                parameter.requires_grad_(True)
        critic = Critic(roles, _with_bias(roles.reward_head).float(), from_reward=True)
    elif stage.lora is None:  # a copy of the reward model; an adapter is folded into its base
        how: dict[str, Any] = {"device": str(policy.device), "dtype": policy.dtype, "trust_code": stage.trust_code}
        model: Any = load_classifier(str(directory), **how).model
        model = model.merge_and_unload() if isinstance(model, PeftModel) else model
        if not isinstance(getattr(model, "score", None), nn.Linear) or model.config.is_encoder_decoder:
            what = f"a {model.config.model_type} classifier gives no value per token; set value_init: policy"
            raise ModelError(what, where=stage.where(key))
        model.score, model.num_labels, model.config.num_labels = _with_bias(model.score), 1, 1
        critic = _own(roles, model.to(policy.dtype), from_reward=True)
    elif options.value_init is None:
        console.note(f"{stage.name}: the reward model has another base, so the critic is a zero head on the policy")
        return critic_on_policy(roles)
    else:
        what = f"{key}: reward needs a reward model that is an adapter on the policy's base, or a stage without lora:"
        raise RecipeError(f"{what}; use value_init: policy", where=stage.where(key))
    weight, (gain, bias) = options.reward[0].weight, read_norm(str(directory))
    critic.rescale(weight * gain, weight * bias)
    return critic


def critic_on_policy(roles: Roles) -> Critic:
    """A zero head on the policy's hidden states."""
    size = roles.policy.get_input_embeddings().weight.size(1)
    head = ScoreHead(getattr(roles.policy.config.get_text_config(), "hidden_size", size), 1, device=roles.policy.device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return Critic(roles, head)


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
