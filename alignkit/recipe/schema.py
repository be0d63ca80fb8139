"""The recipe's own keys: names, types, ranges and the sentence an editor shows; TRL's are in `trl_fields`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Method = Literal["sft", "rm", "dpo", "ppo", "critique", "label"]
FEEDBACK = ("critique", "label")  # these make rows; they train nothing
RLAIF = "rlaif"  # one section that stands for several stages
STEPS = ("critique", "sft", "label", "dpo", "rm", "ppo")
SWEEP = "sweep"
LEARNT_TOKENIZERS = ("builtin:words", "builtin:bpe")  # values of model.tokenizer that are learnt from training rows
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


# What is better where a metric's name does not begin with + or -.
_BETTER = {"-": ("loss", "perplexity"), "+": ("accurac", "margin", "true_reward", "win_rate")}


def _require_sign(value: str) -> str:
    """Write a metric of held-out rows as +NAME (higher is better) or -NAME (lower)."""
    name = value.strip("+- ").removeprefix("eval_")
    signs = [value[0]] if value[:1] in _BETTER else [s for s, words in _BETTER.items() if any(w in name for w in words)]
    if not name or len(signs) != 1:
        raise PydanticCustomError("sign", "does not say what is better")
    return signs[0] + name


Text = Annotated[str, AfterValidator(_require_text)]
_HubKernel = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?$")]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


def option(default: Any, description: str, **limits: Any) -> Any:
    """A key of the recipe: ... is required, a class or function makes the default; editors show the sentence."""
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**given, description=description, **limits)


# Tables of keys: each begins a line, and no line holds a bracket alone.
# fmt: off


class _Section(BaseModel):
    # Strict: 16.0 is no whole number, "10" and true are no numbers. Built when a value is first validated.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class ModelOptions(_Section):
    path: Text = option(
        ..., "Base model: hub id, local directory, GGUF file, pypi:PACKAGE that holds one, builtin:tiny-gpt2 or "
        "builtin:tiny-llama; for objective: seq2seq builtin:rnnsearch or builtin:rnnencdec.")
    revision: Text | None = option(None, "Commit or tag of a hub id; a hub id is pinned by it.")
    init: Literal["pretrained", "scratch"] = option(
        "pretrained", "scratch: random weights from the model's config (GPT-1's first step), seeded by `seed`.")
    config: dict[str, Any] = option(
        dict, "Overrides of the model config for init: scratch, such as {n_layer: 4, n_embd: 128}.")
    tokenizer: Text | None = option(
        None, "Directory or hub id of the tokenizer; builtin:words and builtin:bpe, for random weights, learn one of "
        "at most config.vocab_size tokens from the training rows; the model's own if omitted.")
    quantization: Literal["none", "int8", "nf4", "fp4"] = option(
        "none", "Base weights through bitsandbytes; anything but none needs `lora:`.")
    double_quantization: bool = option(
        True, "Quantise the 4-bit block constants too (QLoRA section 3): 4.127 bits a parameter.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Weights and compute; auto: bfloat16 where the device computes in it, with float32 weights in full "
        "fine-tuning.")
    attn_implementation: (
        Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
        | _HubKernel | None
    ) = option(None, "Attention kernel, or OWNER/NAME of one on the hub (--trust-code); omitted: transformers' choice.")
    use_kernels: bool = option(
        False, "Layers whose kernels the hub has are computed by those (--trust-code): less time and memory on a GPU.")
    chat_template: Text | None = option(
        None, "chatml, llama3, zephyr, plain, a .jinja file, or the name of one of the tokenizer's several; omitted: "
        "the tokenizer's own (of several: `default`).")
    chat_template_kwargs: dict[str, Any] | None = option(
        None, "What the template reads beside turns and tools: `enable_thinking`, `reasoning_effort`, `date_string`; "
        "the saved model keeps it, a row's own goes before it.")


class LoraOptions(_Section):
    r: int = option(16, "Rank of the adapter.", ge=1, le=4096)
    alpha: Positive = option(
        lambda given: 2 * given.get("r", 16), "Scale: the update is multiplied by alpha / r; omitted: 2 r.")
    dropout: float = option(0.0, "Dropout on the adapter's input.", ge=0, lt=1)
    target_modules: Text | list[Text] = option(
        "all-linear", "all-linear (every linear layer but the head, as QLoRA) or module names.")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r) instead (arXiv 2312.03732).")
    use_dora: bool = option(False, "Weight-decomposed adapters (arXiv 2402.09353).")
    modules_to_save: list[Text] = option(list, "Modules trained in full and saved with the adapter.")


# Goes into a shell script: no blanks, no quotes.
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@%+*=\[\]/-]+$")]


class SlurmOptions(_Section):
    partition: _Word | None = option(None, "Queue, as sinfo lists them; omitted: the cluster's default.")
    account: _Word | None = option(None, "Account that is charged.")
    qos: _Word | None = option(None, "Quality of service.")
    time: str | None = option(
        None, "Time limit of one sitting, such as 24:00:00; the job requeues itself and resumes.",
        pattern='^(\\d+-)?\\d+(:\\d+){0,2}$')
    gpus_per_node: int | None = option(
        None, "GPUs asked for on each node; omitted: as many as launch.processes, 0 on the CPU.", ge=0)
    cpus_per_process: Count = option(8, "CPU cores for each process.")
    memory: str | None = option(None, "Host memory per node, such as 480G; 0 takes all of it.", pattern="^\\d+[KMGT]?$")
    constraint: str | None = option(
        None, "Features the nodes must have, such as a100|h100.", pattern="^[A-Za-z0-9_.,:@%+*=\\[\\]()&|!/-]+$")
    signal_seconds: int = option(
        120, "How long before the time limit the job saves and requeues itself.", ge=1, le=3600)
    max_requeues: int = option(20, "Sittings after which the job gives up.", ge=0)
    options: dict[str, _Word] = option(
        dict, "Further sbatch options by their long names, such as {nodelist: node[1-4]}.")


# What `options` may name: how much, where and when. Options that set variables, start programs or write files would
# let a recipe run code (--export=LD_PRELOAD=...); those that alignkit sets itself have a key of their own.
SLURM_OPTIONS = (
    "acctg-freq", "begin", "clusters", "comment", "core-spec", "cores-per-socket", "cpu-freq", "deadline", "delay-boot",
    "distribution", "exclude", "exclusive", "gpu-bind", "gpu-freq", "gpus", "gres", "gres-flags", "hint", "licenses",
    "mail-type", "mail-user", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nice", "nodelist",
    "prefer", "priority", "reservation", "sockets-per-node", "switches", "thread-spec", "threads-per-core", "time-min",
    "tmp", "tres-per-task", "wait-all-nodes", "wckey",
)


class LaunchOptions(_Section):
    device: Literal["auto", "cpu", "cuda", "mps", "npu", "xpu"] = option(
        "auto", "Where to train; auto takes cuda, then npu (Ascend), xpu (Intel), mps, then cpu.")
    processes: Count | Literal["auto"] = option(
        1, "Processes on each node, one a device; auto takes the visible devices.")
    nodes: Count = option(1, "Machines; the same command is started on each of them, or --slurm starts it.")
    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = option(
        "ddp", "ddp copies the model to every process; fsdp (PyTorch) and zero3 (DeepSpeed) shard weights, gradients "
        "and optimizer, zero2 all but the weights.")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "What matrix products are computed in; auto: as model.dtype says.")
    activation_checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass; omitted: as gradient_checkpointing of the stage.")
    offload: Literal["none", "optimizer", "all"] = option(
        "none", "Keep optimizer state (zero2, zero3) or everything (fsdp, zero3) in host memory.")
    main_address: str | None = option(
        None, "Host that node 0 is reached at; omitted: SLURM's first node, or MASTER_ADDR.",
        pattern='^[A-Za-z0-9_.:-]+$')
    main_port: int | None = option(
        None, "Port the processes meet at; omitted: a free one on one node, else MASTER_PORT or 29500.", ge=1024,
        le=65535)
    heartbeat_seconds: float = option(
        60, "A process that gives no sign of life for so long is taken for hung, and the job ends.", ge=1)
    timeout_seconds: float = option(
        1800, "Longest wait for the other processes in one operation, or for a step to end.", ge=10)
    slurm: SlurmOptions | None = option(None, "What --slurm asks the cluster for.")


class DataSource(_Section):
    path: Text = option(..., "A file, a pattern such as data/*.jsonl, a directory, a hub id, or builtin:NAME.")
    target: Text | None = option(
        None, "A text file whose lines are the completions to the lines of `path`, as parallel corpora are kept "
        "(train.es beside train.en).")
    name: Text | None = option(None, "Configuration name of a hub data set.")
    data_dir: Text | None = option(None, "Directory within a hub data set or a local directory.")
    split: Text = option("train", "Split of a data set; slices as datasets has them: train[:10%], a+b.")
    revision: Text | None = option(None, "Commit or tag of a hub data set.")
    format: Literal[
        "auto", "trl", "openai", "sharegpt", "alpaca", "hh", "ultrafeedback", "ranked", "choice", "text", "segments",
        "tokens",
    ] = option("auto", "Row format; auto looks at every row.")
    columns: dict[str, Text | None] = option(
        dict, "Renames: our name on the left, the file's column on the right; null leaves ours out.")
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = option(
        dict, "Roles of messages: the file's name on the left, ours on the right.")
    chat: Literal["auto"] | bool = option(
        "auto", "Turns or text: true makes a user's turn of a prompt and an assistant's of its answer, false joins "
        "them as text; auto: turns where the model has a chat template. Raw `text` is never a turn.")
    separator: str = option(
        "\n", "Ends a prompt that is read as text, where neither it nor its answers bring white space of their own; "
        "it is not learnt. '' for prompts that are to be gone on with.")
    weight: float = option(
        1.0, "Passes over this source per epoch: 0.5 takes each row with probability 0.5 (seeded), 2 twice.", gt=0,
        le=1000)
    max_rows: Count | None = option(None, "Take only the first rows of the source.")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# A path or a source where one is enough, a list where there are more.
Sources = Annotated[
    list[DataSource],
    Field(min_length=1),
    BeforeValidator(
        lambda value: [{"path": item} if isinstance(item, str) else item for item in _as_list(value)],
        json_schema_input_type=str | DataSource | Annotated[list[str | DataSource], Field(min_length=1)],
    ),
]
Share = Annotated[float, Field(gt=0, lt=1)]


Texts = Text | Annotated[list[Text], Field(min_length=1)]
TextList = Annotated[list[Text], Field(min_length=1), BeforeValidator(_as_list, json_schema_input_type=Texts)]


class Price(_Section):
    input: Annotated[float, Field(ge=0)] = option(..., "Of a million tokens sent, in any currency.")
    output: Annotated[float, Field(ge=0)] = option(..., "Of a million tokens received.")


class FeedbackModel(_Section):
    """What answers, criticises or judges; exactly one of `model`, `url` and `replay` is given."""

    model: Text | None = option(
        None, "A stage of this recipe, a run, a model or adapter directory, or a hub id, run on this machine.")
    engine: Literal["transformers", "vllm"] = option("transformers", "What runs `model`.")
    url: Text | None = option(None, "Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.")
    name: Text | None = option(None, "The model's name at the server.")
    api: Literal["chat", "completions"] = option(
        "chat", "chat sends messages; completions sends plain text, which base models need.")
    logprobs: bool = option(True, "Ask the server for log-probabilities of the options; false reads its text instead.")
    api_key_env: str | None = option(
        None, "Environment variable with the key: its name ends in _API_KEY or _TOKEN and is given to --allow-key; "
        "omitted: the host's own, such as OPENAI_API_KEY for api.openai.com.", pattern='^[A-Za-z_][A-Za-z0-9_]*$')
    concurrency: int = option(8, "Requests under way at one time.", ge=1, le=1024)
    requests_per_minute: Positive | None = option(
        None, "Most requests started in a minute; omitted: as many as concurrency lets through.")
    timeout: Positive = option(60.0, "Seconds that one request may take.")
    retries: int = option(
        6, "Further tries of a request that failed, with growing waits; Retry-After is honoured.", ge=0)
    max_tokens_total: Count | None = option(
        None, "Tokens, sent and received, after which the stage stops and keeps what it has.")
    max_cost: Positive | None = option(None, "Cost after which the stage stops and keeps what it has; needs price.")
    price: Price | None = option(None, "What tokens cost: {input, output}, per million.")
    replay: Text | None = option(None, "A file of labels that are published already (a judge only).")


# A name where that is all there is to say.
Feedback = Annotated[
    FeedbackModel,
    BeforeValidator(
        lambda value: {"model": value} if isinstance(value, str) else value, json_schema_input_type=Text | FeedbackModel
    ),
]


_Greedy = Annotated[float, Field(ge=0, description="Of sampled texts; 0 takes the likeliest token each time.")]
_TopP = Annotated[float, Field(gt=0, le=1, description="Samples from the likeliest tokens with this share; 1: all.")]
_TopK = Annotated[int, Field(ge=0, description="Samples from so many of the likeliest tokens; 0: all.")]


class SampleOptions(_Section):
    num: int = option(4, "Prompts answered; 0 switches samples off.", ge=0, le=256)
    max_new_tokens: Count | None = option(
        None, "Longest answer, in tokens; omitted: 256 for a model with a chat template that reads 1,024 or more, "
        "else 48.")
    temperature: _Greedy = 0.0
    top_p: _TopP = 1.0
    top_k: _TopK = 0


class RewardSource(_Section):
    """One reward, or one part of a weighted sum; exactly one of `model`, `function`, `judge`, `verify` is given."""

    model: Text | None = option(
        None, "An rm stage of this recipe, or a run, a directory or a hub id of a sequence classifier: its logit with "
        "one label, the log-odds of the second with two; builtin:true-reward is the toy world's own.")
    function: Text | None = option(
        None, "pkg.module:name, called as name(prompts, completions, **columns) -> list[float], columns of the data "
        "included; needs --trust-code.")
    judge: Feedback | None = option(
        None, "A language model that judges each answer by `constitution`, with log-odds as the reward.")
    constitution: Texts | None = option(
        None, "What a judge goes by: YAML or JSON files, builtin:harmlessness or builtin:helpfulness.")
    verify: Literal["math", "exact", "regex", "json_schema", "ifeval", "code"] | None = option(
        None, "1 where the answer is right by a column of its row, else 0: equal to `answer` (math: as mathematics, "
        "through math-verify), found by `pattern`, valid by `schema`, keeping the instructions of IFEval (their "
        "share), or code that passes `tests` in a process with limits (needs --trust-code).")
    column: Text | None = option(None, "The column that `verify` reads; omitted: the one named there.")
    extract: Text | None = option(
        None, "A pattern whose last match, or its first group, is what `verify` checks, such as '#### (.*)'.")
    timeout: Positive = option(5.0, "Seconds that `verify` may take for one answer; then it is wrong.")
    weight: float = option(1.0, "Factor of this part in the sum.")


REWARD_KINDS = ("model", "function", "judge", "verify")
VERIFY_KEYS = ("column", "extract", "timeout")


# A name or a reward where one is enough, a list where several are summed.
Rewards = Annotated[
    list[RewardSource],
    Field(min_length=1),
    BeforeValidator(
        lambda value: [{"model": item} if isinstance(item, str) else item for item in _as_list(value)],
        json_schema_input_type=str | RewardSource | Annotated[list[str | RewardSource], Field(min_length=1)],
    ),
]


class MissingEos(_Section):
    """What an answer without an end gets; exactly one of the two."""

    penalty: Positive | None = option(None, "Subtracted from its reward.")
    score: float | None = option(None, "Replaces its reward.")


class Truncate(_Section):
    token: Text = option(..., "The text whose token ends an answer for the reward, such as a full stop.")
    after: int = option(16, "Tokens of an answer before the first one that can end it (Ziegler 2019: 16).", ge=0)


class Overlong(_Section):
    """Answers that come near max_new_tokens or are cut off there (DAPO, arXiv 2503.14476, section 3.4)."""

    buffer: Positive | None = option(
        None, "The last tokens before max_new_tokens cost up to `penalty`, each as much (eq. 13); below 1 a share of "
        "max_new_tokens (DAPO: 0.2).")
    penalty: Positive = option(1.0, "What an answer of max_new_tokens loses with `buffer`.")
    filter: bool = option(False, "Learn nothing from answers that were cut off.")


class Ptx(_Section):
    data: Sources = option(..., "Raw text of the pre-training distribution.")
    coef: Positive = option(..., "Weight of its loss beside PPO's (InstructGPT eq. 2: gamma, 27.8).")
    batch_size: Count | None = option(None, "Blocks of text per optimizer step; omitted: batch_size.")


class GenerationOptions(_Section):
    engine: Literal["transformers", "vllm"] = option("transformers", "What samples the answers.")
    batch_size: int = option(
        64, "Answers that a process samples at once with transformers; less takes less memory.", ge=1)
    mode: Literal["colocate", "server"] = option(
        "colocate", "vLLM on the training devices, or as a server of its own (`trl vllm-serve`).")
    url: Text | None = option(None, "Address of the vLLM server, such as http://127.0.0.1:8000.")
    gpu_memory_utilization: float = option(0.3, "Share of a device's memory for a colocated vLLM.", gt=0, lt=1)
    importance_cap: Positive | None = option(
        2.0, "A token of vLLM weighs p(trainer) / p(vLLM) in the loss, at most this (truncated importance sampling); "
        "null: always 1.")


class StageOptions(_Section):
    """Keys that every method shares."""

    method: Method = option(
        ..., "What the stage does; its name says it when it is sft, rm, dpo, ppo, critique or label.")
    start_from: Text | None = option(
        None, "A stage of this recipe, a run directory, a model or adapter directory; omitted: model.path.")
    data: Sources = option(
        ..., "Rows: a path, a critique or label stage of this recipe, a source, or a list of sources.")
    on_bad_row: Literal["error", "skip"] = option(
        "error", "skip leaves rows out that do not fit and writes rejects.jsonl.")
    dedupe: bool = option(False, "Leave out rows that repeat an earlier row exactly.")
    chat: Literal["auto"] | bool = option("auto", "For all sources that do not say it: turns or text.")


class TrainOptions(StageOptions):
    """Keys that every method that trains shares."""

    eval: Share | Sources | None = option(
        None, "Held-out rows: a share of the training data (split by prompt), or sources.")
    special_tokens_in_text: Literal["error", "keep", "escape"] = option(
        "error", "Control tokens of the tokenizer inside user text: refuse, let them act, or defuse them.")
    max_truncated: float = option(
        0.2, "Largest share of rows that may be cut to max_length or left out for being longer.", ge=0, le=1)
    batch_size: Count = option(16, "Rows per optimizer step over all devices (rm: prompts).")
    micro_batch_size: Count | Literal["auto"] = option(
        "auto", "Rows per forward pass on one device; must divide batch_size.")
    batching: Literal["shuffled", "grouped"] = option(
        "grouped", "grouped puts rows of like length together to save padding; shuffled does not.")
    adapter: Literal["continue", "merge", "stack"] | None = option(
        None, "When start_from is an adapter: train it on (default), fold it into the base first, or freeze it and "
        "train a new one on top.")
    keep_checkpoints: Count = option(2, "Sealed checkpoints kept, newest first.")
    keep_best: Annotated[str, AfterValidator(_require_sign)] | None = option(
        None, "The weights of the best evaluation become the model, by a metric of the held-out rows: loss, accuracy; "
        "+NAME: higher is better, -NAME: lower. Omitted: the last weights.")
    patience: Count | None = option(None, "Stops after so many evaluations in a row without a better keep_best.")
    eval_share: Positive | None = option(
        0.2, "Most evaluation beside training, as a share of its cost (a held-out row costs a third of one that is "
        "learnt); eval_steps grow until it fits, and the first and last evaluation always happen; null: no limit.")
    samples: SampleOptions = option(SampleOptions, "Prompts answered before, during, after.")


class Objective(NamedTuple):
    """What an sft stage learns: by which kind of model, and from what."""

    model: Literal["causal", "seq2seq", "classifier"]
    learns: str


OBJECTIVES = {
    "chat": Objective("causal", "prompt-completion or messages"),
    "lm": Objective("causal", "raw text packed into blocks of max_length"),
    "seq2seq": Objective("seq2seq", "an encoder-decoder model reads the prompt and writes the completion"),
    "classify": Objective("classifier", "labels of a text, or of a pair such as premise and hypothesis (GPT-1)"),
    "similarity": Objective("classifier", "labels of two sentences, read in both orders"),
    "multiple_choice": Objective("classifier", "which of its answers a context goes on with"),
}
TASKS = tuple(name for name, objective in OBJECTIVES.items() if objective.model == "classifier")
if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]


class SftOptions(TrainOptions):
    method: Literal["sft"] = "sft"
    objective: ObjectiveName = option(
        "chat", "; ".join(f"{name}: {objective.learns}" for name, objective in OBJECTIVES.items()) + ".")
    lm_coef: float = option(
        0.5, "Weight of language modelling on the labelled text beside the loss of labels (GPT-1: 0.5).", ge=0)
    labels: Annotated[list[Text], Field(min_length=2)] | None = option(
        None, "Names of the labels, in the order of whole numbers in the rows; omitted: those that the rows have.")
    streaming: bool = option(
        False, "Read rows while training, in the order of the files, pass after pass, until max_steps.")


class RmOptions(TrainOptions):
    method: Literal["rm"] = "rm"
    loss: Literal["pairwise", "best_of"] = option(
        "pairwise", "pairwise: mean over a prompt's K(K-1)/2 pairs (InstructGPT eq. 1); best_of: softmax over the K "
        "answers (Ziegler eq. 1).")
    grouping: Literal["kway", "pairs"] = option(
        "kway", "kway keeps all answers of a prompt in one batch element; pairs breaks them up.")
    normalize: Literal["none", "bias", "gain_and_bias"] = option(
        "none", "Shift (and scale) the reward to mean 0 (and std 1) on reference rows; kept in reward_norm.json.")
    normalize_data: Sources | None = option(
        None, "Reference rows for normalize: demonstrations; omitted: the best answers of `data`.")
    normalize_rows: int = option(256, "Reference rows used by normalize.", ge=2)


class DpoOptions(TrainOptions):
    method: Literal["dpo"] = "dpo"


# What a paper calls its method, as values of the keys of a ppo stage; what the stage says itself goes before it.
_presets = json.loads(_ROOMS.joinpath("recipe", "presets.json").read_text("utf-8"))
PRESETS: dict[str, dict[str, Any]] = {name: preset["values"] for name, preset in _presets.items()}
if TYPE_CHECKING:
    Preset = str
else:
    Preset = Literal[tuple(PRESETS)]


class PpoOptions(TrainOptions):
    method: Literal["ppo"] = "ppo"
    preset: Preset | None = option(
        None, "Values of a paper for the keys that the stage does not give; --dry-run lists them.")
    reward: Rewards = option(
        ..., "What scores an answer: an rm stage, a classifier, {function: ...}, or a list that is summed.")
    gold: Rewards | None = option(
        None, "Scores rollouts and samples too, and is never trained on: it shows over-optimisation.")
    reward_timeout: Positive = option(60.0, "Seconds that one call of a reward function may take.")
    reward_normalize: Literal["none", "bias", "gain_and_bias"] = option(
        "none", "Before training, shift (and scale) the reward to mean 0 (and std 1) on answers of the starting "
        "policy (Ziegler 2019); an rm stage's own reward_norm.json always applies first.")
    reward_normalize_rows: int = option(256, "Answers used by reward_normalize.", ge=2)
    reward_clip: Positive | None = option(
        None, "Bounds the reward to [-reward_clip, reward_clip], after normalisation.")
    missing_eos: MissingEos | None = option(
        None, "What an answer that does not end gets: {penalty: x} less, or {score: x} instead.")
    overlong: Overlong | None = option(None, "Long answers: {buffer, penalty} lowers their reward, {filter: true} "
        "learns nothing from those that are cut off.")
    stop: TextList | None = option(
        None, "Texts that end an answer, which keeps them; beside the end-of-turn token.")
    truncate: Truncate | None = option(
        None, "The reward sees an answer only up to a token (Ziegler 2019); one without it falls under missing_eos, "
        "and KL counts over all tokens.")
    kl_coef: float = option(
        0.05, "Factor of the KL to the starting policy, per token, in kl_in; where an adaptive one starts.", ge=0)
    kl_in: Literal["reward", "loss"] = option(
        "reward", "reward: log pi - log ref of each token is taken from the reward (k1); loss: added to the loss as "
        "exp(d) - d - 1 with d = log ref - log pi (k3; GRPO eq. 4).")
    kl_target: Positive | None = option(
        None, "Adapts kl_coef to keep the KL near this many nats per sequence; omitted: it stays fixed.")
    kl_horizon: Count = option(10_000, "Episodes over which kl_coef adapts; smaller is faster.")
    max_kl: Positive | None = option(
        None, "Stops the run when the KL exceeds this many nats per sequence, and keeps the model before.")
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = option(
        "gae", "gae: a critic; rloo: less the mean of the prompt's other answers; grpo: the z-score among them; "
        "reinforce: less the mean of the batch.")
    num_generations: int | None = option(None, "Answers per prompt for rloo and grpo; omitted: 4.", ge=2)
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "What grpo divides a reward by, less its group's mean: the group's deviation, the rollout's, or "
        "nothing (Dr. GRPO).")
    dynamic_sampling: Count | None = option(
        None, "How often groups whose answers all have one reward are replaced by groups of other prompts (DAPO); "
        "then they stay.")
    gamma: float = option(1.0, "Discount of gae, per token.", gt=0, le=1)
    lam: float = option(0.95, "Lambda of gae: 1 trusts returns, 0 the critic.", ge=0, le=1)
    cliprange: Positive = option(0.2, "Clip of the policy's probability ratio.")
    cliprange_high: Positive | None = option(
        None, "Clip above 1 where it differs from the one below (DAPO: 0.28); omitted: cliprange.")
    importance: Literal["token", "sequence"] = option(
        "token", "Ratio of each token, or of a whole answer: the geometric mean of its tokens' ratios (GSPO).")
    loss_normalization: Literal["token", "sequence", "constant"] = option(
        "token", "The policy's loss is a mean over all tokens (DAPO), over answers of each one's mean (GRPO), or the "
        "sum over answers x max_new_tokens (Dr. GRPO).")
    cliprange_value: Positive = option(0.2, "Clip of the critic's change in value.")
    vf_coef: Positive = option(0.1, "Factor of the critic's loss.")
    ppo_epochs: Count = option(4, "Passes over the answers of a rollout.")
    minibatches: Count = option(1, "Optimizer steps per pass: a rollout is batch_size x minibatches answers.")
    whiten_rewards: bool = option(False, "Scale the per-token rewards of a rollout to variance 1.")
    whiten_advantages: bool = option(True, "Scale the advantages of a rollout to mean 0 and variance 1.")
    value_init: Literal["reward", "policy", "head"] | None = option(
        None, "The critic starts from the reward model (InstructGPT), from the policy with a zero head, or is a zero "
        "head on the policy's own trunk (Ziegler: one forward pass for both; policy with lora:); omitted: the reward "
        "where that is one model.")
    critic_learning_rate: Positive | None = option(None, "Learning rate of the critic; omitted: learning_rate.")
    temperature: Positive = option(1.0, "Of the policy: in sampling and in its log-probabilities.")
    top_p: float = option(
        1.0, "Samples from the likeliest tokens with this probability together; log-probabilities are of those alone.",
        gt=0, le=1)
    top_k: int = option(0, "Samples from so many of the likeliest tokens, as top_p; 0 from all.", ge=0)
    max_new_tokens: Count = option(64, "Longest answer, in tokens.")
    min_new_tokens: Count | None = option(None, "Shortest answer, in tokens: no end before.")
    total_episodes: Count | None = option(
        None, "Answers sampled in the whole run; omitted: max_steps or num_train_epochs decide.")
    ema: float | None = option(
        None, "Decay of a moving average of the weights, per step, saved as the model (InstructGPT: 0.992).", gt=0,
        lt=1)
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
_NewTokens = Annotated[int, Field(ge=1, description="Longest sampled text, in tokens.")]
_Rows = Annotated[int, Field(ge=1, description="Texts that a model on this machine reads or writes at a time.")]


class Helpful(_Section):
    data: Sources = option(..., "Prompts, answered as they are, that keep the model helpful.")
    samples: int = option(2, "Answers to each prompt (the paper: 2).", ge=1, le=64)


class CritiqueOptions(StageOptions):
    """Answers, criticised and revised by a constitution: the rows of SL-CAI (arXiv 2212.08073, section 3)."""

    method: Literal["critique"] = "critique"
    data: Sources = option([], "Prompts that tempt the model to answer badly.")
    constitution: Texts | None = option(None, _CONSTITUTION)
    generator: Feedback | None = option(None, "What answers, criticises and revises; omitted: the model of start_from.")
    rounds: int = option(
        4, "Revisions of each answer, each by a principle of its own; all of them become rows.", ge=1, le=32)
    critiques: bool = option(True, "Ask for a critique before each revision.")
    examples: Texts = option("builtin", _EXAMPLES)
    temperature: _Greedy = 1.0
    top_p: _TopP = 1.0
    top_k: _TopK = 0
    max_new_tokens: _NewTokens = 256
    batch_size: _Rows = 16
    helpful: Helpful | None = option(None, "Answers to other prompts, added unrevised: {data, samples}.")
    replay: TextList | None = option(None, "Files of published critiques and revisions to take instead of making any.")


class LabelOptions(StageOptions):
    """Comparisons labelled by a judge: the preferences of RL-CAI (arXiv 2212.08073, section 4.1); or by a reward."""

    method: Literal["label"] = "label"
    constitution: Texts | None = option(None, _CONSTITUTION)
    judge: Feedback | None = option(None, "What compares the answers: a model, {url: ...}, or {replay: FILE}.")
    reward: Rewards | None = option(
        None, "Compares the answers instead of a judge, by the probability that Bradley-Terry gives the first: "
        "rewards as in `ppo:`.")
    generator: Feedback | None = option(None, "What answers the prompts; omitted: the model of start_from.")
    answers: Annotated[int, Field(ge=2, le=64)] | Literal["given"] = option(
        2, "Answers sampled for each prompt; given: those that the rows have. All pairs are compared.")
    best_of: bool = option(
        False, "Write each prompt with the answer that is preferred most, for an sft stage (rejection sampling); none "
        "where all are equal.")
    orders: Literal["both", "one"] = option(
        "both", "both asks twice, each answer once as (A), and takes the mean; one draws an order.")
    cot: bool = option(False, "Let the judge think step by step before it answers.")
    cot_tokens: Count = option(256, "Longest chain of thought, in tokens.")
    clamp: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=2, max_length=2)] | None = option(
        None, "Bounds of a label; omitted: [0.4, 0.6] with cot, as the paper has it, else none.")
    examples: Texts = option("none", _EXAMPLES)
    temperature: _Greedy = 1.0
    top_p: _TopP = 1.0
    top_k: _TopK = 0
    max_new_tokens: _NewTokens = 256
    batch_size: _Rows = 16
    hard: bool = option(False, "Round labels to 0 or 1; the paper found soft ones much better.")
    mix: Sources | None = option(None, "Comparisons made by people, added as they are.")
    check: Sources | None = option(
        None, "Comparisons with known answers: the judge is measured on them, and they are never rows.")

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest label."""
        low, high = self.clamp or ((0.4, 0.6) if self.cot else (0.0, 1.0))
        return low, high


