"""The recipe's own keys, names, types, ranges and the sentence an editor shows: those of the stages are in `methods`,
TRL's in `words`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_serializer

from alignkit.recipe.words import ADAPTER_TYPES, TABLES, Text, adapter_fields, make_type

SWEEP = "sweep"
LEARNT_TOKENIZERS = ("builtin:words", "builtin:bpe")  # values of model.tokenizer that are learnt from training rows
_ROOMS = Path(__file__).parents[1]
# A constitution is a file of this directory.
BUILTIN_CONSTITUTIONS = tuple(
    f"builtin:{path.stem}" for path in sorted(_ROOMS.joinpath("feedback", "constitutions").glob("*.yaml"))
)
# Those of the objectives that learn labels are not asked for by name.
_rows = json.loads(_ROOMS.joinpath("data", "formats.json").read_text("utf-8"))["formats"]
FORMATS = ("auto", *dict.fromkeys(row["name"] for row in _rows if row["name"] not in TABLES["objectives"]))
BUILTIN_REWARD = "builtin:true-reward"  # the toy world's own sentiment, as a reward or as gold

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@%+*=\[\]/-]+$")]  # of a shell script: no blanks, no quotes
# What editors show of a key whose sentence is longer than a line: "Section.key", tab, sentence.
_HELP = dict(line.split("\t") for line in Path(__file__).with_name("help.tsv").read_text("utf-8").splitlines())


def option(default: Any, description: str | None = None, **limits: Any) -> Any:
    """A key of the recipe: ... is required, a class or function makes the default; editors show the sentence."""
    given = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**given, description=description, **limits)


# Tables of keys: each begins a line, and no line holds a bracket alone.
# fmt: off


class Options(BaseModel):
    # Strict: 16.0 is no whole number, "10" and true are no numbers. Built when a value is first validated.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name in cls.__annotations__.keys() & cls.model_fields.keys():
            field = cls.model_fields[name]
            field.description = field.description or _HELP.get(f"{cls.__name__}.{name}")


class ModelOptions(Options):
    path: Text = option(...)
    revision: Text | None = option(None, "Commit or tag of a hub id; a hub id is pinned by it.")
    init: Literal["pretrained", "scratch"] = option("pretrained")
    config: dict[str, Any] = option(dict)
    tokenizer: Text | None = option(None)
    quantization: Literal["none", "int8", "nf4", "fp4"] = option("none")
    double_quantization: bool = option(True)
    quantization_storage: Literal["uint8", "float16", "bfloat16", "float32"] = option("uint8")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto")
    attn_implementation: Literal[
        "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] | Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?$")] | None = option(None)
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = option(None)
    freeze: list[Text] = option(list)
    add_tokens: list[Text] = option(list)
    use_kernels: bool = option(False)
    chat_template: Text | None = option(None)
    chat_template_kwargs: dict[str, Any] | None = option(None)


class LoraOptions(Options):
    adapter_type: Literal[ADAPTER_TYPES] = option("lora")  # type: ignore[valid-type]
    r: int = option(lambda given: {"vera": 256, "oft": 0}.get(given["adapter_type"], 16), ge=1, le=4096)
    alpha: Positive = option(
        lambda given: 2 * given.get("r", 16), "Scale: the update is multiplied by alpha / r; omitted: 2 r.")
    dropout: float = option(0.0, "Dropout on the adapter's input.", ge=0, lt=1)
    target_modules: Text | list[Text] | None = option(
        lambda given: None if given["adapter_type"] == "ia3" else "all-linear")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r) instead (arXiv 2312.03732).")
    use_dora: bool = option(False, "Weight-decomposed adapters (arXiv 2402.09353); adapter_type: dora is the same.")
    modules_to_save: list[Text] = option(list, "Modules trained in full and saved with the adapter.")
    init_lora_weights: Literal["gaussian", "orthogonal", "eva", "pissa", "olora", "loftq"] | Annotated[
        str, Field(pattern=r"^pissa_niter_[0-9]+$")] | None = option(None)
    lora_plus_ratio: float | None = option(None, ge=1)

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_set(self, write: Any) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


if not TYPE_CHECKING:  # and what PEFT's config classes have beside
    LoraOptions = create_model("LoraOptions", __base__=LoraOptions, **{
        key: (make_type(field) | None, option(None, f"{kind}: {field['description']}"))
        for kind in reversed(ADAPTER_TYPES) for key, (_, field) in adapter_fields(kind).items()
        if kind != "dora" and key not in LoraOptions.model_fields
    })


class SlurmOptions(Options):
    partition: _Word | None = option(None, "Queue, as sinfo lists them; omitted: the cluster's default.")
    account: _Word | None = option(None, "Account that is charged.")
    qos: _Word | None = option(None, "Quality of service.")
    time: str | None = option(None, pattern='^(\\d+-)?\\d+(:\\d+){0,2}$')
    gpus_per_node: int | None = option(None, ge=0)
    cpus_per_process: Count = option(8, "CPU cores for each process.")
    memory: str | None = option(None, "Host memory per node, such as 480G; 0 takes all of it.", pattern="^\\d+[KMGT]?$")
    constraint: str | None = option(None, pattern="^[A-Za-z0-9_.,:@%+*=\\[\\]()&|!/-]+$")
    signal_seconds: int = option(120, ge=1, le=3600)
    max_requeues: int = option(20, "Sittings after which the job gives up.", ge=0)
    options: dict[str, _Word] = option(dict)


class LaunchOptions(Options):
    device: Literal["auto", "cpu", "cuda", "mps", "npu", "xpu"] = option("auto")
    processes: Count | Literal["auto"] = option(1)
    nodes: Count = option(1, "Machines; the same command is started on each of them, or --slurm starts it.")
    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = option("ddp")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option("auto")
    activation_checkpointing: bool | None = option(None)
    offload: Literal["none", "optimizer", "all"] = option("none")
    main_address: str | None = option(None, pattern='^[A-Za-z0-9_.:-]+$')
    main_port: int | None = option(None, ge=1024, le=65535)
    heartbeat_seconds: float = option(60, ge=1)
    timeout_seconds: float = option(1800, ge=10)
    slurm: SlurmOptions | None = option(None, "What --slurm asks the cluster for.")


class DataSource(Options):
    path: Text = option(..., "A file, a pattern such as data/*.jsonl, a directory, a hub id, or builtin:NAME.")
    target: Text | None = option(None)
    name: Text | None = option(None, "Configuration name of a hub data set.")
    data_dir: Text | None = option(None, "Directory within a hub data set or a local directory.")
    split: Text = option("train", "Split of a data set; slices as datasets has them: train[:10%], a+b.")
    revision: Text | None = option(None, "Commit or tag of a hub data set.")
    format: Literal[FORMATS] = option("auto")  # type: ignore[valid-type]
    columns: dict[str, Text | None] = option(dict)
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = option(dict)
    chat: Literal["auto"] | bool = option("auto")
    separator: str = option("\n")
    weight: float = option(1.0, gt=0, le=1000)
    max_rows: Count | None = option(None, "Take only the first rows of the source.")


def _short_for(key: str, section: Any, *, several: bool = False) -> BeforeValidator:
    """Let a text stand for a section with that one key, and of `several` sections one for a list of them."""
    def write_out(value: Any) -> Any:
        if not several:
            return {key: value} if isinstance(value, str) else value
        return [{key: one} if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])]
    one = Text | section
    many = one | Annotated[list[one], Field(min_length=1)]  # type: ignore[valid-type]
    return BeforeValidator(write_out, json_schema_input_type=many if several else one)


Sources = Annotated[list[DataSource], Field(min_length=1), _short_for("path", DataSource, several=True)]
Texts = Text | Annotated[list[Text], Field(min_length=1)]
TextList = Annotated[list[Text], Field(min_length=1), BeforeValidator(
    lambda value: value if isinstance(value, list) else [value], json_schema_input_type=Texts)]


class Price(Options):
    input: Annotated[float, Field(ge=0)] = option(..., "Of a million tokens sent, in any currency.")
    output: Annotated[float, Field(ge=0)] = option(..., "Of a million tokens received.")


class FeedbackModel(Options):
    """What answers, criticises or judges; exactly one of `model`, `url` and `replay` is given."""

    model: Text | None = option(None)
    engine: Literal["transformers", "continuous", "vllm"] = option("transformers", "What runs `model`.")
    url: Text | None = option(None, "Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.")
    name: Text | None = option(None, "The model's name at the server.")
    api: Literal["chat", "completions"] = option("chat")
    logprobs: bool = option(True, "Ask the server for log-probabilities of the options; false reads its text instead.")
    api_key_env: str | None = option(None, pattern='^[A-Za-z_][A-Za-z0-9_]*$')
    concurrency: int = option(8, "Requests under way at one time.", ge=1, le=1024)
    requests_per_minute: Positive | None = option(None)
    timeout: Positive = option(60.0, "Seconds that one request may take.")
    retries: int = option(6, ge=0)
    max_tokens_total: Count | None = option(None)
    max_cost: Positive | None = option(None, "Cost after which the stage stops and keeps what it has; needs price.")
    price: Price | None = option(None, "What tokens cost: {input, output}, per million.")
    replay: Text | None = option(None, "A file of labels that are published already (a judge only).")


Feedback = Annotated[FeedbackModel, _short_for("model", FeedbackModel)]


class TeacherOptions(FeedbackModel):
    """What an sft stage with objective: distill learns from; exactly one of `model` and `url` is given."""

    context: Text | None = option(None)
    beta: float = option(0.0, ge=0, le=1)
    temperature: Positive = option(1.0)
    top_k: Count | None = option(None)
    on_policy: float = option(0.0, ge=0, le=1)
    max_new_tokens: Count = option(128, "Longest answer of the student's own, in tokens.")


Teacher = Annotated[TeacherOptions, _short_for("model", TeacherOptions)]
Temperature = Annotated[float, Field(ge=0, description="Of sampled texts; 0 takes the likeliest token each time.")]
TopP = Annotated[float, Field(gt=0, le=1, description="Samples from the likeliest tokens with this share; 1: all.")]
TopK = Annotated[int, Field(ge=0, description="Samples from so many of the likeliest tokens; 0: all.")]


class SampleOptions(Options):
    num: int = option(4, "Prompts answered; 0 switches samples off.", ge=0, le=256)
    max_new_tokens: Count | None = option(None)
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0


class RewardSource(Options):
    """One reward, or one part of a weighted sum; exactly one of `model`, `function`, `judge`, `verify` is given."""

    model: Text | None = option(None)
    function: Text | None = option(None)
    judge: Feedback | None = option(None)
    constitution: Texts | None = option(None)
    verify: Literal["math", "exact", "regex", "json_schema", "ifeval", "code"] | None = option(None)
    column: Text | None = option(None, "The column that `verify` reads; omitted: the one named there.")
    extract: Text | None = option(None)
    timeout: Positive = option(5.0, "Seconds that `verify` may take for one answer; then it is wrong.")
    weight: float = option(1.0, "Factor of this part in the sum.")


# A kind of reward is a file of this directory; one without a key above takes a text or a section that it reads itself.
_kinds = {path.stem: path for path in sorted(_ROOMS.joinpath("rewards", "kinds").glob("[a-z]*.py"))}
_more_kinds: Any = {
    kind: (Text | dict[str, Any] | None, option(None, path.read_text("utf-8").split('"""')[1].splitlines()[0]))
    for kind, path in _kinds.items() if kind not in RewardSource.model_fields
}
if _more_kinds and not TYPE_CHECKING:
    RewardSource = create_model("RewardSource", __base__=RewardSource, **_more_kinds)
