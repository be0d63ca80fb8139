"""PPO as a stage: policy, reference, rewards and critic put together, and what is saved beside the policy."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import GRPOConfig

from alignkit import console
from alignkit.data import Rejects
from alignkit.errors import RecipeError
from alignkit.models.adapters import REFERENCE, START, TRAINED
from alignkit.models.frozen import load_classifier
from alignkit.models.logprobs import Sampling
from alignkit.models.parameters import describe_parameters
from alignkit.models.start import context_length
from alignkit.recipe import Stage
from alignkit.recipe.methods import PpoOptions, SftOptions
from alignkit.runs.directory import RunDir
from alignkit.runs.files import describe_bytes
from alignkit.runs.record import JsonLines
from alignkit.train import ranks
from alignkit.train.fit import fit
from alignkit.train.ppo.answers import build_rewards
from alignkit.train.ppo.roles import CRITIC, REWARD, Critic, Roles, build_critic, hold_reward
from alignkit.train.ppo.rollout import Collector
from alignkit.train.ppo.trainer import Ppo
from alignkit.train.setup import Setup, build_config, micro_batch_size, open_rows
from alignkit.train.tables import share_tables


def build(stage: Stage, run: RunDir) -> Setup:
    """Load the four roles and the prompts and make a trainer that has not trained yet."""
    options = stage.expect(PpoOptions)
    setup = open_rows(stage, run)
    chat, tables = setup.chat, setup.tables
    truncation = None
    if options.truncate is not None:
        ids = chat.tokenizer(options.truncate.token, add_special_tokens=False).input_ids
        if len(ids) != 1:
            key = f"{stage.name}.truncate.token"
            what = f"{key} {options.truncate.token!r} is {len(ids)} tokens of this tokenizer, not one"
            raise RecipeError(what, where=stage.where(key))
        truncation = ids[0], options.truncate.after
    model = setup.load()
    model.generation_config.eos_token_id = chat.stop_ids
    config = _build_config(stage, run.checkpoints, num_prompts=len(tables.train))
    unset_hf_deepspeed_config()  # for ZeRO-3 transformers would split the other roles as it loads them
    device = str(config.device)
    if not setup.loaded.precision.quantized and not ranks.uses_fsdp():  # which moves a layer at a time, to shard it
        model.to(device)
    roles = Roles(setup.loaded, reference=setup.reference(config))
    held: dict[int, Any] = {}  # the first reward model that lies on the policy's own base is put there
    for number, source in enumerate(options.reward):
        if directory := not held and source.model and hold_reward(roles, source.model, trust_code=stage.trust_code):
            classifier = load_classifier(str(directory), on_base=roles.policy, trust_code=stage.trust_code)
            pad_id, size = classifier.tokenizer.pad_token_id, micro_batch_size(stage)
            held[number] = classifier, partial(roles.score_ids, pad_id=pad_id, batch_size=size)
    critic = build_critic(stage, roles) if options.advantage == "gae" else None
    rewards = build_rewards(stage, options.reward, chat=chat, device=device, held=held)
    gold = build_rewards(stage, options.gold, chat=chat, key="gold", device=device) if options.gold else None
    collector = Collector(
        options=options, chat=chat, prompts=tables.train, roles=roles, critic=critic, rewards=rewards, gold=gold,
        sampling=Sampling(
            options.temperature, options.min_new_tokens or 0, tuple(chat.stop_ids), options.top_p, options.top_k),
        truncation=truncation, num_answers=options.batch_size * options.minibatches,
        micro_batch_size=config.per_device_train_batch_size, seed=stage.seed, name=stage.name,
    )  # fmt: skip
    arguments = setup.arguments(config)
    arguments["eval_dataset"] = None  # rollouts are the evaluation; held-out prompts are answered once, at the end
    own: dict[str, Any] = {"options": options, "collector": collector, "roles": roles, "critic": critic}
    if options.ptx is not None:
        block = min(1024, context_length(stage) or 1024)  # tokens, as of an sft stage with objective: lm
        text = SftOptions(data=options.ptx.data, objective="lm")
        as_sft = replace(stage, options=text, trainer={**stage.trainer, "max_length": block})
        mixed = share_tables(as_sft, chat, run.cache / "ptx", rejects=Rejects())
        setup.ptx_data, own["ptx"] = mixed.report.fingerprint, mixed.train
    setup.trainer = trainer = Ppo(**arguments, **own)
    parts = _list_parts(roles, critic, {REWARD: rewards.modules, "gold": gold.modules if gold else []})
    told = "; ".join(f"{part['what']} {describe_bytes(part['bytes'])} ({', '.join(part['roles'])})" for part in parts)
    console.note(f"{stage.name}: holds {told}")
    setup.record["roles"] = parts
    setup.score_answers = collector.score_answers

    def finish(model_dir: Path) -> dict[str, float]:
        if critic is not None:
            critic.save(model_dir / "critic", chat.tokenizer)
        rows = [row for row in ranks.once(lambda: JsonLines(run.metrics).read()) if "objective/kl" in row]
        kept = ("reward", "gold", "objective/kl", "entropy", "response_length")
        metrics = {name: row[name] for row in rows[-1:] for name in kept if name in row}
        if tables.eval is not None:
            metrics |= trainer.answer_held_out(tables.eval)
        return metrics

    setup.finish = finish
    return setup


def _build_config(stage: Stage, checkpoints: Path, *, num_prompts: int) -> GRPOConfig:
    """Fill GRPO's config; the length of the run is counted in whole rollouts."""
    options, generation = stage.expect(PpoOptions), stage.expect(PpoOptions).generation
    repeats = options.answers_per_prompt
    answers = options.batch_size * options.minibatches
    if answers % repeats:
        what = f"{stage.name}: a rollout has batch_size x minibatches = {answers} answers, which {repeats} answers per "
        what += "prompt do not divide; change batch_size or num_generations"
        raise RecipeError(what, where=stage.where(f"{stage.name}.batch_size"))
    steps, max_steps = options.ppo_epochs * options.minibatches, int(stage.trainer.get("max_steps", -1))
    if options.total_episodes is not None:
        rollouts = -(-options.total_episodes // answers)
    elif max_steps > 0:
        rollouts = -(-max_steps // steps)
        if rollouts * steps != max_steps:
            why = f"a rollout takes {steps} steps (ppo_epochs x minibatches)"
            console.note(f"{stage.name}: {rollouts * steps} steps instead of {max_steps}: {why}")
    else:
        rollouts = max(1, round(float(stage.trainer.get("num_train_epochs", 1.0)) * num_prompts * repeats / answers))
    sampling: dict[str, Any] = {}
    if generation.engine == "vllm":
        ends: dict[str, Any] = {"min_tokens": options.min_new_tokens} if options.min_new_tokens else {}
        if options.stop:
            ends |= {"stop": list(options.stop), "include_stop_str_in_output": True}
        sampling = {
            "use_vllm": True, "vllm_mode": generation.mode, "vllm_server_base_url": generation.url,
            "vllm_gpu_memory_utilization": generation.gpu_memory_utilization,
            # We weigh tokens ourselves; with it TRL asks a server whether its log-probabilities are those it drew by.
            "vllm_importance_sampling_correction": generation.importance_cap is not None,
            "generation_kwargs": ends or None,
        }  # fmt: skip
    config = build_config(
        stage, GRPOConfig, checkpoints, max_steps=steps * rollouts,
        # GRPO wants groups of two and batches that hold whole ones; we group by ourselves.
        num_generations=2, num_generations_eval=1,
        steps_per_generation=2 * (options.batch_size // ranks.world_size() // micro_batch_size(stage)),
        beta=0.0, disable_dropout=True, max_completion_length=options.max_new_tokens, temperature=options.temperature,
        top_p=options.top_p, top_k=options.top_k, **sampling,
    )  # fmt: skip
    config.num_generations = repeats
    return config


def _list_parts(roles: Roles, critic: Critic | None, rewards: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """List what is held in memory for the four roles: the bases, then adapters, heads and models of their own."""

    def part(what: str, role: list[str], module: Any) -> dict[str, Any]:
        return {"what": what, "roles": tuple(role), "bytes": int(describe_parameters(module)["bytes"])}

    policy = roles.policy
    heads = [part("head", [REWARD], roles.reward_head)] if roles.reward_head is not None else []
    models = [part("model", [role], model) for role, loaded in rewards.items() for model in loaded]
    if critic is not None and critic.model is not None:
        models.insert(0, part("model", [CRITIC], critic.model))
    elif critic is not None:
        heads.append(part("head", [CRITIC], critic.head))
    if not isinstance(policy, PeftModel):
        reference = [part("model", ["reference"], roles.reference)] if roles.reference is not None else []
        return [part("model", ["policy"], policy), *reference, *heads, *models]
    role_of = {TRAINED: "policy", START: "policy, reference", REFERENCE: "reference"}
    adapters = []
    for name in policy.peft_config:
        own = [p for key, p in policy.named_parameters() if f".{name}" in key and "lora_" in key]
        size = sum(p.numel() * p.element_size() for p in own)
        adapters.append({"what": "adapter", "roles": (role_of.get(name, name),), "bytes": size})
    shared = ["policy", "reference"] + [REWARD] * (REWARD in policy.peft_config)
    base = part("base", shared + [CRITIC] * (critic is not None and critic.model is None), policy)
    base["bytes"] -= sum(adapter["bytes"] for adapter in adapters)
    return [base, *adapters, *heads, *models]


run = partial(fit, build)
