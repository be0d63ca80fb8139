"""PPO as a stage: policy, reference, rewards and critic put together, and what is saved beside the policy.

The trainer is `ppo_trainer`, its arithmetic `ppo_math`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from alignkit import console
from alignkit.data import Rejects
from alignkit.errors import RecipeError
from alignkit.models.chat import Chat
from alignkit.models.classifier import Classifier, ScoreIds, hold_on_base, read_norm
from alignkit.models.files import find_model_dir, is_builtin
from alignkit.models.load import Loaded, load_policy
from alignkit.models.logprobs import Sampling
from alignkit.models.start import context_length
from alignkit.recipe import Stage
from alignkit.recipe.schema import PpoOptions, RewardSource, SftOptions
from alignkit.runs.directory import Result, RunDir
from alignkit.runs.files import describe_bytes
from alignkit.train import ranks
from alignkit.train.arguments import build_config, micro_batch_size, world_size
from alignkit.train.built import Built
from alignkit.train.fit import fit, watch_for
from alignkit.train.ppo.critic import (
    Critic,
    critic_from_policy,
    critic_from_reward,
    critic_on_base,
    critic_on_policy,
    heads_and_models,
)
from alignkit.train.ppo.roles import Part, Roles, build_roles, find_reward_on_base, list_parts
from alignkit.train.ppo.rollout import Collector, Truncation
from alignkit.train.ppo.trainer import Ppo, Ptx, answer_held_out
from alignkit.train.rewards import build_rewards
from alignkit.train.tables import Tables, open_chat, prepare_tables

_LONGEST_PTX_BLOCK = 1024  # tokens, as those of an sft stage with objective: lm


def build(stage: Stage, run: RunDir) -> Built:
    """Load the four roles and the prompts and return a trainer that has not trained yet."""
    options = stage.expect(PpoOptions)
    chat = open_chat(stage, run)
    tokenizer = chat.tokenizer
    rejects = Rejects()
    tables = prepare_tables(stage, chat, run.cache, rejects=rejects)
    truncation = _find_truncation(stage, tokenizer)
    loaded = ranks.first(lambda: load_policy(stage, run_dir=run.path, tokenizer=tokenizer))
    loaded.model.generation_config.eos_token_id = chat.stop_ids
    config = _build_config(stage, run.checkpoints, num_prompts=len(tables.train))
    device = str(config.device)
    if not loaded.precision.quantized:
        loaded.model.to(device)
    roles = build_roles(stage, loaded)
    held = _hold_reward(stage, roles, options.reward)
    critic = _build_critic(stage, roles, loaded) if options.advantage == "gae" else None
    rewards = build_rewards(stage, options.reward, chat=chat, device=device, held=held)
    gold = None
    if options.gold is not None:
        gold = build_rewards(stage, options.gold, chat=chat, key="gold", device=device)
    ptx, ptx_data = _build_ptx(stage, chat, run, tokenizer.pad_token_id)
    collector = Collector(
        options=options,
        chat=chat,
        prompts=tables.train,
        roles=roles,
        critic=critic,
        rewards=rewards,
        gold=gold,
        sampling=Sampling(options.temperature, options.min_new_tokens or 0, tuple(chat.stop_ids)),
        truncation=truncation,
        num_answers=options.batch_size * options.minibatches,
        micro_batch_size=config.per_device_train_batch_size,
        seed=stage.seed,
        name=stage.name,
    )
    trainer = Ppo(
        model=loaded.model,
        args=config,
        train_dataset=tables.train,
        eval_dataset=None,  # rollouts are the evaluation; held-out prompts are answered once, at the end
        processing_class=tokenizer,
        watch=watch_for(stage),
        options=options,
        collector=collector,
        roles=roles,
        critic=critic,
        ptx=ptx,
    )
    heads, models = heads_and_models(roles, critic)
    models += [
        (role, module) for role, held in (("reward", rewards), ("gold", gold)) if held for module in held.modules
    ]
    parts = list_parts(roles, heads, models)
    _say_parts(stage, parts)

    def finish(model_dir: Path) -> dict[str, float]:
        if critic is not None:
            critic.save(model_dir / "critic", tokenizer)
        metrics = ranks.once(lambda: _last_metrics(run))
        if tables.eval is not None:
            metrics |= answer_held_out(collector, trainer.model, tables.eval, step=trainer.state.global_step)
        return metrics

    return Built(
        trainer,
        tables,
        chat,
        loaded,
        rejects,
        finish=finish,
        score_answers=collector.score_answers,
        ptx_data=ptx_data,
        record={"roles": [{"what": part.what, "roles": part.roles, "bytes": part.num_bytes} for part in parts]},
    )


def _build_config(stage: Stage, checkpoints: Path, *, num_prompts: int) -> GRPOConfig:
    """Return GRPO's config with the fields PPO decides; the length of the run is counted in whole rollouts."""
    options = stage.expect(PpoOptions)
    repeats = options.answers_per_prompt
    answers = options.batch_size * options.minibatches
    if answers % repeats:
        raise RecipeError(
            f"{stage.name}: a rollout has batch_size x minibatches = {answers} answers, which {repeats} answers per "
            "prompt do not divide; change batch_size or num_generations",
            where=stage.where(f"{stage.name}.batch_size"),
        )
    steps = options.ppo_epochs * options.minibatches
    micro = micro_batch_size(stage)
    accumulate = options.batch_size // world_size() // micro
    config = build_config(
        stage,
        GRPOConfig,
        checkpoints,
        max_steps=steps * _count_rollouts(stage, num_prompts, answers, steps),
        # GRPO wants groups of two and batches that hold whole ones; we group by ourselves.
        num_generations=2,
        num_generations_eval=1,
        steps_per_generation=2 * accumulate,
        beta=0.0,
        disable_dropout=True,
        max_completion_length=options.max_new_tokens,
        temperature=options.temperature,
        generation_kwargs=_generation_arguments(options),
        **_vllm_arguments(options),
    )
    config.num_generations = repeats
    return config


