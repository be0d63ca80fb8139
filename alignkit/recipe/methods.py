"""Keys of the stages: what each method takes beside the fields of TRL's config class; the JSON Schema of all keys."""

import copy
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from alignkit.recipe.schema import (
    BUILTIN_REWARD,
    Count,
    Feedback,
    Options,
    Positive,
    RecipeOptions,
    Rewards,
    RoundOptions,
    SampleOptions,
    Share,
    Sources,
    Teacher,
    Temperature,
    Text,
    TextList,
    Texts,
    TopK,
    TopP,
    option,
)  # fmt: skip
from alignkit.recipe.words import TABLES, Fragment, method_fields

Method = Literal["sft", "rm", "dpo", "ppo", "critique", "label"]
FEEDBACK = ("critique", "label")  # these make rows; they train nothing
RLAIF = "rlaif"  # one section that stands for several stages
STEPS = ("critique", "sft", "label", "dpo", "rm", "ppo")
ROOMS = {"critique": "feedback", "label": "rewards"}  # where their code is; that of all others is in train


def _require_sign(value: str) -> str:
    """Write a metric of held-out rows as +NAME (higher is better) or -NAME (lower)."""
    name = value.strip("+- ").removeprefix("eval_")
    better = {"-": r"loss|perplexity", "+": r"accurac|margin|true_reward|win_rate"}
    signs = [value[0]] if value[:1] in better else [sign for sign in better if re.search(better[sign], name)]
    if not name or len(signs) != 1:
        raise PydanticCustomError("sign", "does not say what is better")
    return signs[0] + name


# fmt: off


class MissingEos(Options):
    """What an answer without an end gets; exactly one of the two."""

    penalty: Positive | None = option(None, "Subtracted from its reward.")
    score: float | None = option(None, "Replaces its reward.")


class Truncate(Options):
    token: Text = option(..., "The text whose token ends an answer for the reward, such as a full stop.")
    after: int = option(16, "Tokens of an answer before the first one that can end it (Ziegler 2019: 16).", ge=0)


class Overlong(Options):
    """Answers that come near max_new_tokens or are cut off there (DAPO, arXiv 2503.14476, section 3.4)."""

    buffer: Positive | None = option(None)
    penalty: Positive = option(1.0, "What an answer of max_new_tokens loses with `buffer`.")
    filter: bool = option(False, "Learn nothing from answers that were cut off.")


class Ptx(Options):
    data: Sources = option(..., "Raw text of the pre-training distribution.")
    coef: Positive = option(..., "Weight of its loss beside PPO's (InstructGPT eq. 2: gamma, 27.8).")
    batch_size: Count | None = option(None, "Blocks of text per optimizer step; omitted: batch_size.")


class GenerationOptions(Options):
    engine: Literal["transformers", "continuous", "vllm"] = option("transformers", "What samples the answers.")
    batch_size: int = option(64, ge=1)
    mode: Literal["colocate", "server"] = option("colocate")
    url: Text | None = option(None, "Address of the vLLM server, such as http://127.0.0.1:8000.")
    gpu_memory_utilization: float = option(0.3, "Share of a device's memory for a colocated vLLM.", gt=0, lt=1)
    importance_cap: Positive | None = option(2.0)


class StageOptions(Options):
    """Keys that every method shares."""

    method: Method = option(...)
    start_from: Text | None = option(None)
    data: Sources = option(...)
    on_bad_row: Literal["error", "skip"] = option("error")
    dedupe: bool = option(False, "Leave out rows that repeat an earlier row exactly.")
    chat: Literal["auto"] | bool = option("auto", "For all sources that do not say it: turns or text.")


class TrainOptions(StageOptions):
    """Keys that every method that trains shares."""

    eval: Share | Sources | None = option(None)
    special_tokens_in_text: Literal["error", "keep", "escape"] = option("error")
    max_truncated: float = option(0.2, ge=0, le=1)
    batch_size: Count = option(16, "Rows per optimizer step over all devices (rm: prompts).")
    micro_batch_size: Count | Literal["auto"] = option("auto")
    batching: Literal["shuffled", "grouped"] = option("grouped")
    adapter: Literal["continue", "merge", "stack"] | None = option(None)
    keep_checkpoints: Count = option(2, "Sealed checkpoints kept, newest first.")
    keep_best: Annotated[str, AfterValidator(_require_sign)] | None = option(None)
    patience: Count | None = option(None, "Stops after so many evaluations in a row without a better keep_best.")
    eval_share: Positive | None = option(0.2)
    evaluate_every: Count | None = option(None)
    push_to: Text | None = option(None)
    push_every: Count | None = option(None, "Pushes the model of the first checkpoint after so many steps, too.")
    samples: SampleOptions = option(SampleOptions, "Prompts answered before, during, after.")


