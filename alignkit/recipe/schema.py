"""The recipe's own keys: names, types, ranges and the sentence an editor shows.

Deliberately not here: TRL's fields (the snapshot in `fields.json`), file positions (`load`), and anything
that looks at files, models or devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Method = Literal["sft", "rm", "dpo", "ppo", "critique", "label"]
FEEDBACK = ("critique", "label")  # these make rows; they train nothing
RLAIF = "rlaif"  # one section that stands for several stages
STEPS = ("critique", "sft", "label", "dpo", "rm", "ppo")
SWEEP = "sweep"
ROOMS = {"critique": "feedback", "label": "rewards"}  # where their code is; that of all others is in train
_ROOMS = Path(__file__).parents[1]
# A constitution is a file of this directory.
BUILTIN_CONSTITUTIONS = tuple(
    f"builtin:{path.stem}" for path in sorted(_ROOMS.joinpath("feedback", "constitutions").glob("*.yaml"))
)
BUILTIN_REWARD = "builtin:true-reward"  # the toy world's own sentiment, as a reward or as gold


def _require_text(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("blank", "is empty text")
    return value


Text = Annotated[str, AfterValidator(_require_text)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    # Strict: 16.0 is no whole number, "10" and true are no numbers. Built when a value is first validated.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class ModelOptions(_Section):
    path: Text = Field(
        description="Base model: hub id, local directory, builtin:tiny-gpt2 or builtin:tiny-llama.",
    )
    revision: Text | None = Field(None, description="Commit or tag of a hub id; a hub id is pinned by it.")
    init: Literal["pretrained", "scratch"] = Field(
        "pretrained",
        description="scratch: random weights from the model's config (GPT-1's first step), seeded by `seed`.",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Overrides of the model config for init: scratch, such as {n_layer: 4, n_embd: 128}.",
    )
    tokenizer: Text | None = Field(
        None, description="Directory or hub id of the tokenizer; the model's own if omitted."
    )
    quantization: Literal["none", "int8", "nf4", "fp4"] = Field(
        "none", description="Base weights through bitsandbytes; anything but none needs `lora:`."
    )
    double_quantization: bool = Field(
        True, description="Quantise the 4-bit block constants too (QLoRA section 3): 4.127 bits a parameter."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Weights and compute; auto: bfloat16 where the device computes in it, with float32 weights in full "
        "fine-tuning.",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = Field(
        None, description="Attention kernel; omitted: what transformers picks."
    )
    chat_template: Text | None = Field(
        None,
        description="chatml, llama3, zephyr, plain, a .jinja file, or the name of one of the tokenizer's several; "
        "omitted: the tokenizer's own (of several: `default`).",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="What the template reads beside turns and tools: `enable_thinking`, `reasoning_effort`, "
        "`date_string`; the saved model keeps it, a row's own goes before it.",
    )


class LoraOptions(_Section):
    r: Annotated[int, Field(ge=1, le=4096)] = Field(16, description="Rank of the adapter.")
    alpha: Positive = Field(32, description="Scale: the update is multiplied by alpha / r.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: Text | list[Text] = Field(
        "all-linear", description="all-linear (every linear layer but the head, as QLoRA) or module names."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (arXiv 2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (arXiv 2402.09353).")
    modules_to_save: list[Text] = Field(
        default_factory=list, description="Modules trained in full and saved with the adapter."
    )


# Goes into a shell script: no blanks, no quotes.
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@%+*=\[\]/-]+$")]


class SlurmOptions(_Section):
    partition: _Word | None = Field(None, description="Queue, as sinfo lists them; omitted: the cluster's default.")
    account: _Word | None = Field(None, description="Account that is charged.")
    qos: _Word | None = Field(None, description="Quality of service.")
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")] | None = Field(
        None, description="Time limit of one sitting, such as 24:00:00; the job requeues itself and resumes."
    )
    gpus_per_node: Annotated[int, Field(ge=0)] | None = Field(
        None, description="GPUs asked for on each node; omitted: as many as launch.processes, 0 on the CPU."
    )
    cpus_per_process: Count = Field(8, description="CPU cores for each process.")
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = Field(
        None, description="Host memory per node, such as 480G; 0 takes all of it."
    )
    constraint: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@%+*=\[\]()&|!/-]+$")] | None = Field(
        None, description="Features the nodes must have, such as a100|h100."
    )
    signal_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        120, description="How long before the time limit the job saves and requeues itself."
    )
    max_requeues: Annotated[int, Field(ge=0)] = Field(20, description="Sittings after which the job gives up.")
    options: dict[str, _Word] = Field(
        default_factory=dict, description="Further sbatch options by their long names, such as {nodelist: node[1-4]}."
    )


# What `options` may name: how much, where and when. Options that set variables, start programs or write files would
# let a recipe run code (--export=LD_PRELOAD=...); those that alignkit sets itself have a key of their own.
SLURM_OPTIONS = (
    "acctg-freq", "begin", "clusters", "comment", "core-spec", "cores-per-socket", "cpu-freq", "deadline", "delay-boot",
    "distribution", "exclude", "exclusive", "gpu-bind", "gpu-freq", "gpus", "gres", "gres-flags", "hint", "licenses",
    "mail-type", "mail-user", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nice", "nodelist",
    "prefer", "priority", "reservation", "sockets-per-node", "switches", "thread-spec", "threads-per-core", "time-min",
    "tmp", "tres-per-task", "wait-all-nodes", "wckey",
)  # fmt: skip


class LaunchOptions(_Section):
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where to train; auto takes cuda, then mps, then cpu."
    )
    processes: Count | Literal["auto"] = Field(
        1, description="Processes on each node, one a device; auto takes the visible devices."
    )
    nodes: Count = Field(1, description="Machines; the same command is started on each of them, or --slurm starts it.")
    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = Field(
        "ddp",
        description="ddp copies the model to every process; fsdp (PyTorch) and zero3 (DeepSpeed) shard weights, "
        "gradients and optimizer, zero2 all but the weights.",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto", description="What matrix products are computed in; auto: as model.dtype says."
    )
    activation_checkpointing: bool | None = Field(
        None, description="Recompute activations in the backward pass; omitted: as gradient_checkpointing of the stage."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="Keep optimizer state (zero2, zero3) or everything (fsdp, zero3) in host memory."
    )
    main_address: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$")] | None = Field(
        None, description="Host that node 0 is reached at; omitted: SLURM's first node, or MASTER_ADDR."
    )
    main_port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(
        None, description="Port the processes meet at; omitted: a free one on one node, else MASTER_PORT or 29500."
    )
    heartbeat_seconds: Annotated[float, Field(ge=1)] = Field(
        60, description="A process that gives no sign of life for so long is taken for hung, and the job ends."
    )
    timeout_seconds: Annotated[float, Field(ge=10)] = Field(
        1800, description="Longest wait for the other processes in one operation, or for a step to end."
    )
    slurm: SlurmOptions | None = Field(None, description="What --slurm asks the cluster for.")


class DataSource(_Section):
    path: Text = Field(description="A file, a pattern such as data/*.jsonl, a directory, a hub id, or builtin:NAME.")
    name: Text | None = Field(None, description="Configuration name of a hub data set.")
    data_dir: Text | None = Field(None, description="Directory within a hub data set or a local directory.")
    split: Text = Field("train", description="Split of a data set; slices as datasets has them: train[:10%], a+b.")
    revision: Text | None = Field(None, description="Commit or tag of a hub data set.")
    format: Literal[
        "auto", "trl", "openai", "sharegpt", "alpaca", "hh", "ultrafeedback", "ranked", "choice", "text", "segments",
        "tokens",
    ] = Field("auto", description="Row format; auto looks at every row.")  # fmt: skip
    columns: dict[str, Text | None] = Field(
        default_factory=dict,
        description="Renames: our name on the left, the file's column on the right; null leaves ours out.",
    )
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(
        default_factory=dict, description="Roles of messages: the file's name on the left, ours on the right."
    )
    chat: Literal["auto"] | bool = Field(
        "auto",
        description="Turns or text: true makes a user's turn of a prompt and an assistant's of its answer, false joins "
        "them as text; auto: turns where the model has a chat template. Raw `text` is never a turn.",
    )
    separator: str = Field(
        "\n",
        description="Ends a prompt that is read as text, where neither it nor its answers bring white space of their "
        "own; it is not learnt. '' for prompts that are to be gone on with.",
    )
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="Passes over this source per epoch: 0.5 takes each row with probability 0.5 (seeded), 2 twice."
    )
    max_rows: Count | None = Field(None, description="Take only the first rows of the source.")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _list_sources(value: Any) -> Any:
    """Turn a path, a source or a list that mixes them into a list of sources."""
    return [{"path": item} if isinstance(item, str) else item for item in _as_list(value)]


# A path or a source where one is enough, a list where there are more.
Sources = Annotated[
    list[DataSource],
    Field(min_length=1),
    BeforeValidator(
        _list_sources,
        json_schema_input_type=str | DataSource | Annotated[list[str | DataSource], Field(min_length=1)],
    ),
]
Share = Annotated[float, Field(gt=0, lt=1)]


Texts = Text | Annotated[list[Text], Field(min_length=1)]


class Price(_Section):
    input: Annotated[float, Field(ge=0)] = Field(description="Of a million tokens sent, in any currency.")
    output: Annotated[float, Field(ge=0)] = Field(description="Of a million tokens received.")


class FeedbackModel(_Section):
    """What answers, criticises or judges; exactly one of `model`, `url` and `replay` is given."""

    model: Text | None = Field(
        None,
        description="A stage of this recipe, a run, a model or adapter directory, or a hub id, run on this machine.",
    )
    engine: Literal["transformers", "vllm"] = Field("transformers", description="What runs `model`.")
    url: Text | None = Field(
        None, description="Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1."
    )
    name: Text | None = Field(None, description="The model's name at the server.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="chat sends messages; completions sends plain text, which base models need."
    )
    logprobs: bool = Field(
        True, description="Ask the server for log-probabilities of the options; false reads its text instead."
    )
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        None,
        description="Environment variable with the key: its name ends in _API_KEY or _TOKEN and is given to "
        "--allow-key; "
        "omitted: the host's own, such as OPENAI_API_KEY for api.openai.com.",
    )
    concurrency: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="Requests under way at one time.")
    requests_per_minute: Positive | None = Field(
        None, description="Most requests started in a minute; omitted: as many as concurrency lets through."
    )
    timeout: Positive = Field(60.0, description="Seconds that one request may take.")
    retries: Annotated[int, Field(ge=0)] = Field(
        6, description="Further tries of a request that failed, with growing waits; Retry-After is honoured."
    )
    max_tokens_total: Count | None = Field(
        None, description="Tokens, sent and received, after which the stage stops and keeps what it has."
    )
    max_cost: Positive | None = Field(
        None, description="Cost after which the stage stops and keeps what it has; needs price."
    )
    price: Price | None = Field(None, description="What tokens cost: {input, output}, per million.")
    replay: Text | None = Field(None, description="A file of labels that are published already (a judge only).")


def _name_model(value: Any) -> Any:
    """Turn a name into a feedback model; leave anything else as it is."""
    return {"model": value} if isinstance(value, str) else value


# A name where that is all there is to say.
Feedback = Annotated[FeedbackModel, BeforeValidator(_name_model, json_schema_input_type=Text | FeedbackModel)]


class SampleOptions(_Section):
    num: Annotated[int, Field(ge=0, le=256)] = Field(4, description="Prompts answered; 0 switches samples off.")
    max_new_tokens: Count = Field(48, description="Length of an answer, in tokens.")


class RewardSource(_Section):
    """One reward, or one part of a weighted sum; exactly one of `model`, `function` and `judge` is given."""

    model: Text | None = Field(
        None,
        description="An rm stage of this recipe, or a run, a directory or a hub id of a sequence classifier: its logit "
        "with one label, the log-odds of the second with two; builtin:true-reward is the toy world's own.",
    )
    function: Text | None = Field(
        None,
        description="pkg.module:name, called as name(prompts, completions, **columns) -> list[float], columns of the "
        "data included; needs --trust-code.",
    )
    judge: Feedback | None = Field(
        None, description="A language model that judges each answer by `constitution`, with log-odds as the reward."
    )
    constitution: Texts | None = Field(
        None, description="What a judge goes by: YAML or JSON files, builtin:harmlessness or builtin:helpfulness."
    )
    weight: float = Field(1.0, description="Factor of this part in the sum.")


REWARD_KINDS = tuple(key for key in RewardSource.model_fields if key not in ("constitution", "weight"))


def _list_rewards(value: Any) -> Any:
    """Turn a name, a reward or a list that mixes them into a list of rewards."""
    return [{"model": item} if isinstance(item, str) else item for item in _as_list(value)]


# A name or a reward where one is enough, a list where several are summed.
Rewards = Annotated[
    list[RewardSource],
    Field(min_length=1),
    BeforeValidator(
        _list_rewards,
        json_schema_input_type=str | RewardSource | Annotated[list[str | RewardSource], Field(min_length=1)],
    ),
]


class MissingEos(_Section):
    """What an answer without an end gets; exactly one of the two."""

    penalty: Positive | None = Field(None, description="Subtracted from its reward.")
    score: float | None = Field(None, description="Replaces its reward.")


class Truncate(_Section):
    token: Text = Field(description="The text whose token ends an answer for the reward, such as a full stop.")
    after: Annotated[int, Field(ge=0)] = Field(
        16, description="Tokens of an answer before the first one that can end it (Ziegler 2019: 16)."
    )


class Ptx(_Section):
    data: Sources = Field(description="Raw text of the pre-training distribution.")
    coef: Positive = Field(description="Weight of its loss beside PPO's (InstructGPT eq. 2: gamma, 27.8).")
    batch_size: Count | None = Field(None, description="Blocks of text per optimizer step; omitted: batch_size.")


class GenerationOptions(_Section):
    engine: Literal["transformers", "vllm"] = Field("transformers", description="What samples the answers.")
    batch_size: int = Field(
        64, ge=1, description="Answers that a process samples at once with transformers; less takes less memory."
    )
    mode: Literal["colocate", "server"] = Field(
        "colocate", description="vLLM on the training devices, or as a server of its own (`trl vllm-serve`)."
    )
    url: Text | None = Field(None, description="Address of the vLLM server, such as http://127.0.0.1:8000.")
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.3, description="Share of a device's memory for a colocated vLLM."
    )


class StageOptions(_Section):
    """Keys that every method shares."""

    method: Method = Field(
        description="What the stage does; its name says it when it is sft, rm, dpo, ppo, critique or label."
    )
    start_from: Text | None = Field(
        None, description="A stage of this recipe, a run directory, a model or adapter directory; omitted: model.path."
    )
    data: Sources = Field(
        description="Rows: a path, a critique or label stage of this recipe, a source, or a list of sources."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="skip leaves rows out that do not fit and writes rejects.jsonl."
    )
    dedupe: bool = Field(False, description="Leave out rows that repeat an earlier row exactly.")
    chat: Literal["auto"] | bool = Field("auto", description="For all sources that do not say it: turns or text.")


class TrainOptions(StageOptions):
    """Keys that every method that trains shares."""

    eval: Share | Sources | None = Field(
        None, description="Held-out rows: a share of the training data (split by prompt), or sources."
    )
    special_tokens_in_text: Literal["error", "keep", "escape"] = Field(
        "error", description="Control tokens of the tokenizer inside user text: refuse, let them act, or defuse them."
    )
    max_truncated: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="Largest share of rows that may be cut to max_length or left out for being longer."
    )
    batch_size: Count = Field(16, description="Rows per optimizer step over all devices (rm: prompts).")
    micro_batch_size: Count | Literal["auto"] = Field(
        "auto", description="Rows per forward pass on one device; must divide batch_size."
    )
    batching: Literal["shuffled", "grouped"] = Field(
        "grouped", description="grouped puts rows of like length together to save padding; shuffled does not."
    )
    adapter: Literal["continue", "merge", "stack"] | None = Field(
        None,
        description="When start_from is an adapter: train it on (default), fold it into the base first, or freeze it "
        "and train a new one on top.",
    )
    keep_checkpoints: Count = Field(2, description="Sealed checkpoints kept, newest first.")
    samples: SampleOptions = Field(default_factory=SampleOptions, description="Prompts answered before, during, after.")


class SftOptions(TrainOptions):
    method: Literal["sft"] = "sft"
    objective: Literal["chat", "lm"] = Field(
        "chat", description="chat: prompt-completion or messages; lm: raw text packed into blocks of max_length."
    )
    streaming: bool = Field(
        False, description="Read rows while training, in the order of the files, pass after pass, until max_steps."
    )


class RmOptions(TrainOptions):
    method: Literal["rm"] = "rm"
    loss: Literal["pairwise", "best_of"] = Field(
        "pairwise",
        description="pairwise: mean over a prompt's K(K-1)/2 pairs (InstructGPT eq. 1); best_of: softmax over the K "
        "answers (Ziegler eq. 1).",
    )
    grouping: Literal["kway", "pairs"] = Field(
        "kway", description="kway keeps all answers of a prompt in one batch element; pairs breaks them up."
    )
    normalize: Literal["none", "bias", "gain_and_bias"] = Field(
        "none",
        description="Shift (and scale) the reward to mean 0 (and std 1) on reference rows; kept in reward_norm.json.",
    )
    normalize_data: Sources | None = Field(
        None, description="Reference rows for normalize: demonstrations; omitted: the best answers of `data`."
    )
    normalize_rows: Annotated[int, Field(ge=2)] = Field(256, description="Reference rows used by normalize.")


class DpoOptions(TrainOptions):
    method: Literal["dpo"] = "dpo"


class PpoOptions(TrainOptions):
    method: Literal["ppo"] = "ppo"
    reward: Rewards = Field(
        description="What scores an answer: an rm stage, a classifier, {function: ...}, or a list that is summed."
    )
    gold: Rewards | None = Field(
        None, description="Scores rollouts and samples too, and is never trained on: it shows over-optimisation."
    )
    reward_timeout: Positive = Field(60.0, description="Seconds that one call of a reward function may take.")
    reward_normalize: Literal["none", "bias", "gain_and_bias"] = Field(
        "none",
        description="Before training, shift (and scale) the reward to mean 0 (and std 1) on answers of the starting "
        "policy (Ziegler 2019); an rm stage's own reward_norm.json always applies first.",
    )
    reward_normalize_rows: Annotated[int, Field(ge=2)] = Field(256, description="Answers used by reward_normalize.")
    reward_clip: Positive | None = Field(
        None, description="Bounds the reward to [-reward_clip, reward_clip], after normalisation."
    )
    missing_eos: MissingEos | None = Field(
        None, description="What an answer that does not end gets: {penalty: x} less, or {score: x} instead."
    )
    truncate: Truncate | None = Field(
        None,
        description="The reward sees an answer only up to a token (Ziegler 2019); one without it falls under "
        "missing_eos, and KL counts over all tokens.",
    )
    kl_coef: Annotated[float, Field(ge=0)] = Field(
        0.05,
        description="Factor of the KL to the starting policy, per token, in the reward; where an adaptive one starts.",
    )
    kl_target: Positive | None = Field(
        None, description="Adapts kl_coef to keep the KL near this many nats per sequence; omitted: it stays fixed."
    )
    kl_horizon: Count = Field(10_000, description="Episodes over which kl_coef adapts; smaller is faster.")
    max_kl: Positive | None = Field(
        None, description="Stops the run when the KL exceeds this many nats per sequence, and keeps the model before."
    )
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = Field(
        "gae",
        description="gae: a critic; rloo: less the mean of the prompt's other answers; grpo: the z-score among them; "
        "reinforce: less the mean of the batch.",
    )
    num_generations: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Answers per prompt for rloo and grpo; omitted: 4."
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Discount of gae, per token.")
    lam: Annotated[float, Field(ge=0, le=1)] = Field(0.95, description="Lambda of gae: 1 trusts returns, 0 the critic.")
    cliprange: Positive = Field(0.2, description="Clip of the policy's probability ratio.")
    cliprange_value: Positive = Field(0.2, description="Clip of the critic's change in value.")
    vf_coef: Positive = Field(0.1, description="Factor of the critic's loss.")
    ppo_epochs: Count = Field(4, description="Passes over the answers of a rollout.")
    minibatches: Count = Field(
        1, description="Optimizer steps per pass: a rollout is batch_size x minibatches answers."
    )
    whiten_rewards: bool = Field(False, description="Scale the per-token rewards of a rollout to variance 1.")
    whiten_advantages: bool = Field(True, description="Scale the advantages of a rollout to mean 0 and variance 1.")
    value_init: Literal["reward", "policy", "head"] | None = Field(
        None,
        description="The critic starts from the reward model (InstructGPT), from the policy with a zero head, or is a "
        "zero head on the policy's own trunk (Ziegler: one forward pass for both; policy with lora:); omitted: the "
        "reward where that is one model.",
    )
    critic_learning_rate: Positive | None = Field(
        None, description="Learning rate of the critic; omitted: learning_rate."
    )
    temperature: Positive = Field(1.0, description="Of the policy: in sampling and in its log-probabilities.")
    max_new_tokens: Count = Field(64, description="Longest answer, in tokens.")
    min_new_tokens: Count | None = Field(None, description="Shortest answer, in tokens: no end before.")
    total_episodes: Count | None = Field(
        None, description="Answers sampled in the whole run; omitted: max_steps or num_train_epochs decide."
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Decay of a moving average of the weights, per step, saved as the model (InstructGPT: 0.992)."
    )
    ptx: Ptx | None = Field(None, description="Mixes the pre-training gradient in (PPO-ptx): {data, coef, batch_size}.")
    generation: GenerationOptions = Field(default_factory=GenerationOptions, description="Where answers are sampled.")

    @property
    def answers_per_prompt(self) -> int:
        """Return how many answers of a rollout belong to one prompt."""
        return (self.num_generations or 4) if self.advantage in ("rloo", "grpo") else 1

    @property
    def critic_start(self) -> Literal["reward", "policy", "head"]:
        """Return what the critic starts from: as given, else the reward where that is one model with weights."""
        (first, *others) = self.reward
        one_model = not others and first.model is not None and first.model != BUILTIN_REWARD
        return self.value_init or ("reward" if one_model else "policy")


_CONSTITUTION = "Principles: YAML or JSON files, builtin:harmlessness or builtin:helpfulness; several are joined."
_EXAMPLES = "Worked examples put before every request: builtin, none, or files of them."
_Temperature = Annotated[float, Field(gt=0, description="Of sampled answers, critiques and revisions.")]
_NewTokens = Annotated[int, Field(ge=1, description="Longest sampled text, in tokens.")]
_Rows = Annotated[int, Field(ge=1, description="Texts that a model on this machine reads or writes at a time.")]


class Helpful(_Section):
    data: Sources = Field(description="Prompts, answered as they are, that keep the model helpful.")
    samples: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Answers to each prompt (the paper: 2).")


_Files = Annotated[list[Text], Field(min_length=1), BeforeValidator(_as_list, json_schema_input_type=Texts)]


class CritiqueOptions(StageOptions):
    """Answers, criticised and revised by a constitution: the rows of SL-CAI (arXiv 2212.08073, section 3)."""

    method: Literal["critique"] = "critique"
    data: Sources = Field([], description="Prompts that tempt the model to answer badly.")
    constitution: Texts | None = Field(None, description=_CONSTITUTION)
    generator: Feedback | None = Field(
        None, description="What answers, criticises and revises; omitted: the model of start_from."
    )
    rounds: Annotated[int, Field(ge=1, le=32)] = Field(
        4, description="Revisions of each answer, each by a principle of its own; all of them become rows."
    )
    critiques: bool = Field(True, description="Ask for a critique before each revision.")
    examples: Texts = Field("builtin", description=_EXAMPLES)
    temperature: _Temperature = 1.0
    max_new_tokens: _NewTokens = 256
    batch_size: _Rows = 16
    helpful: Helpful | None = Field(None, description="Answers to other prompts, added unrevised: {data, samples}.")
    replay: _Files | None = Field(
        None, description="Files of published critiques and revisions to take instead of making any."
    )


class LabelOptions(StageOptions):
    """Comparisons labelled by a judge: the preferences of RL-CAI (arXiv 2212.08073, section 4.1); or by a reward."""

    method: Literal["label"] = "label"
    constitution: Texts | None = Field(None, description=_CONSTITUTION)
    judge: Feedback | None = Field(
        None, description="What compares the answers: a model, {url: ...}, or {replay: FILE}."
    )
    reward: Rewards | None = Field(
        None,
        description="Compares the answers instead of a judge, by the probability that Bradley-Terry gives the first: "
        "rewards as in `ppo:`.",
    )
    generator: Feedback | None = Field(None, description="What answers the prompts; omitted: the model of start_from.")
    answers: Annotated[int, Field(ge=2, le=64)] | Literal["given"] = Field(
        2, description="Answers sampled for each prompt; given: those that the rows have. All pairs are compared."
    )
    orders: Literal["both", "one"] = Field(
        "both", description="both asks twice, each answer once as (A), and takes the mean; one draws an order."
    )
    cot: bool = Field(False, description="Let the judge think step by step before it answers.")
    cot_tokens: Count = Field(256, description="Longest chain of thought, in tokens.")
    clamp: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=2, max_length=2)] | None = Field(
        None, description="Bounds of a label; omitted: [0.4, 0.6] with cot, as the paper has it, else none."
    )
    examples: Texts = Field("none", description=_EXAMPLES)
    temperature: _Temperature = 1.0
    max_new_tokens: _NewTokens = 256
    batch_size: _Rows = 16
    hard: bool = Field(False, description="Round labels to 0 or 1; the paper found soft ones much better.")
    mix: Sources | None = Field(None, description="Comparisons made by people, added as they are.")
    check: Sources | None = Field(
        None, description="Comparisons with known answers: the judge is measured on them, and they are never rows."
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the lowest and the highest label."""
        low, high = self.clamp or ((0.4, 0.6) if self.cot else (0.0, 1.0))
        return low, high