class RoundOptions(_Section):
    """A chain of label and training stages that is repeated, each time on answers of the newest policy."""

    num: int = option(..., "Rounds in all; the stages of later ones are named NAME-2, NAME-3, ...", ge=2, le=99)
    rows: Literal["newest", "all"] = option("newest", "Train on the labels of the round, or on those before it too.")
    restart: bool = option(
        False, "Train from where the first round started (HH-RLHF); false goes on from the round before.")


class ChainOptions(RoundOptions):
    stages: Annotated[list[Text], Field(min_length=2)] = option(
        ..., "The stages of a round in their order: label, and what learns from it.")


class RlaifOptions(_Section):
    """Reinforcement learning from AI feedback: one section that stands for several stages."""

    method: Literal["rlaif"] = "rlaif"
    start_from: Text | None = option(
        None, "The helpful model to begin with: a stage, a run or a directory; omitted: model.path.")
    constitution: Texts = option(..., _CONSTITUTION)
    data: Sources = option(..., "Prompts, here or as the recipe's own `data:`.")
    generator: Feedback | None = option(
        None, "What answers, criticises and revises; omitted: the model that each step starts from.")
    judge: Feedback | None = option(None, "What compares or scores the answers: a stage, a model or {url: ...}.")
    critique: bool | dict[str, Any] = option(True, "Keys of a critique stage; false leaves out critique and sft.")
    sft: dict[str, Any] = option(dict, "Keys of the sft stage on the revisions; it starts from start_from.")
    label: dict[str, Any] = option(dict, "Keys of a label stage.")
    train: Literal["dpo", "rm+ppo", "ppo", "none"] = option(
        "dpo", "What learns from the judge; ppo takes the judge itself as its reward, none stops after sft.")
    rounds: Annotated[RoundOptions, BeforeValidator(
        lambda value: {"num": value} if isinstance(value, int) else value, json_schema_input_type=Count | RoundOptions)
    ] | None = option(None, "How often label and training are repeated: a number, or {num, rows, restart}.")
    dpo: dict[str, Any] = option(dict, "Keys of the dpo stage.")
    rm: dict[str, Any] = option(dict, "Keys of the rm stage.")
    ppo: dict[str, Any] = option(dict, "Keys of the ppo stage.")