class Objective(NamedTuple):
    """What an sft stage learns: by which kind of model, and from what."""

    model: Literal["causal", "seq2seq", "classifier"]
    learns: str


OBJECTIVES = {name: Objective(*values) for name, values in TABLES["objectives"].items()}
TASKS = tuple(name for name, objective in OBJECTIVES.items() if objective.model == "classifier")
# What a paper calls its method, as values of the keys of a ppo stage; what the stage says itself goes before it.
_presets = json.loads(Path(__file__).with_name("presets.json").read_text("utf-8"))
PRESETS: dict[str, dict[str, Any]] = {name: preset["values"] for name, preset in _presets.items()}


class SftOptions(TrainOptions):
    method: Literal["sft"] = "sft"
    objective: Literal[tuple(OBJECTIVES)] = option(  # type: ignore[valid-type]
        "chat", "; ".join(f"{name}: {objective.learns}" for name, objective in OBJECTIVES.items()) + ".")
    teacher: Teacher | None = option(None, "Whom objective: distill learns from: a stage, a model or {url: ...}.")
    lm_coef: float = option(0.5, ge=0)
    labels: Annotated[list[Text], Field(min_length=2)] | None = option(None)
    streaming: bool = option(False)
    batch_tokens: Count | None = option(None)


class RmOptions(TrainOptions):
    method: Literal["rm"] = "rm"
    loss: Literal["pairwise", "best_of"] = option("pairwise")
    grouping: Literal["kway", "pairs"] = option("kway")
    normalize: Literal["none", "bias", "gain_and_bias"] = option("none")
    normalize_data: Sources | None = option(None)
    normalize_rows: int = option(256, "Reference rows used by normalize.", ge=2)


class DpoOptions(TrainOptions):
    method: Literal["dpo"] = "dpo"


class PpoOptions(TrainOptions):
    method: Literal["ppo"] = "ppo"
    preset: Literal[tuple(PRESETS)] | None = option(None)  # type: ignore[valid-type]
    reward: Rewards = option(...)
    gold: Rewards | None = option(None)
    reward_timeout: Positive = option(60.0, "Seconds that one call of a reward function may take.")
    reward_normalize: Literal["none", "bias", "gain_and_bias"] = option("none")
    reward_normalize_rows: int = option(256, "Answers used by reward_normalize.", ge=2)
    reward_clip: Positive | None = option(None)
    missing_eos: MissingEos | None = option(None)
    overlong: Overlong | None = option(None)
    stop: TextList | None = option(None)
    truncate: Truncate | None = option(None)
    kl_coef: float = option(0.05, ge=0)
    kl_in: Literal["reward", "loss"] = option("reward")
    kl_target: Positive | None = option(None)
    kl_horizon: Count = option(10_000, "Episodes over which kl_coef adapts; smaller is faster.")
    max_kl: Positive | None = option(None)
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = option("gae")
    num_generations: int | None = option(None, "Answers per prompt for rloo and grpo; omitted: 4.", ge=2)
    scale_rewards: Literal["group", "batch", "none"] = option("group")
    dynamic_sampling: Count | None = option(None)
    gamma: float = option(1.0, "Discount of gae, per token.", gt=0, le=1)
    lam: float = option(0.95, "Lambda of gae: 1 trusts returns, 0 the critic.", ge=0, le=1)
    cliprange: Positive = option(0.2, "Clip of the policy's probability ratio.")
    cliprange_high: Positive | None = option(None)
    importance: Literal["token", "sequence"] = option("token")
    loss_normalization: Literal["token", "sequence", "constant"] = option("token")
    cliprange_value: Positive = option(0.2, "Clip of the critic's change in value.")
    vf_coef: Positive = option(0.1, "Factor of the critic's loss.")
    ppo_epochs: Count = option(4, "Passes over the answers of a rollout.")
    minibatches: Count = option(1, "Optimizer steps per pass: a rollout is batch_size x minibatches answers.")
    whiten_rewards: bool = option(False, "Scale the per-token rewards of a rollout to variance 1.")
    whiten_advantages: bool = option(True, "Scale the advantages of a rollout to mean 0 and variance 1.")
    value_init: Literal["reward", "policy", "head"] | None = option(None)
    critic_learning_rate: Positive | None = option(None, "Learning rate of the critic; omitted: learning_rate.")
    temperature: Positive = option(1.0, "Of the policy: in sampling and in its log-probabilities.")
    top_p: float = option(1.0, gt=0, le=1)
    top_k: int = option(0, "Samples from so many of the likeliest tokens, as top_p; 0 from all.", ge=0)
    max_new_tokens: Count = option(64, "Longest answer, in tokens.")
    min_new_tokens: Count | None = option(None, "Shortest answer, in tokens: no end before.")
    total_episodes: Count | None = option(None)
    ema: float | None = option(None, gt=0, lt=1)
    ptx: Ptx | None = option(None, "Mixes the pre-training gradient in (PPO-ptx): {data, coef, batch_size}.")
    generation: GenerationOptions = option(GenerationOptions, "Where answers are sampled.")

    @property
    def answers_per_prompt(self) -> int:
        """How many answers of a rollout belong to one prompt."""
        return (self.num_generations or 4) if self.advantage in ("rloo", "grpo") else 1

    @property
    def critic_start(self) -> Literal["reward", "policy", "head"]:
        """What the critic starts from: as given, else the reward where that is one model with weights."""
        (first, *others) = self.reward
        one_model = not others and first.model is not None and first.model != BUILTIN_REWARD
        return self.value_init or ("reward" if one_model else "policy")


