"""PPO on TRL's GRPOTrainer: its generation, its vLLM and its place in transformers; our critic, advantages and losses.

An optimizer step is `batch_size` answers; a rollout is `minibatches` of them and is gone through `ppo_epochs` times.
Checkpoints are written between rollouts only: a resumed run samples the next rollout as the undisturbed one would have.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from alignkit import console
from alignkit.recipe.schema import PpoOptions
from alignkit.train import ranks
from alignkit.train.collect import Collector, Turns, never_called
from alignkit.train.critic import Critic
from alignkit.train.draws import drawing, in_batches
from alignkit.train.ema import AfterStep
from alignkit.train.experience import Experience, answer_order, sort_steps
from alignkit.train.guard import TRAINED_ADAPTER, Guarded
from alignkit.train.monitors import KlTooLarge
from alignkit.train.ppo_checks import check_step_zero, go_back
from alignkit.train.ppo_step import PpoStep
from alignkit.train.ptx import Ptx
from alignkit.train.roles import CRITIC, Roles
from alignkit.train.shards import gathered_root, is_sharded

STATE_FILE = "ppo_state.json"


class Ppo(Guarded, PpoStep):
    """See the module docstring."""

    trained_adapters = (TRAINED_ADAPTER, CRITIC)

    def __init__(
        self,
        *args: Any,
        options: PpoOptions,
        collector: Collector,
        roles: Roles,
        critic: Critic | None,
        ptx: Ptx | None = None,
        **kwargs: Any,
    ) -> None:
        self.options, self.collector, self.roles, self.critic, self.ptx = options, collector, roles, critic, ptx
        self.experience: Experience | None = None
        self._steps_per_rollout = options.ppo_epochs * options.minibatches
        super().__init__(*args, reward_funcs=never_called, **kwargs)
        if critic is not None and critic.model is not None and self.args.gradient_checkpointing:
            critic.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        collector.generate, collector.autocast = self._sample, self.accelerator.autocast
        self._bind_parameters()
        # DDP would wait for the gradients of an adapter that another backward pass trains.
        apart = [
            name for name, p in self.model.named_parameters() if p.requires_grad and name not in self._policy_parameters
        ]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, apart)
        if not self.use_vllm:  # `draws` leaves one token to a greedy search
            self.generation_kwargs |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            self.generation_config.update(**self.generation_kwargs)
        if self.options.ema:
            self.add_callback(AfterStep(lambda: self.ema))

    def get_train_dataloader(self) -> DataLoader[dict[str, int]]:
        count = self.args.max_steps * self.args.gradient_accumulation_steps
        return DataLoader(Turns(count), batch_size=1, shuffle=False, collate_fn=lambda rows: rows[0])

    def _init_training_state(self, *args: Any) -> Any:
        found = super()._init_training_state(*args)
        every = self.state.save_steps
        if self.args.save_strategy == "steps" and every % self._steps_per_rollout:
            self.state.save_steps = math.ceil(every / self._steps_per_rollout) * self._steps_per_rollout
            console.note(
                f"{self.collector.name}: saving every {self.state.save_steps} steps instead of {every}: checkpoints "
                f"lie between rollouts, which take {self._steps_per_rollout} steps"
            )
        return found

    @property
    def may_stop(self) -> bool:
        """Whether the run stands between two rollouts, where it can be saved and stopped."""
        return self.state.global_step % self._steps_per_rollout == 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except KlTooLarge as stop:
            self.is_in_train = False
            go_back(self, stop)

    # ---- sampling ----

    def _sample(self, prompt_ids: list[list[int]], uniforms_BT: Tensor, repeats: int) -> list[list[int]]:
        """Return this rank's answers; vLLM draws random numbers of its own."""
        if self.use_vllm:
            answers: list[list[int]] = self._generate_single_turn(prompt_ids, None, {}, repeats)[0]
            return answers
        return in_batches(self._draw, prompt_ids, uniforms_BT, batch_size=self.options.generation.batch_size)

    def _draw(self, prompt_ids: list[list[int]], uniforms_BT: Tensor) -> list[list[int]]:
        numbers = drawing(self.model, uniforms_BT, temperature=self.options.temperature, in_step=is_sharded(self))
        with numbers, gathered_root(self.model):
            answers: list[list[int]] = self._generate_single_turn(prompt_ids, None, {}, 1)[0]
        return answers

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's micro batch of a turn, at a rollout's first turn after sampling it."""
        accumulate = self.args.gradient_accumulation_steps
        step, micro = divmod(inputs["turn"], accumulate)
        number, place = divmod(step, self._steps_per_rollout)
        if place == 0 and micro == 0:
            if number == 0:
                self.collector.prepare()
            self.experience = None  # its memory is needed
            self.experience = ranks.alike(lambda: self.collector.collect(number, self.model, step=step))
            self._log_rollout(self.experience)
        assert self.experience is not None
        epoch, minibatch = divmod(place, self.options.minibatches)
        rollout = self.experience.rollout
        order = answer_order(len(rollout), seed=self.args.seed, rollout=number, epoch=epoch)
        batch_size, size = self.options.batch_size, self.args.per_device_train_batch_size
        rows_of_step = order[minibatch * batch_size : (minibatch + 1) * batch_size]
        rows_of_step = sort_steps(rows_of_step, rollout.lengths, step_size=batch_size)
        turn = micro * self.args.world_size + self.args.process_index
        rows = rows_of_step[turn * size : (turn + 1) * size]
        mask_RT = self.experience.mask_RT
        return {
            "step": step,
            "micro": micro,
            "rows": torch.as_tensor(rows),
            "num_tokens": float(mask_RT[rows_of_step].sum()),
            "batch": self.collector.batch(rollout, rows.tolist(), mask_RT.size(1)),
        }

    def _log_rollout(self, experience: Experience) -> None:
        metrics = self._metrics["train"]
        for name, value in experience.metrics.items():
            metrics[name].append(value)
        self._total_train_tokens += sum(experience.rollout.lengths)
        metrics["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        rollouts = math.ceil(self.state.global_step / self._steps_per_rollout)
        episodes = rollouts * self.collector.num_answers
        self.state.epoch = episodes / self.options.answers_per_prompt / len(self.collector.prompts)
        if "loss" in logs:
            logs["episodes"] = episodes
        super().log(logs, start_time)

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        directory = Path(str(output_dir))
        if self.critic is not None:
            self.critic.save_state(directory)
        if self.ema is not None:
            self.ema.save(directory)
        if self.args.should_save:
            (directory / STATE_FILE).write_text(json.dumps(self.collector.state()) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        directory = Path(resume_from_checkpoint)
        if self.critic is not None:
            self.critic.load_state(directory)
        if self.ema is not None:
            self.ema.load(directory)
        self.collector.restore(json.loads((directory / STATE_FILE).read_text(encoding="utf-8")))

    def ready_final(self) -> None:
        if self.ema is not None:
            self.ema.put_in()

    def check_step_zero(self) -> None:
        """Raise ModelError unless the ratio is exactly 1 and the KL exactly 0 on answers of the fresh policy."""
        count = min(self.args.per_device_train_batch_size, len(self.collector.prompts))
        check_step_zero(self.collector, self.model, count=count)