OPTIONS: dict[str, type[StageOptions]] = {
    "sft": SftOptions, "rm": RmOptions, "dpo": DpoOptions, "ppo": PpoOptions,
    "critique": CritiqueOptions, "label": LabelOptions,
}


# A metric is a file of this directory; nothing is imported to know its name.
METRICS = tuple(path.stem for path in sorted(_ROOMS.joinpath("evaluate", "metrics").glob("[a-z]*.py")))
if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[METRICS]


class FrontierOptions(_Section):
    """The most reward at a KL, from answers of the model that others start from; measured on that model alone."""

    betas: Annotated[list[Positive], Field(min_length=1)] = option(
        lambda: [1.0, 0.5, 0.2, 0.1, 0.05], "Measure the optimum of reward - beta KL for each beta, in units of the "
        "reward; the curve ends at the smallest.")
    answers: int = option(
        256, "Answers sampled per prompt, at least the largest best_of; no KL above their log can be told.", ge=2)
    best_of: list[Count] = option(list, "Best of N of these answers, for each N.")


EVALUATED = ("reference", "reward", "against", "judge")  # keys of evaluate: that may name a stage


class EvaluateOptions(_Section):
    """What `alignkit eval` measures; every name of a model may be a stage of the recipe."""

    data: Sources | None = option(
        None, "Rows to measure on; omitted: the held-out rows of the stage, of builtin data the split test.")
    max_rows: Count = option(200, "Rows used: the first ones of the data.")
    metrics: Annotated[list[Metric], Field(min_length=1)] | None = option(
        None, "Which groups of metrics; omitted: all that model, data and the keys below allow.")
    reference: Text | None = option(
        None, "Reference of KL and implicit reward; omitted: what a dpo or ppo stage started from.")
    reward: Text | None = option(
        None, "Scores answers: an rm stage, a run, a classifier, pkg.module:function, or builtin:true-reward; "
        "omitted: true reward on builtin data.")
    start: bool | None = option(
        None, "Measure what a stage started from too, on the same rows; it is the reference then. Omitted: only the "
        "paired difference to it, of sft in perplexity, of dpo and ppo in all; false: nothing of it.")
    against: Text | None = option(None, "The other side of a win rate: a stage, a run, a model.")
    judge: Feedback | None = option(
        None, "Decides the win rate: with `constitution` a language model, asked in both orders, else named like "
        "reward; omitted: reward.")
    constitution: Texts | None = option(
        None, "What a language model judges by: YAML or JSON files, or builtin:helpfulness.")
    best_of: list[Count] = option(list, "Measure the best of N sampled answers by reward, for each N.")
    frontier: FrontierOptions | None = option(
        None, "Measure the optimum of reward against KL, on the stage that others are held near.")
    tasks: list[Text] = option(list, "Few-shot tasks: JSONL of {context, completion}, or lm_eval:TASK.")
    shots: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = option(
        lambda: [0], "Examples in the prompt of a task; one figure for each number.")
    samples: Count = option(1, "Answers sampled per prompt for kl and answers.")
    temperature: _Greedy = 1.0
    top_p: _TopP = 1.0
    top_k: _TopK = 0
    num_beams: Count = option(1, "Beams of the search for the answers that overlap compares; 1 is greedy.")
    max_new_tokens: Count | None = option(
        None, "Longest answer, in tokens; omitted: 256 for a model with a chat template that reads 1,024 or more, "
        "else 64.")
    batch_size: Count = option(16, "Rows per forward pass.")
    resamples: int = option(1000, "Bootstrap resamples behind an interval.", ge=100)