def _count_rollouts(stage: Stage, num_prompts: int, answers: int, steps: int) -> int:
    """Return the rollouts of the run: from total_episodes, max_steps or num_train_epochs, rounded up."""
    options = stage.expect(PpoOptions)
    max_steps = int(stage.trainer.get("max_steps", -1))
    if options.total_episodes is not None:
        return -(-options.total_episodes // answers)
    if max_steps > 0:
        rollouts = -(-max_steps // steps)
        if rollouts * steps != max_steps:
            console.note(
                f"{stage.name}: {rollouts * steps} steps instead of {max_steps}: a rollout takes {steps} steps "
                "(ppo_epochs x minibatches)"
            )
        return rollouts
    epochs = float(stage.trainer.get("num_train_epochs", 1.0))
    return max(1, round(epochs * num_prompts * options.answers_per_prompt / answers))


def _generation_arguments(options: PpoOptions) -> dict[str, Any] | None:
    if options.generation.engine == "vllm":
        return {"min_tokens": options.min_new_tokens} if options.min_new_tokens else None
    extra = {"min_new_tokens": options.min_new_tokens} if options.min_new_tokens else {}
    return {"use_cache": True, **extra}


def _vllm_arguments(options: PpoOptions) -> dict[str, Any]:
    generation = options.generation
    if generation.engine != "vllm":
        return {}
    server = {"vllm_server_base_url": generation.url} if generation.mode == "server" else {}
    return {
        "use_vllm": True,
        "vllm_mode": generation.mode,
        "vllm_gpu_memory_utilization": generation.gpu_memory_utilization,
        # We compute log-probabilities with the model that trains: there is nothing to correct.
        "vllm_importance_sampling_correction": False,
        **server,
    }


def _find_truncation(stage: Stage, tokenizer: Any) -> Truncation | None:
    options = stage.expect(PpoOptions)
    if options.truncate is None:
        return None
    ids = tokenizer(options.truncate.token, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise RecipeError(
            f"{stage.name}.truncate.token {options.truncate.token!r} is {len(ids)} tokens of this tokenizer, not one",
            where=stage.where(f"{stage.name}.truncate.token"),
        )
    return Truncation(ids[0], options.truncate.after)


def _hold_reward(stage: Stage, roles: Roles, sources: Sequence[RewardSource]) -> dict[int, tuple[Classifier, ScoreIds]]:
    """Put the first reward model that lies on the policy's own base there; say by which source it is meant."""
    for number, source in enumerate(sources):
        directory = source.model and find_reward_on_base(roles, source.model, trust_code=stage.trust_code)
        if directory:
            roles.add_reward(directory)
            classifier = hold_on_base(directory, roles.policy, trust_code=stage.trust_code)
            pad_id, size = classifier.tokenizer.pad_token_id, micro_batch_size(stage)
            return {number: (classifier, partial(roles.score_ids, pad_id=pad_id, batch_size=size))}
    return {}


def _build_critic(stage: Stage, roles: Roles, loaded: Loaded) -> Critic:
    """Build the critic that value_init asks for; omitted: from the reward where that is one model that can be one."""
    options = stage.expect(PpoOptions)
    where = stage.where(f"{stage.name}.value_init")
    only = options.reward[0].model if len(options.reward) == 1 else None
    directory = find_model_dir(only) if only and not is_builtin(only) else None
    if options.critic_start != "reward":
        own = options.critic_start == "policy" and stage.lora is None
        return critic_from_policy(roles) if own else critic_on_policy(roles)
    if directory is None:
        raise RecipeError(
            f"{stage.name}.value_init: reward needs one reward model on disk as the reward; use value_init: policy",
            where=where,
        )
    if roles.reward_head is None and stage.lora is not None:
        if options.value_init is None:
            console.note(f"{stage.name}: the reward model has another base, so the critic is a zero head on the policy")
            return critic_on_policy(roles)
        raise RecipeError(
            f"{stage.name}.value_init: reward needs a reward model that is an adapter on the policy's base, or a stage "
            "without lora:; use value_init: policy",
            where=where,
        )
    critic = (
        critic_on_base(roles)
        if roles.reward_head is not None
        else critic_from_reward(roles, directory, where=where, trust_code=stage.trust_code)
    )
    gain, bias = read_norm(str(directory))
    critic.rescale(options.reward[0].weight * gain, options.reward[0].weight * bias)
    return critic


def _build_ptx(stage: Stage, chat: Chat, run: RunDir, pad_id: int) -> tuple[Ptx | None, str | None]:
    """Return the pre-training text and the fingerprint of its rows."""
    options = stage.expect(PpoOptions)
    if options.ptx is None:
        return None, None
    block = min(_LONGEST_PTX_BLOCK, context_length(stage) or _LONGEST_PTX_BLOCK)
    as_sft = replace(
        stage,
        options=SftOptions(data=options.ptx.data, objective="lm"),
        trainer={**stage.trainer, "max_length": block},
    )
    tables: Tables = prepare_tables(as_sft, chat, run.cache / "ptx", rejects=Rejects())
    size = options.ptx.batch_size or options.batch_size
    return Ptx(tables.train, options.ptx.coef, size, stage.seed, pad_id), tables.report.fingerprint


def _say_parts(stage: Stage, parts: Sequence[Part]) -> None:
    said = "; ".join(f"{part.what} {describe_bytes(part.num_bytes)} ({', '.join(part.roles)})" for part in parts)
    console.note(f"{stage.name}: holds {said}")


def _last_metrics(run: RunDir) -> dict[str, float]:
    from alignkit.runs.record import JsonLines

    rows = [row for row in JsonLines(run.metrics).read() if "objective/kl" in row]
    kept = ("reward", "gold", "objective/kl", "entropy", "response_length")
    return {name: rows[-1][name] for name in kept if name in rows[-1]} if rows else {}


def run(stage: Stage, run_dir: Path, *, allow_change: tuple[str, ...] = ()) -> Result:
    """Train the stage in its run directory, going on where an earlier sitting stopped."""
    return fit(stage, run_dir, build, allow_change=allow_change)