class RlaifOptions(_Section):
    """Reinforcement learning from AI feedback: one section that stands for several stages."""

    method: Literal["rlaif"] = "rlaif"
    start_from: Text | None = Field(
        None, description="The helpful model to begin with: a stage, a run or a directory; omitted: model.path."
    )
    constitution: Texts = Field(description=_CONSTITUTION)
    data: Sources = Field(description="Prompts, here or as the recipe's own `data:`.")
    generator: Feedback | None = Field(
        None, description="What answers, criticises and revises; omitted: the model that each step starts from."
    )
    judge: Feedback | None = Field(
        None, description="What compares or scores the answers: a stage, a model or {url: ...}."
    )
    critique: bool | dict[str, Any] = Field(
        default=True, description="Keys of a critique stage; false leaves out critique and sft."
    )
    sft: dict[str, Any] = Field(
        default_factory=dict, description="Keys of the sft stage on the revisions; it starts from start_from."
    )
    label: dict[str, Any] = Field(default_factory=dict, description="Keys of a label stage.")
    train: Literal["dpo", "rm+ppo", "ppo", "none"] = Field(
        "dpo", description="What learns from the judge; ppo takes the judge itself as its reward, none stops after sft."
    )
    dpo: dict[str, Any] = Field(default_factory=dict, description="Keys of the dpo stage.")
    rm: dict[str, Any] = Field(default_factory=dict, description="Keys of the rm stage.")
    ppo: dict[str, Any] = Field(default_factory=dict, description="Keys of the ppo stage.")