REWARD_KINDS = tuple(key for key in RewardSource.model_fields if key in _kinds)
VERIFY_KEYS = ("column", "extract", "timeout")
Rewards = Annotated[list[RewardSource], Field(min_length=1), _short_for("model", RewardSource, several=True)]


class RoundOptions(Options):
    """A chain of label and training stages that is repeated, each time on answers of the newest policy."""

    num: int = option(..., "Rounds in all; the stages of later ones are named NAME-2, NAME-3, ...", ge=2, le=99)
    rows: Literal["newest", "all"] = option("newest", "Train on the labels of the round, or on those before it too.")
    restart: bool = option(False)


class ChainOptions(RoundOptions):
    stages: Annotated[list[Text], Field(min_length=2)] = option(...)


# A metric is a file of this directory; nothing is imported to know its name.
METRICS = tuple(path.stem for path in sorted(_ROOMS.joinpath("evaluate", "metrics").glob("[a-z]*.py")))


class FrontierOptions(Options):
    """The most reward at a KL, from answers of the model that others start from; measured on that model alone."""

    betas: Annotated[list[Positive], Field(min_length=1)] = option(lambda: [1.0, 0.5, 0.2, 0.1, 0.05])
    answers: int = option(256, ge=2)
    best_of: list[Count] = option(list, "Best of N of these answers, for each N.")