_CONSTITUTION = "Principles: YAML or JSON files, builtin:harmlessness or builtin:helpfulness; several are joined."
_EXAMPLES = "Worked examples put before every request: builtin, none, or files of them."


class Helpful(Options):
    data: Sources = option(..., "Prompts, answered as they are, that keep the model helpful.")
    samples: int = option(2, "Answers to each prompt (the paper: 2).", ge=1, le=64)


class FeedbackOptions(StageOptions):
    """Keys that the methods share that make rows."""

    constitution: Texts | None = option(None, _CONSTITUTION)
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    max_new_tokens: Count = option(256, "Longest sampled text, in tokens.")
    batch_size: Count = option(16, "Texts that a model on this machine reads or writes at a time.")


class CritiqueOptions(FeedbackOptions):
    """Answers, criticised and revised by a constitution: the rows of SL-CAI (arXiv 2212.08073, section 3)."""

    method: Literal["critique"] = "critique"
    data: Sources = option([], "Prompts that tempt the model to answer badly.")
    generator: Feedback | None = option(None, "What answers, criticises and revises; omitted: the model of start_from.")
    rounds: int = option(4, ge=1, le=32)
    critiques: bool = option(True, "Ask for a critique before each revision.")
    examples: Texts = option("builtin", _EXAMPLES)
    helpful: Helpful | None = option(None, "Answers to other prompts, added unrevised: {data, samples}.")
    replay: TextList | None = option(None, "Files of published critiques and revisions to take instead of making any.")