class RecipeOptions(_Section):
    """The top level of a recipe; every other key is the name of a stage."""

    name: str | None = option(
        None, "Directory of its runs below runs/; the file's name if omitted.", pattern="^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    seed: int = option(0, "Fixes initial weights, order of rows, dropout and samples.", ge=0, lt=2**32)
    model: ModelOptions = option(..., "The base model that the stages start from.")
    lora: LoraOptions | None = option(None, "Train adapters instead of all weights; {} takes the defaults below.")
    launch: LaunchOptions = option(LaunchOptions, "Where it runs.")
    data: Sources | None = option(None, "Training rows of every stage that gives none of its own.")
    eval: Share | Sources | None = option(None, "Held-out rows of every stage that gives none of its own.")
    stages: Annotated[list[Text], Field(min_length=1)] | None = option(
        None, "Order of the stages; as written if omitted.")
    rounds: ChainOptions | None = option(
        None, "Repeats a chain of label and training stages: {stages: [label, dpo], num: 3}.")
    sweep: dict[str, list[Any] | dict[str, Any] | None] | None = option(
        None, "One run per value: dotted keys of stages, or seed, model, lora, data and eval, each with a list.")
    evaluate: EvaluateOptions = option(EvaluateOptions, "What `alignkit eval` measures.")