EVALUATED = ("reference", "reward", "against", "judge")  # keys of evaluate: that may name a stage


class EvaluationSampler(Options):
    engine: Literal["transformers", "continuous"] = option("transformers", "What samples the answers.")


class EvaluateOptions(Options):
    """What `alignkit eval` measures; every name of a model may be a stage of the recipe."""

    data: Sources | None = option(None)
    max_rows: Count = option(200, "Rows used: the first ones of the data.")
    metrics: Annotated[list[Literal[METRICS]], Field(min_length=1)] | None = option(None)  # type: ignore[valid-type]
    reference: Text | None = option(None)
    reward: Text | None = option(None)
    start: bool | None = option(None)
    against: Text | None = option(None, "The other side of a win rate: a stage, a run, a model.")
    judge: Feedback | None = option(None)
    constitution: Texts | None = option(None)
    best_of: list[Count] = option(list, "Measure the best of N sampled answers by reward, for each N.")
    frontier: FrontierOptions | None = option(None)
    tasks: list[Text] = option(list, "Few-shot tasks: JSONL of {context, completion}, or lm_eval:TASK.")
    shots: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = option(lambda: [0])
    samples: Count = option(1, "Answers sampled per prompt for kl and answers.")
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    num_beams: Count = option(1, "Beams of the search for the answers that overlap compares; 1 is greedy.")
    max_new_tokens: Count | None = option(None)
    generation: EvaluationSampler = option(EvaluationSampler, "Where answers are sampled.")
    batch_size: Count = option(16, "Rows per forward pass.")
    resamples: int = option(1000, "Bootstrap resamples behind an interval.", ge=100)


class RecipeOptions(Options):
    """The top level of a recipe; every other key is the name of a stage."""

    name: str | None = option(None, pattern="^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    runs_dir: Text | None = option(None)
    seed: int = option(0, "Fixes initial weights, order of rows, dropout and samples.", ge=0, lt=2**32)
    model: ModelOptions = option(..., "The base model that the stages start from.")
    lora: LoraOptions | None = option(None, "Train adapters instead of all weights; {} takes the defaults below.")
    launch: LaunchOptions = option(LaunchOptions, "Where it runs.")
    data: Sources | None = option(None, "Training rows of every stage that gives none of its own.")
    eval: Share | Sources | None = option(None, "Held-out rows of every stage that gives none of its own.")
    stages: Annotated[list[Text], Field(min_length=1)] | None = option(None)
    rounds: ChainOptions | None = option(None)
    sweep: dict[str, list[Any] | dict[str, Any] | None] | None = option(None)
    evaluate: EvaluateOptions = option(EvaluateOptions, "What `alignkit eval` measures.")
