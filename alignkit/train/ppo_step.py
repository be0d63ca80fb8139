"""One optimizer step of PPO: the losses of policy and critic, their gradients and their optimizer.

Losses are means over the tokens of the whole optimizer step, over all ranks, so that micro batches and processes change
nothing. What is learnt from was collected before (`experience`); nothing is sampled here.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer

from alignkit.recipe.schema import PpoOptions
from alignkit.train import ranks
from alignkit.train.critic import Critic
from alignkit.train.ema import Ema
from alignkit.train.experience import Experience
from alignkit.train.ppo_math import policy_losses, value_losses
from alignkit.train.ptx import Ptx
from alignkit.train.roles import Roles
from alignkit.train.shards import clip_gradients


class PpoStep(GRPOTrainer):
    """The part of PPO's trainer that takes steps; `ppo_trainer` gives it micro batches."""

    options: PpoOptions
    roles: Roles
    critic: Critic | None
    ptx: Ptx | None
    experience: Experience | None

    def _bind_parameters(self) -> None:
        """Take note of who owns which parameters and begin the policy's averages.

        Sharding replaces parameters, and between two passes a sharded model may show its whole ones.
        """
        self._critic_parameters = self.critic.parameters() if self.critic else []
        others = {id(parameter) for parameter in self._critic_parameters}
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self._policy_parameters = {name: p for name, p in trained if id(p) not in others}
        self.ema = Ema(self._policy_parameters, self.options.ema) if self.options.ema else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if inputs["micro"] == 0 and self.critic is not None:
            for parameter in self._critic_parameters:
                parameter.grad = None  # upstream clears the policy's
        batch, num_tokens = inputs["batch"], inputs["num_tokens"]
        old = self._targets(inputs)
        value_loss = torch.zeros((), device=batch.input_ids_BL.device)
        if self.critic is not None and not self.critic.shares_hidden:
            # A graph of its own: its memory is free before the policy's is built.
            with self.critic.acting():
                value_loss = self._value_loss(self.critic.values(batch), old, num_tokens) * self.args.world_size
                self.accelerator.backward(value_loss)
            value_loss = value_loss.detach()
        logps_N, _, hidden_NH = self.roles.policy_logps(model, batch)
        losses_N = policy_losses(logps_N, old["logps"], old["advantages"], clip=self.options.cliprange)
        loss = losses_N.sum() / num_tokens
        ratio_N = (logps_N.detach() - old["logps"]).exp()
        self._add("policy_loss", float(loss.detach()))
        self._add("clip_fraction", float(((ratio_N - 1).abs() > self.options.cliprange).sum()) / num_tokens)
        if self.critic is not None and self.critic.shares_hidden:
            value_loss = self._value_loss(self.critic.values(batch, hidden_NH), old, num_tokens) * self.args.world_size
        return loss * self.args.world_size + value_loss  # gradients are averaged over ranks, and this is a sum

    def _targets(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return what the rollout fixed for the tokens of a micro batch, each (N,)."""
        assert self.experience is not None
        rows, keep_BT = inputs["rows"], inputs["batch"].mask_BT.cpu()
        device = inputs["batch"].input_ids_BL.device
        columns = {
            "logps": self.experience.logps_RT,
            "advantages": self.experience.advantages_RT,
            "values": self.experience.values_RT,
            "returns": self.experience.returns_RT,
        }
        return {name: tensor[rows][keep_BT].to(device) for name, tensor in columns.items()}

    def _value_loss(self, values_N: Tensor, old: dict[str, Tensor], num_tokens: float) -> Tensor:
        losses_N = value_losses(values_N, old["values"], old["returns"], clip=self.options.cliprange_value)
        clipped = ((values_N.detach() - old["values"]).abs() > self.options.cliprange_value).sum()
        self._add("value_loss", float(losses_N.detach().sum()) / num_tokens)
        self._add("value_clip_fraction", float(clipped) / num_tokens)
        return self.options.vf_coef * losses_N.sum() / num_tokens

    def _add(self, name: str, part: float) -> None:
        """Add a micro batch's part of a step's mean; the step's means are averaged at the next log."""
        self._step_sums[name] = self._step_sums.get(name, 0.0) + part

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        accumulate = self.args.gradient_accumulation_steps
        step, micro = divmod(inputs["turn"], accumulate)
        if micro == 0:
            self._step_sums: dict[str, float] = {}
        ptx_loss = self._train_ptx(model, step, micro) if self.ptx is not None else None
        loss = super().training_step(model, inputs, *args, **kwargs)
        if ptx_loss is not None:
            loss = loss + ptx_loss
        if micro == accumulate - 1:
            if self.critic is not None:
                ranks.average_gradients(p for p in self._critic_parameters if not isinstance(p, DTensor))
            sums = ranks.total(torch.tensor(list(self._step_sums.values()), dtype=torch.float64))
            for name, value in zip(self._step_sums, sums.tolist(), strict=True):
                self._metrics["train"][name].append(value)
        return loss

    def _train_ptx(self, model: Any, step: int, micro: int) -> Tensor:
        """Add the gradient of this rank's blocks; DDP sums it up with the one of PPO, which comes after it."""
        assert self.ptx is not None
        world_size = self.args.world_size
        turn = micro * world_size + self.args.process_index
        numbers = self.ptx.micro_batches(step, turn, self.args.gradient_accumulation_steps * world_size)
        loss = torch.zeros((), device=self.args.device)
        if numbers:
            batch = self.ptx.batch(numbers, self.args.device)
            with self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    logps_N, _, _ = self.roles.policy_logps(model, batch)
                    loss = self.ptx.loss(logps_N, self.ptx.count_tokens(step)) * world_size
                self.accelerator.backward(loss)
        self._add("ptx_loss", float(loss.detach()) / self.ptx.coef / world_size)
        return loss.detach()

    def create_optimizer(self, model: Any = None) -> Any:
        """Leave out the critic, some of whose parameters are adapters inside the policy's model."""
        apart = self.critic.parameters() if self.critic is not None else []
        for parameter in apart:
            parameter.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        for parameter in apart:
            parameter.requires_grad_(True)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Shard what stands beside the policy and give the critic parameter groups with a learning rate of its own.

        Upstream calls it when the policy has just been sharded and the optimizer follows it.
        """
        if self.is_fsdp_enabled:
            for model in (self.roles.reference, self.critic.model if self.critic else None):
                if model is not None:
                    fsdp2_prepare_model(self.accelerator, model)
            self._bind_parameters()
        if self.critic is not None:
            rate = self.options.critic_learning_rate or self.args.learning_rate
            for parameters in self.critic.parameter_groups():
                decay = self.args.weight_decay if parameters[0].ndim >= 2 else 0.0
                self.optimizer.add_param_group({"params": parameters, "weight_decay": decay, "lr": rate})
        return super().create_scheduler(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip policy and critic apart; return the norm of both together, for the check that it is finite."""
        self.accelerator.unscale_gradients()
        policy = clip_gradients(self._policy_parameters.values(), self.args.max_grad_norm)
        if self.critic is None:
            return policy
        critic = clip_gradients(self._critic_parameters, self.args.max_grad_norm)
        self._metrics["train"]["critic_grad_norm"].append(float(critic))
        return (policy**2 + critic**2) ** 0.5