class LabelOptions(FeedbackOptions):
    """Comparisons labelled by a judge: the preferences of RL-CAI (arXiv 2212.08073, section 4.1); or by a reward."""

    method: Literal["label"] = "label"
    judge: Feedback | None = option(None, "What compares the answers: a model, {url: ...}, or {replay: FILE}.")
    reward: Rewards | None = option(None)
    generator: Feedback | None = option(None, "What answers the prompts; omitted: the model of start_from.")
    answers: Annotated[int, Field(ge=2, le=64)] | Literal["given"] = option(2)
    best_of: bool = option(False)
    orders: Literal["both", "one"] = option("both")
    cot: bool = option(False, "Let the judge think step by step before it answers.")
    cot_tokens: Count = option(256, "Longest chain of thought, in tokens.")
    clamp: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=2, max_length=2)] | None = option(None)
    examples: Texts = option("none", _EXAMPLES)
    hard: bool = option(False, "Round labels to 0 or 1; the paper found soft ones much better.")
    mix: Sources | None = option(None, "Comparisons made by people, added as they are.")
    check: Sources | None = option(None)
    on_weak_judge: Literal["warn", "stop"] = option("warn")

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest label."""
        low, high = self.clamp or ((0.4, 0.6) if self.cot else (0.0, 1.0))
        return low, high


class RlaifOptions(Options):
    """Reinforcement learning from AI feedback: one section that stands for several stages."""

    method: Literal["rlaif"] = "rlaif"
    start_from: Text | None = option(None)
    constitution: Texts = option(..., _CONSTITUTION)
    data: Sources = option(..., "Prompts, here or as the recipe's own `data:`.")
    generator: Feedback | None = option(None)
    judge: Feedback | None = option(None, "What compares or scores the answers: a stage, a model or {url: ...}.")
    critique: bool | dict[str, Any] = option(True, "Keys of a critique stage; false leaves out critique and sft.")
    sft: dict[str, Any] = option(dict, "Keys of the sft stage on the revisions; it starts from start_from.")
    label: dict[str, Any] = option(dict, "Keys of a label stage.")
    train: Literal["dpo", "rm+ppo", "ppo", "none"] = option("dpo")
    rounds: Annotated[RoundOptions, BeforeValidator(
        lambda value: {"num": value} if isinstance(value, int) else value, json_schema_input_type=Count | RoundOptions)
    ] | None = option(None)
    dpo: dict[str, Any] = option(dict, "Keys of the dpo stage.")
    rm: dict[str, Any] = option(dict, "Keys of the rm stage.")
    ppo: dict[str, Any] = option(dict, "Keys of the ppo stage.")


OPTIONS: dict[str, type[StageOptions]] = {"sft": SftOptions, "rm": RmOptions, "dpo": DpoOptions, "ppo": PpoOptions,
                                          "critique": CritiqueOptions, "label": LabelOptions}


def recipe_schema() -> dict[str, Any]:
    """Describe a recipe as draft 2020-12 JSON Schema, for editors: hover text, completion, red lines under mistakes.
    A section is named after its method, any other name needs `method:`."""
    top = RecipeOptions.model_json_schema()
    defs: Fragment = top.pop("$defs")
    defs["ModelOptions"]["type"] = ["object", "string"]  # a text is its path
    kinds = {**{method: f"{method}_stage" for method in OPTIONS}, RLAIF: "rlaif_section"}
    for method, kind in kinds.items():
        fragments = (model := OPTIONS.get(method, RlaifOptions)).model_json_schema()
        defs |= fragments.pop("$defs", {})
        properties = {**fragments["properties"], **copy.deepcopy(method_fields(method))}
        said = kind.replace("_", " ")
        properties["method"] = {"const": method, "description": f"This is {'an' if method == RLAIF else 'a'} {said}."}
        defs[kind] = {"type": "object", "description": (model.__doc__ or "").strip() or f"A {said}.",
                      "properties": properties, "additionalProperties": False}  # fmt: skip
    steps = defs[kinds[RLAIF]]["properties"]
    for step in STEPS:
        stage = {"$ref": f"#/$defs/{step}_stage"}
        either = {"anyOf": [{"type": "boolean"}, stage]} if step == "critique" else stage
        steps[step] = {**either, "description": steps[step]["description"]}
    extends = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Recipe files merged below this one, relative to it; later ones win.",
    }
    named = {method: {"$ref": f"#/$defs/{kind}"} for method, kind in kinds.items()}
    other = {"description": "A stage of any other name.", "required": ["method"], "anyOf": list(named.values())}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "alignkit recipe", "type": "object",
        "properties": {"extends": extends, **top["properties"], **named}, "additionalProperties": other, "$defs": defs,
    }  # fmt: skip
    return _tidy(schema)


def _tidy(fragment: Any) -> Any:
    """Drop pydantic's titles and move "typical" into the description, where an editor shows it."""
    if isinstance(fragment, list):
        return [_tidy(item) for item in fragment]
    if not isinstance(fragment, dict):
        return fragment
    tidy = {key: _tidy(value) for key, value in fragment.items() if key != "typical"}
    if isinstance(tidy.get("title"), str) and tidy["title"] != "alignkit recipe":
        del tidy["title"]
    if tidy.get("type") == "object" and "title" not in tidy:  # null takes away what an extended recipe says
        tidy["type"] = ["object", "null"]
    if isinstance(fragment.get("typical"), str):
        tidy["description"] = f"{tidy['description']}. Typical: {fragment['typical']}."
    return tidy
