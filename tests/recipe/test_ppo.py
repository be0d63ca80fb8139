"""What a ppo stage may say: rewards in every shape, options without effect, and the names other tools use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.recipe import Recipe, load_recipe, resolve
from alignkit.recipe.methods import PRESETS, PpoOptions

Load = Callable[..., Recipe]
Complain = Callable[..., list[str]]

HEAD = (
    "model: {path: builtin:tiny-gpt2}\n"
    "sft: {data: builtin:instructions}\n"
    "rm: {start_from: sft, data: builtin:preferences}\n"
)


def ppo(text: str, *, reward: str = "rm") -> str:
    """A recipe whose ppo stage is on line 4."""
    return f"{HEAD}ppo: {{start_from: sft, data: builtin:prompts, reward: {reward}, {text}}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_horizon: 9", "ppo.kl_horizon has no effect without kl_target, which makes kl_coef adaptive"),
        ("kl_target: 6, kl_coef: 0", "ppo.kl_coef is 0, which kl_target cannot change, for it multiplies; start above "
         "0 (typical: 0.05)"),
        ("kl_target: 6, max_kl: 6", "ppo.max_kl is 6, so the run would stop before it reaches kl_target 6; raise it"),
        ("advantage: rloo, lam: 0.9", "ppo.lam has no effect with advantage: rloo, which has no critic; use "
         "advantage: gae"),
        ("advantage: grpo, vf_coef: 1", "ppo.vf_coef has no effect with advantage: grpo, which has no critic; use "
         "advantage: gae"),
        ("advantage: reinforce, gamma: 0.9", "ppo.gamma has no effect with advantage: reinforce, which has no critic; "
         "use advantage: gae"),
        ("advantage: rloo, value_init: reward", "ppo.value_init has no effect with advantage: rloo, which has no "
         "critic; use advantage: gae"),
        ("advantage: rloo, critic_learning_rate: 1e-5", "ppo.critic_learning_rate has no effect with advantage: rloo, "
         "which has no critic; use advantage: gae"),
        ("advantage: rloo, whiten_rewards: true", "ppo.whiten_rewards has no effect with advantage: rloo, which "
         "compares whole answers; use gae"),
        ("advantage: grpo, whiten_advantages: true", "ppo.whiten_advantages has no effect with advantage: grpo, which "
         "has a baseline and scale of its own"),
        ("num_generations: 4", "ppo.num_generations has no effect with advantage: gae, which takes one answer per "
         "prompt"),
        ("advantage: rloo, num_generations: 3", "ppo.num_generations is 3: a rollout of 16 answers does not divide "
         "into groups of 3; make batch_size x minibatches a multiple of num_generations"),
        ("advantage: rloo, batch_size: 6", "ppo.batch_size is 6: a rollout of 6 answers does not divide into groups of "
         "4; make batch_size x minibatches a multiple of num_generations"),
        ("ppo_epochs: 1, cliprange: 0.3", "ppo.cliprange has no effect with one step per rollout: nothing has moved "
         "yet; raise ppo_epochs or minibatches"),
        ("min_new_tokens: 65", "ppo.min_new_tokens is 65, more than max_new_tokens (64)"),
        ("missing_eos: {}", "ppo.missing_eos needs exactly one of penalty (subtracted) and score (instead)"),
        ("missing_eos: {penalty: 1, score: -1}", "ppo.missing_eos needs exactly one of penalty (subtracted) and score "
         "(instead)"),
        ("missing_eos: {penalty: 1}, min_new_tokens: 64", "ppo.missing_eos would hit every answer: with min_new_tokens "
         "= max_new_tokens none can end"),
        ("truncate: {token: '.', after: 64}", "ppo.truncate has no effect: after is 64, and an answer has at most 64 "
         "tokens (max_new_tokens)"),
        ("reward_normalize_rows: 9", "ppo.reward_normalize_rows has no effect without reward_normalize: bias or "
         "gain_and_bias"),
        ("reward_timeout: 9", "ppo.reward_timeout has no effect without a reward function"),
        ("total_episodes: 9, max_steps: 3", "ppo.max_steps has no effect with total_episodes; take one of them out"),
        ("total_episodes: 9, num_train_epochs: 3", "ppo.num_train_epochs has no effect with total_episodes; take one "
         "of them out"),
        ("generation: {mode: server}", "ppo.generation.mode has no effect without engine: vllm"),
        ("generation: {engine: vllm, mode: server}", "ppo.generation has mode: server without url; start `trl "
         "vllm-serve` and give its address"),
        ("generation: {engine: vllm, url: 'http://a:1'}", "ppo.generation.url has no effect with mode: colocate; use "
         "mode: server"),
        ("generation: {engine: vllm, mode: server, url: 'a:1'}", "ppo.generation.url is 'a:1'; it must start with "
         "http:// or https://"),
        ("batching: grouped", "ppo.batching has no effect in ppo: a rollout draws its prompts at random, and pads "
         "once"),
        ("save_strategy: epoch", "ppo.save_strategy is epoch; PPO counts in steps, of which a rollout takes ppo_epochs "
         "x minibatches"),
        ("ptx: {data: builtin:reviews}", "ppo.ptx.coef is missing; weight of its loss beside PPO's (InstructGPT eq. 2: "
         "gamma, 27.8)"),
        ("ptx: {coef: 1}", "ppo.ptx.data is missing; raw text of the pre-training distribution"),
        ("ema: 1", "ppo.ema is 1; it must be greater than 0 and less than 1"),
        ("beta: 0.1",
         "ppo.beta cannot be set: set kl_coef, the factor of the KL (kl_in: reward or loss); write kl_coef: 0.1"),
        ("epsilon: 0.1", "ppo.epsilon cannot be set: set cliprange; write cliprange: 0.1"),
        ("num_iterations: 2", "ppo.num_iterations cannot be set: set ppo_epochs; write ppo_epochs: 2"),
        ("min_p: 0.9", "ppo.min_p cannot be set: PPO samples from the policy itself, or the ratios and the KL would be "
         "of something else; set temperature, top_p or top_k"),
        ("epsilon_high: 0.3", "ppo.epsilon_high cannot be set: set cliprange_high; write cliprange_high: 0.3"),
        ("cliprange_high: 0.3, ppo_epochs: 1", "ppo.cliprange_high has no effect with one step per rollout: nothing "
         "has moved yet; raise ppo_epochs or minibatches"),
        ("importance: sequence", "ppo.importance is sequence, one ratio for a whole answer, and advantage: gae has one "
         "advantage per token; use grpo, rloo or reinforce"),
        ("dynamic_sampling: 3", "ppo.dynamic_sampling has no effect with advantage: gae, which has no groups"),
        ("advantage: rloo, scale_rewards: none", "ppo.scale_rewards has no effect without advantage: grpo"),
        ("overlong: {}", "ppo.overlong needs buffer (a lower reward near max_new_tokens) or filter: true"),
        ("overlong: {filter: true, penalty: 2}", "ppo.overlong.penalty has no effect without buffer"),
        ("kl_coef: 0, kl_in: loss", "ppo.kl_in has no effect with kl_coef: 0"),
        ("stop: x, truncate: {token: y}", "ppo.stop has no effect with truncate, after whose token nothing counts"),
        ("generation: {importance_cap: 3}", "ppo.generation.importance_cap has no effect without engine: vllm"),
        ("preset: gppo", "ppo.preset is gppo; it must be one of ppo, grpo, dapo, drgrpo, gspo, rloo; did you mean "
         "grpo?"),
        ("preset: dapo, kl_target: 3", "ppo.kl_coef is 0, which kl_target cannot change, for it multiplies; start "
         "above 0 (typical: 0.05)"),
        ("preset: grpo, advantage: gae, num_generations: 8", "ppo.num_generations has no effect with advantage: gae, "
         "which takes one answer per prompt"),
        ("max_completion_length: 9",
         "ppo.max_completion_length cannot be set: set max_new_tokens; write max_new_tokens: 9"),
        ("use_vllm: true", "ppo.use_vllm cannot be set: set generation: {engine: vllm, mode: colocate or server, url, "
         "gpu_memory_utilization}; write generation: {engine: vllm}"),
        ("num_ppo_epochs: 4", "ppo.num_ppo_epochs is not a key of a stage: it is ppo_epochs; write ppo_epochs: 4"),
        ("kl_estimator: k3", "ppo.kl_estimator is not a key of a stage: it is kl_in: reward (k1, as in Ziegler 2019) "
         "or loss (k3); write kl_in: loss"),
        ("response_length: 53",
         "ppo.response_length is not a key of a stage: it is max_new_tokens; write max_new_tokens: 53"),
        ("init_kl_coef: 0.2",
         "ppo.init_kl_coef is not a key of a stage: it is kl_coef, where an adaptive one starts; write kl_coef: 0.2"),
        ("target: 6", "ppo.target is not a key of a stage: it is kl_target, in nats per sequence; write kl_target: 6"),
        ("max_length: 9", "ppo.max_length is not a key of a stage: an answer has at most max_new_tokens, and a prompt "
         "what they leave of the context"),
        ("lambd: 0.9", "ppo.lambd is not a key of a stage: it is lam; write lam: 0.9"),
        ("kl_coeff: 0.9", "ppo.kl_coeff is not a key of a stage: it is kl_coef; write kl_coef: 0.9"),
    ],
)  # fmt: skip
def test_options_that_cannot_mean_anything(complain: Complain, text: str, message: str) -> None:
    assert complain(ppo(text))[0] == f"a.yaml:4: {message}"


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("sft", "ppo.reward is sft, which is not an rm stage; name one"),
        ("rmm", "ppo.reward is rmm, which is neither a stage nor a path that exists; did you mean rm?"),
        ("'my.mod:score'", "ppo.reward is \"my.mod:score\", which is neither a stage nor a path that exists; a "
         "function is written {function: my.mod:score}"),
        ("gpt2", "ppo.reward is gpt2, which is neither a stage nor a path that exists; it must be an rm stage, a run, "
         "a directory, a hub id (owner/name) or {function: pkg.module:name}"),
        ("builtin:other", "ppo.reward is builtin:other, a builtin reward that is not there; the only one is "
         "builtin:true-reward"),
        ("{weight: 2}", "ppo.reward needs exactly one of model, function, judge and verify for each part, and has "
         "none"),
        ("{model: rm, function: 'a:b'}", "ppo.reward needs exactly one of model, function, judge and verify for each "
         "part, and has model rm and function a:b"),
        ("{model: rm, timeout: 3}", "ppo.reward.timeout has no effect without verify"),
        ("{verify: maths}", "ppo.reward.verify is maths; it must be one of math, exact, regex, json_schema, ifeval, "
         "code; did you mean math?"),
        ("{function: a.b}", "ppo.reward names the function 'a.b'; write pkg.module:name"),
        ("[rm, {model: rm, weight: 0}]", "ppo.reward gives model rm the weight 0, which has no effect; take it out, or "
         "make it gold"),
        ("[]", "ppo.reward is an empty list; give at least one entry"),
        ("5", "ppo.reward is 5; it must be text or a mapping or a list"),
        ("{modle: rm}", "ppo.reward.modle is not a key of ppo.reward; did you mean model?"),
    ],
)  # fmt: skip
def test_rewards_that_cannot_be(complain: Complain, reward: str, message: str) -> None:
    assert complain(ppo("seed: 1", reward=reward).replace(", seed: 1", ""))[0] == f"a.yaml:4: {message}"


def test_gold_is_checked_like_the_reward(complain: Complain) -> None:
    assert complain(ppo("gold: sft"))[0] == "a.yaml:4: ppo.gold is sft, which is not an rm stage; name one"


def test_the_reward_is_needed(complain: Complain) -> None:
    text = f"{HEAD}ppo: {{start_from: sft, data: builtin:prompts}}\n"
    assert complain(text) == [
        "a.yaml:4: ppo.reward is missing; what scores an answer: an rm stage, a classifier, {function: ...}, or a list "
        "that is summed"
    ]


def test_a_critic_cannot_start_from_a_sum(complain: Complain) -> None:
    message = "a.yaml:4: ppo.value_init is reward, but the reward is not one model; use value_init: policy"
    for reward in ("[rm, builtin:true-reward]", "builtin:true-reward", "{function: 'a:b'}"):
        assert complain(ppo("value_init: reward", reward=reward)) == [message]


def options_of(load: Load, text: str, reward: str = "rm") -> PpoOptions:
    options = resolve(load(ppo(text, reward=reward)), "ppo").options
    assert isinstance(options, PpoOptions)
    return options


def test_a_stage_becomes_its_directory(load: Load, directory: Path) -> None:
    (directory / "run" / "model").mkdir(parents=True)
    (directory / "run" / "stage.json").touch()
    stage = resolve(load(ppo("gold: builtin:true-reward", reward="[rm, ./run, {model: a/b, weight: 0.5}]")), "ppo")
    assert isinstance(stage.options, PpoOptions)
    found = [(source.model, source.weight) for source in stage.options.reward]
    assert found == [("runs/a/rm/model", 1.0), (str(directory / "run" / "model"), 1.0), ("a/b", 0.5)]
    assert stage.reward_stages == {"runs/a/rm/model": "rm"}
    assert [source.model for source in stage.options.gold or ()] == ["builtin:true-reward"]
    assert stage.where("ppo.reward.0") == "a.yaml:4"
    assert stage.fingerprint_values()["ppo.reward"][0]["model"] == "runs/a/rm/model"
    assert "ppo.gold" not in stage.fingerprint_values()


def test_defaults_follow_the_papers(load: Load) -> None:
    stage = resolve(load(ppo("max_steps: 4")), "ppo")
    assert stage.trainer["learning_rate"] == 1e-6 and stage.trainer["adam_epsilon"] == 1e-5
    assert "max_length" not in stage.trainer and "eval_strategy" not in stage.trainer
    lora = resolve(load(ppo("max_steps: 4") + "lora: {}\n"), "ppo")
    assert lora.trainer["learning_rate"] == 1e-5


def test_answers_per_prompt_and_the_critics_start(load: Load) -> None:
    assert options_of(load, "max_steps: 1").answers_per_prompt == 1
    assert options_of(load, "advantage: rloo").answers_per_prompt == 4
    assert options_of(load, "advantage: grpo, num_generations: 8").answers_per_prompt == 8
    assert options_of(load, "max_steps: 1").critic_start == "reward"
    assert options_of(load, "value_init: policy").critic_start == "policy"
    assert options_of(load, "max_steps: 1", reward="[rm, rm]").critic_start == "policy"
    assert options_of(load, "max_steps: 1", reward="builtin:true-reward").critic_start == "policy"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_what_the_stage_does_not_say(load: Load, preset: str) -> None:
    stage = resolve(load(ppo(f"preset: {preset}, kl_coef: 0.5, kl_in: reward, overlong: {{filter: true}}")), "ppo")
    found = stage.options.model_dump()
    overlong = {"buffer": None, "penalty": 1.0, "filter": True} | PRESETS[preset].get("overlong", {})
    wanted = PRESETS[preset] | {"kl_coef": 0.5, "kl_in": "reward", "overlong": overlong}
    assert {key: found[key] for key in wanted} == wanted
    assert stage.where("ppo.advantage") == "a.yaml:4"  # where the preset is named


def test_a_target_alone_is_fine(load: Load) -> None:
    assert options_of(load, "kl_target: 6").kl_target == 6


def test_a_path_of_ptx_is_found_beside_the_recipe(load: Load, directory: Path) -> None:
    (directory / "text.txt").write_text("a\n")
    ptx = options_of(load, "ptx: {data: text.txt, coef: 1}").ptx
    assert ptx is not None and ptx.data[0].path == str(directory / "text.txt")


def test_averages_of_weights_are_refused_where_no_process_has_them(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: t\nmodel: {path: builtin:tiny-llama}\nlaunch: {strategy: zero3, processes: 2}\n"
        "ppo: {data: builtin:prompts, reward: builtin:true-reward, ema: 0.9}\n"
    )
    with pytest.raises(RecipeError, match=r"r.yaml:4: ppo.ema is 0.9, but zero3 holds no whole weights to average"):
        resolve(load_recipe(path), "ppo")
