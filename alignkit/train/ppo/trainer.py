"""PPO on TRL's GRPOTrainer: its generation, its vLLM and its place in transformers; our critic, advantages and losses.

An optimizer step is `batch_size` answers; a rollout is `minibatches` of them and is gone through `ppo_epochs` times.
Losses are means over the tokens of the whole step, over all ranks: micro batches and processes change nothing.
Checkpoints are written between rollouts only: a resumed run samples the next rollout as the undisturbed one would have.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import prepare_deepspeed

from alignkit import console
from alignkit.errors import ModelError, RunError
from alignkit.models.adapters import TRAINED
from alignkit.models.generation import generate_answers
from alignkit.models.kernels import leave_out_masks, leave_out_unread
from alignkit.models.logprobs import Batch, pad_answers
from alignkit.recipe.methods import PpoOptions
from alignkit.runs.directory import list_checkpoints, step_of
from alignkit.train import ranks
from alignkit.train.ppo.answers import answer_order, cut_at_text, prompt_numbers, sort_steps
from alignkit.train.ppo.math import answer_means, kl_losses, policy_losses, value_losses
from alignkit.train.ppo.roles import CRITIC, Critic, Roles, read_answers
from alignkit.train.ppo.rollout import CHECK, HELD_OUT, Collector, Experience, KlTooLarge
from alignkit.train.trainer import Guarded

STATE_FILE = "ppo_state.json"  # of a checkpoint, beside the weights
_PTX_SEED = 7919  # another order than that of the prompts
_HELD_OUT_METRICS = ("reward", "gold", "objective/kl", "entropy", "response_length", "ended_share", "repetition")


class Ema(TrainerCallback):
    """Averages of named parameters, on their devices; moved after every optimizer step, before anything is saved."""

    def __init__(self, decay: float) -> None:
        self._decay = decay

    def begin(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.averages = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def on_step_end(self, *_: Any, **__: Any) -> None:
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_([*self.averages.values()], weights, 1 - self._decay)  # a <- decay a + (1 - decay) w


class Ppo(Guarded, GRPOTrainer):
    """See the module docstring."""

    trained_adapters = (TRAINED, CRITIC)
    beside: torch.optim.Optimizer | None = None  # the critic's under DeepSpeed, whose own holds the policy alone

    def __init__(
        self, *args: Any, options: PpoOptions, collector: Collector, roles: Roles, critic: Critic | None,
        ptx: Dataset | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.options, self.collector, self.roles, self.critic, self.ptx = options, collector, roles, critic, ptx
        self.experience: Experience | None = None
        self.ema = Ema(options.ema) if options.ema else None
        self._steps_per_rollout = options.ppo_epochs * options.minibatches
        super().__init__(*args, reward_funcs=lambda **_: [], **kwargs)  # the collector computes rewards
        for other in filter(None, (roles.reference, critic and critic.model)):
            leave_out_masks(other)  # as the policy does: at step 0 they agree to the last bit
            if not ranks.is_sharded(self):
                leave_out_unread(other)
        if critic is not None and critic.model is not None and self.args.gradient_checkpointing:
            critic.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        collector.generate, collector.autocast = self._sample, self.accelerator.autocast
        on_cpu, alone = self.args.device.type == "cpu", self.args.world_size == 1
        if on_cpu and not ranks.is_sharded(self):  # whose ranks must take the same number of passes
            # Whole weights have a gradient that every piece is added to, so theirs are longer.
            collector.piece_tokens = 256 if isinstance(self.model, PeftModel) else 512
        whole = options.minibatches == self.args.gradient_accumulation_steps == 1
        # Elsewhere micro batches were chosen to fit the memory; two whole models would need twice the activations.
        self._keeps_graphs = on_cpu and alone and whole and (critic is None or critic.model is None)
        self._bind_parameters()
        # DDP would wait for the gradients of an adapter that another backward pass trains.
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        apart = [name for name in trained if name not in self._policy_parameters]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, apart)
        if self.ema is not None:
            self.add_callback(self.ema)

    def _bind_parameters(self) -> None:
        """Take note of who owns which parameters and begin the policy's averages.
        Sharding replaces parameters, and between two passes a sharded model may show its whole ones."""
        self._critic_parameters = self.critic.parameters() if self.critic else []
        others = {id(parameter) for parameter in self._critic_parameters}
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self._policy_parameters = {name: p for name, p in trained if id(p) not in others}
        if self.ema is not None:
            self.ema.begin(self._policy_parameters)

    def get_train_dataloader(self) -> DataLoader[int]:
        """Number the micro batches of a run; what is in them is sampled when their rollout comes."""
        count = self.args.max_steps * self.args.gradient_accumulation_steps
        return DataLoader(range(count), shuffle=False, collate_fn=lambda turns: {"turn": turns[0]})

    def _init_training_state(self, *args: Any) -> Any:
        found = super()._init_training_state(*args)
        every, steps = self.state.save_steps, self._steps_per_rollout
        if self.args.save_strategy == "steps" and every % steps:
            self.state.save_steps = math.ceil(every / steps) * steps
            told = f"{self.collector.name}: saving every {self.state.save_steps} steps instead of {every}"
            console.note(f"{told}: checkpoints lie between rollouts, which take {steps} steps")
        return found

    @property
    def may_stop(self) -> bool:
        """Whether the run stands between two rollouts, where it can be saved and stopped."""
        return self.state.global_step % self._steps_per_rollout == 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where the KL passes max_kl, stop with the weights of the newest checkpoint before."""
        try:
            return super().train(*args, **kwargs)
        except KlTooLarge as stop:
            self.is_in_train, (kl, step) = False, stop.args
            directory = Path(self.args.output_dir)
            self.settle()
            good = [path for path in list_checkpoints(directory) if step_of(path) < step]
            limit = f"the KL is {kl:.3g} nats per sequence at step {step}, above max_kl {self.options.max_kl:g}"
            if not good:
                advice = "no earlier checkpoint was saved; lower learning_rate or save_steps, or raise kl_coef"
                raise ranks.met_by_all(RunError(f"{limit}, and {advice}", where=str(directory))) from None
            self._load_from_checkpoint(str(good[0]))
            self.state.global_step = step_of(good[0])
            console.warn(f"{self.collector.name}: {limit}; stopped, and the model is that of {good[0].name}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        rollouts = math.ceil(self.state.global_step / self._steps_per_rollout)
        episodes = rollouts * self.collector.num_answers
        self.state.epoch = episodes / self.options.answers_per_prompt / len(self.collector.prompts)
        if "loss" in logs:
            logs["episodes"] = episodes
        super().log(logs, start_time)

    def _sample(
        self, prompt_ids: list[list[int]], uniforms_BT: Tensor, repeats: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample this rank's answers; vLLM draws random numbers of its own and gives log-probabilities too."""
        options, chat, size = self.options, self.collector.chat, self.options.generation.batch_size
        if self.use_vllm:
            answers, logps = self._generate_single_turn(prompt_ids, None, {}, repeats)
            return answers, logps or []
        stops, decode = options.stop or (), chat.tokenizer.decode
        names = ("temperature", "top_p", "top_k", "max_new_tokens", "min_new_tokens")
        how = {name: getattr(options, name) for name in names} | {
            "eos_ids": chat.stop_ids, "pad_id": chat.tokenizer.pad_token_id, "in_step": ranks.is_sharded(self),
            "is_over": (lambda ids: cut_at_text(ids, stops, decode) is not None) if stops else None,
        }  # fmt: skip
        order = sorted(range(len(prompt_ids)), key=lambda place: len(prompt_ids[place]))  # like lengths come together
        if options.generation.engine == "continuous":
            how["in_flight"], size = size, len(order)
        found: dict[int, list[int]] = {}
        unwrapped = unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs
        )
        # One autocast over all tokens rounds each weight once; that inside the forward alone, at every token.
        once = nullcontext() if ranks.is_sharded(self) else self.accelerator.autocast()
        with unwrapped as model, ranks.gathered_root(self.model), once:
            for places in (order[start : start + size] for start in range(0, len(order), size)):
                batch = [prompt_ids[place] for place in places]
                answers = generate_answers(model, batch, uniforms_BT=uniforms_BT[places], **how)
                found |= zip(places, answers, strict=True)
        return [found[place] for place in range(len(prompt_ids))], []

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Make this rank's micro batch of a turn, at a rollout's first turn after sampling it."""
        step, micro = divmod(inputs["turn"], self.args.gradient_accumulation_steps)
        number, place = divmod(step, self._steps_per_rollout)
        if place == 0 and micro == 0:
            if number == 0:
                self.collector.prepare()
            self.experience, metrics = None, self._metrics["train"]  # the memory of the last one is needed
            # Where the first step is one micro batch of all answers, it goes back through the graphs of the read.
            keep = self._keeps_graphs
            self.experience = ranks.alike(lambda: self.collector.collect(number, self.model, step=step, keep=keep))
            for name, value in self.experience.metrics.items():
                metrics[name].append(value)
            self._total_train_tokens += sum(self.experience.rollout.lengths)
            metrics["num_tokens"] = [self._total_train_tokens]
        assert self.experience is not None
        epoch, minibatch = divmod(place, self.options.minibatches)
        rollout, mask_RT = self.experience.rollout, self.experience.mask_RT
        order = answer_order(len(rollout), seed=self.args.seed, rollout=number, epoch=epoch)
        batch_size, size = self.options.batch_size, self.args.per_device_train_batch_size
        rows_of_step = order[minibatch * batch_size : (minibatch + 1) * batch_size]
        rows_of_step = sort_steps(rows_of_step, rollout.lengths, step_size=batch_size)
        turn = micro * self.args.world_size + self.args.process_index
        rows = rows_of_step[turn * size : (turn + 1) * size]
        return {
            "step": step, "micro": micro, "num_tokens": float(mask_RT[rows_of_step].sum()),
            "num_learnt": float(self.experience.learnt_RT[rows_of_step].sum()),
            "pieces": self.collector.pieces(rollout, rows.tolist(), mask_RT.size(1)),
        }  # fmt: skip

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        accumulate = self.args.gradient_accumulation_steps
        step, micro = divmod(inputs["turn"], accumulate)
        if micro == 0:  # parts of the step's means, added up over its micro batches and the ranks
            self._step_sums: dict[str, float] = defaultdict(float)
        ptx_loss = self._train_ptx(model, step, micro) if self.ptx is not None else None
        loss = super().training_step(model, inputs, *args, **kwargs)
        if ptx_loss is not None:
            self._last_loss = loss = loss + ptx_loss
        if micro == accumulate - 1:
            for parameter in self._critic_parameters if self.args.world_size > 1 else ():
                if not isinstance(parameter, DTensor):  # no wrapper of a model averages these over ranks
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.args.world_size
            sums = ranks.total(torch.tensor(list(self._step_sums.values()), dtype=torch.float64))
            for name, value in zip(self._step_sums, sums.tolist(), strict=True):
                self._metrics["train"][name].append(value)
        return loss

    def _train_ptx(self, model: Any, step: int, micro: int) -> Tensor:
        """Add the gradient of a language-model loss on this rank's blocks (InstructGPT, arXiv 2203.02155 eq. 2); DDP
        sums it up with the one of PPO, which comes after it."""
        options, table = self.options.ptx, self.ptx
        assert options is not None and table is not None
        world_size, device, size = self.args.world_size, self.args.device, options.batch_size or self.options.batch_size
        numbers = prompt_numbers(step * size, size, num_prompts=len(table), seed=self.args.seed + _PTX_SEED)
        blocks = [list(table[number]["input_ids"]) for number in numbers]
        num_tokens = sum(len(ids) - 1 for ids in blocks)  # every token after the first is learnt
        turn = micro * world_size + self.args.process_index
        mine = blocks[turn :: self.args.gradient_accumulation_steps * world_size]
        loss = torch.zeros((), device=device)
        if mine:
            starts, rests, pad_id = [ids[:1] for ids in mine], [ids[1:] for ids in mine], self.collector.pad_id
            batch = pad_answers(starts, rests, pad_id=pad_id, device=device)
            with self._more_to_come(model):
                with self.compute_loss_context_manager():
                    logps_N, *_ = read_answers(model, batch)
                    loss = -options.coef * logps_N.sum() / num_tokens * world_size
                self.accelerator.backward(loss)
        self._step_sums["ptx_loss"] += float(loss.detach()) / options.coef / world_size
        return loss.detach()

    @contextmanager
    def _more_to_come(self, model: Any) -> Iterator[None]:
        """A backward pass that another one of the same optimizer step follows."""
        syncs = self.accelerator.sync_gradients
        with self.accelerator.no_sync(model):
            if self.is_deepspeed_enabled:  # whose last backward pass takes the step
                self.accelerator.gradient_state._set_sync_gradients(False)
            yield
            if self.is_deepspeed_enabled:
                self.accelerator.gradient_state._set_sync_gradients(syncs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Add up the losses of a micro batch's pieces; all but the last have taken their backward pass."""
        if inputs["micro"] == 0:
            for parameter in self._critic_parameters:
                parameter.grad = None  # upstream clears the policy's
        device, pieces = self.args.device, inputs["pieces"]
        done = torch.zeros((), device=device)
        for rows, batch in pieces[:-1]:
            with self._more_to_come(model):
                loss, value_loss = self._piece_loss(model, inputs, rows, batch)
                self.accelerator.backward(loss)
            done += loss.detach() + value_loss
        loss, value_loss = self._piece_loss(model, inputs, *pieces[-1])
        return loss + done + value_loss

    def _piece_loss(
        self, model: Any, inputs: dict[str, Any], rows: list[int], batch: Batch
    ) -> tuple[Tensor, Tensor | float]:
        """The loss to go back from, and that of a critic with a graph of its own, which has gone back already."""
        assert self.experience is not None
        options, experience, num_tokens = self.options, self.experience, inputs["num_tokens"]
        keep_BT = batch.mask_BT.cpu()
        old_logps_N, ref_logps_N, advantages_N, old_values_N, returns_N, weights_N = (  # what the rollout fixed
            column_RT[rows][keep_BT].to(batch.targets_N.device)
            for column_RT in (
                experience.logps_RT, experience.ref_logps_RT, experience.advantages_RT, experience.values_RT,
                experience.returns_RT, experience.weights_RT,
            )
        )  # fmt: skip
        kept = self.collector.kept.pop(0) if self.collector.kept else None

        def value_loss_of(values_N: Tensor) -> Tensor:
            clip = options.cliprange_value
            losses_N = value_losses(values_N, old_values_N, returns_N, clip=clip)
            self._step_sums["value_loss"] += float(losses_N.detach().sum()) / num_tokens
            clipped = float(((values_N.detach() - old_values_N).abs() > clip).sum())
            self._step_sums["value_clip_fraction"] += clipped / num_tokens
            # Gradients are averaged over ranks, and this is a sum.
            return options.vf_coef * losses_N.sum() / num_tokens * self.args.world_size

        critic, value_loss = self.critic, 0.0
        if critic is not None and not critic.shares_hidden:
            # A graph of its own: its memory is free before the policy's is built.
            # A critic's adapter acts in the backward pass too, which may recompute activations.
            with self.roles.act_as((CRITIC,)) if critic.has_adapter else nullcontext():
                value_loss = value_loss_of(kept[1] if kept else critic.values(batch))
                (value_loss.backward if self.beside else partial(self.accelerator.backward, value_loss))()
            value_loss = value_loss.detach()
        logps_N, _, hidden_NH = (kept[0], None, None) if kept else read_answers(model, batch)
        acting_N = logps_N
        if options.importance == "sequence":
            acting_N = old_logps_N + answer_means(logps_N - old_logps_N, batch.rows_N)
        low, high = options.cliprange, options.cliprange_high or options.cliprange
        losses_N = policy_losses(acting_N, old_logps_N, advantages_N, clip=low, clip_high=high)
        divisor = inputs["num_learnt"] if options.loss_normalization == "token" else options.batch_size
        loss = (losses_N * weights_N).sum() / max(divisor, 1)
        self._step_sums["policy_loss"] += float(loss.detach())
        if options.kl_in == "loss":
            kl = (kl_losses(logps_N, ref_logps_N) * weights_N).sum() / max(divisor, 1)
            self._step_sums["kl_loss"] += float(kl.detach())
            loss = loss + experience.metrics["kl_coef"] * kl
        change_N = (acting_N.detach() - old_logps_N).exp() - 1
        self._step_sums["clip_fraction"] += float(((change_N > high) | (change_N < -low)).sum()) / num_tokens
        loss = loss * self.args.world_size
        if critic is not None and critic.shares_hidden:
            loss = loss + value_loss_of(kept[1] if kept else critic.values(batch, hidden_NH))
        return loss, value_loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Leave out the critic, some of whose parameters are adapters inside the policy's model."""
        apart = self.critic.parameters() if self.critic is not None else []
        for parameter in apart:
            parameter.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        for parameter in apart:
            parameter.requires_grad_(True)
        if self.is_deepspeed_enabled and apart:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.beside = kind(self._critic_groups(), **settings)
        return optimizer

    def _critic_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the critic, with a learning rate of its own."""
        if self.critic is None:
            return []
        rate = self.options.critic_learning_rate or self.args.learning_rate
        # A head may be whole where all else is sharded, and one kernel steps through a group.
        of_head, groups = set(map(id, self.critic.head.parameters())), defaultdict[tuple[bool, bool], list[Any]](list)
        for parameter in self.critic.parameters():
            groups[id(parameter) in of_head, parameter.ndim >= 2].append(parameter)
        return [
            {"params": groups[of_group], "weight_decay": self.args.weight_decay if of_group[1] else 0.0, "lr": rate}
            for of_group in sorted(groups)
        ]

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Shard what stands beside the policy and have the optimizer train the critic too.
        Upstream calls it when the policy has just been sharded and the optimizer follows it."""
        if self.is_fsdp_enabled:
            for model in (self.roles.reference, self.critic.model if self.critic else None):
                if model is not None:
                    fsdp2_prepare_model(self.accelerator, model)
            for head in (self.critic.head if self.critic else None, self.roles.reward_head):
                if head is not None and not isinstance(head.weight, DTensor):
                    head.to(self.args.device)
            self._bind_parameters()
        for group in self._critic_groups() if self.beside is None else ():
            self.optimizer.add_param_group(group)
        return super().create_scheduler(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip policy and critic apart; return the norm of both together, for the check that it is finite."""
        if self.is_deepspeed_enabled:  # which has clipped, and taken its step
            policy = torch.as_tensor(super()._clip_grad_norm(model))
        else:
            self.accelerator.unscale_gradients()
            policy = ranks.clip_gradients(self._policy_parameters.values(), self.args.max_grad_norm)
        if self.critic is None:
            return policy
        critic = ranks.clip_gradients(self._critic_parameters, self.args.max_grad_norm)
        self._metrics["train"]["critic_grad_norm"].append(float(critic))
        return (policy**2 + critic**2) ** 0.5

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.beside is not None:  # DeepSpeed has taken the policy's step; the schedule is one of factors
            rate = self.options.critic_learning_rate or self.args.learning_rate
            for group in self.beside.param_groups:
                group["lr"] = rate * self._get_learning_rate() / self.args.learning_rate
            self.beside.step()
        return grad_norm

    def _prepare_for_training(self, *args: Any) -> Any:
        prepared = super()._prepare_for_training(*args)
        self._widen_critic()
        if self.is_deepspeed_enabled and ranks.is_sharded(self) and self.roles.reference is not None:
            self.roles.reference = prepare_deepspeed(self.roles.reference, self.accelerator)
        return prepared

    def _widen_critic(self) -> None:
        """Hold a critic's adapter in float32, as its optimizer needs it: DeepSpeed rounds all that is in its model."""
        if self.beside is not None and self.critic is not None and self.critic.has_adapter:
            for parameter in self._critic_parameters:
                parameter.data = parameter.data.float()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        directory = Path(str(output_dir))
        for name, tensors in self._held_beside().items():  # all ranks gather, rank 0 writes
            if (state := ranks.gather_tensors(tensors.items())) is not None:
                save_file(state, directory / name, metadata={"format": "pt"})
        if self.args.should_save:
            (directory / STATE_FILE).write_text(json.dumps(self.collector.state()) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._widen_critic()
        directory = Path(resume_from_checkpoint)
        for name, mine in self._held_beside().items():
            saved = load_file(directory / name) if (directory / name).is_file() else {}
            if saved.keys() != mine.keys():
                raise RunError("holds other weights than this run trains; start over with --force",
                               where=str(directory / name))  # fmt: skip
            ranks.scatter_model(mine, saved)
        self.collector.restore(json.loads((directory / STATE_FILE).read_text(encoding="utf-8")))

    def _held_beside(self) -> dict[str, Mapping[str, Tensor]]:
        """Tensors of critic and averages, by the file of a checkpoint that keeps them beside the policy."""
        found: dict[str, Mapping[str, Tensor]] = {"ema.safetensors": self.ema.averages} if self.ema else {}
        return found | ({"critic.safetensors": dict(self.critic.named_parameters())} if self.critic else {})

    @torch.no_grad()
    def ready_final(self) -> None:
        if self.ema is None:
            return
        if self.is_deepspeed_enabled:  # which holds the float32 weights elsewhere
            ranks.scatter_model(self.ema.parameters, self.ema.averages)
        for name, average in self.ema.averages.items():  # the averages become the weights
            self.ema.parameters[name].copy_(average)

    def check_step_zero(self) -> None:
        """Raise ModelError unless the ratio is exactly 1 and the KL exactly 0 on answers of the fresh policy."""
        collector = self.collector
        numbers = range(min(self.args.per_device_train_batch_size, len(collector.prompts)))
        rollout = collector.sample(numbers, (CHECK,))
        mask_RT, logps_RT, ref_logps_RT, *_ = collector.read(rollout, self.model)
        again_RT = torch.zeros_like(logps_RT)
        for rows, batch in collector.pieces(rollout, numbers, mask_RT.size(1)):
            with collector.autocast():  # with gradients, as a training step computes it
                again_RT[rows] = batch.spread(read_answers(self.model, batch)[0].float()).detach().cpu()
        # Kernels of a GPU may add in another order from one call to the next.
        bound = 0.0 if self.args.device.type == "cpu" else 1e-2
        kl, ratio = float((logps_RT - ref_logps_RT).abs().max()), float((again_RT - logps_RT).abs().max())
        if not kl <= bound:
            what = f"policy and reference differ at step 0 (by {kl:.3g} nats in a token, it must be 0)"
            raise ModelError(f"{collector.name}: {what}: the reference is not the model that training starts from")
        if not ratio <= bound:
            what = f"the ratio at step 0 is exp({ratio:.3g}), it must be 1: the policy is not the same in sampling and "
            raise ModelError(f"{collector.name}: {what}in training; switch dropout off")

    @torch.no_grad()
    def answer_held_out(self, table: Dataset) -> dict[str, float]:
        """Answer each held-out prompt as in training and give the means as eval_*."""
        collector, was_training = self.collector, self.model.training
        sums: dict[str, float] = defaultdict(float)
        self.model.eval()
        repeats = self.options.answers_per_prompt
        for start in range(0, len(table), collector.num_answers // repeats):
            numbers = range(start, min(start + collector.num_answers // repeats, len(table)))
            rollout = collector.sample(numbers, (HELD_OUT, start), table=table, repeats=repeats)
            for name, value in collector.examine(rollout, self.model).metrics.items():
                sums[name] += value * len(numbers) / len(table)
        self.model.train(was_training)
        return {f"eval_{name}": sums[name] for name in _HELD_OUT_METRICS if name in sums}