OPTIONS: dict[str, type[StageOptions]] = {
    "sft": SftOptions, "rm": RmOptions, "dpo": DpoOptions, "ppo": PpoOptions,
    "critique": CritiqueOptions, "label": LabelOptions,
}  # fmt: skip


# A metric is a file of this directory; nothing is imported to know its name.
METRICS = tuple(path.stem for path in sorted(_ROOMS.joinpath("evaluate", "metrics").glob("[a-z]*.py")))
if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[METRICS]


class FrontierOptions(_Section):
    """The most reward at a KL, from answers of the model that others start from; measured on that model alone."""

    betas: Annotated[list[Positive], Field(min_length=1)] = Field(
        default_factory=lambda: [1.0, 0.5, 0.2, 0.1, 0.05],
        description="Measure the optimum of reward - beta KL for each beta, in units of the reward; the curve ends at "
        "the smallest.",
    )
    answers: Annotated[int, Field(ge=2)] = Field(
        256,
        description="Answers sampled per prompt, at least the largest best_of; no KL above their log can be told.",
    )
    best_of: list[Count] = Field(default_factory=list, description="Best of N of these answers, for each N.")


EVALUATED = ("reference", "reward", "against", "judge")  # keys of evaluate: that may name a stage


class EvaluateOptions(_Section):
    """What `alignkit eval` measures; every name of a model may be a stage of the recipe."""

    data: Sources | None = Field(
        None, description="Rows to measure on; omitted: the held-out rows of the stage, of builtin data the split test."
    )
    max_rows: Count = Field(200, description="Rows used: the first ones of the data.")
    metrics: Annotated[list[Metric], Field(min_length=1)] | None = Field(
        None, description="Which groups of metrics; omitted: all that model, data and the keys below allow."
    )
    reference: Text | None = Field(
        None, description="Reference of KL and implicit reward; omitted: what a dpo or ppo stage started from."
    )
    reward: Text | None = Field(
        None,
        description="Scores answers: an rm stage, a run, a classifier, pkg.module:function, or builtin:true-reward; "
        "omitted: true reward on builtin data.",
    )
    against: Text | None = Field(None, description="The other side of a win rate: a stage, a run, a model.")
    judge: Feedback | None = Field(
        None,
        description="Decides the win rate: with `constitution` a language model, asked in both orders, else named like "
        "reward; omitted: reward.",
    )
    constitution: Texts | None = Field(
        None, description="What a language model judges by: YAML or JSON files, or builtin:helpfulness."
    )
    best_of: list[Count] = Field(
        default_factory=list, description="Measure the best of N sampled answers by reward, for each N."
    )
    frontier: FrontierOptions | None = Field(
        None, description="Measure the optimum of reward against KL, on the stage that others are held near."
    )
    tasks: list[Text] = Field(
        default_factory=list, description="Few-shot tasks: JSONL of {context, completion}, or lm_eval:TASK."
    )
    shots: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0], description="Examples in the prompt of a task; one figure for each number."
    )
    samples: Count = Field(1, description="Answers sampled per prompt for kl and answers.")
    temperature: Positive = Field(1.0, description="Of the sampled answers.")
    max_new_tokens: Count = Field(64, description="Longest answer, in tokens.")
    batch_size: Count = Field(16, description="Rows per forward pass.")
    resamples: Annotated[int, Field(ge=100)] = Field(1000, description="Bootstrap resamples behind an interval.")


class RecipeOptions(_Section):
    """The top level of a recipe; every other key is the name of a stage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] | None = Field(
        None, description="Directory of its runs below runs/; the file's name if omitted."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Fixes initial weights, order of rows, dropout and samples."
    )
    model: ModelOptions = Field(description="The base model that the stages start from.")
    lora: LoraOptions | None = Field(
        None, description="Train adapters instead of all weights; {} takes the defaults below."
    )
    launch: LaunchOptions = Field(default_factory=LaunchOptions, description="Where it runs.")
    data: Sources | None = Field(None, description="Training rows of every stage that gives none of its own.")
    eval: Share | Sources | None = Field(None, description="Held-out rows of every stage that gives none of its own.")
    stages: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="Order of the stages; as written if omitted."
    )
    sweep: dict[str, list[Any] | dict[str, Any] | None] | None = Field(
        None,
        description="One run per value: dotted keys of stages, or seed, model, lora, data and eval, each with a list.",
    )
    evaluate: EvaluateOptions = Field(default_factory=EvaluateOptions, description="What `alignkit eval` measures.")
