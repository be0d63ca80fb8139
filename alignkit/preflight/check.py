"""`alignkit check`: everything about a recipe that can be known without training, all problems at once.

It reads every row with the encoder that training uses and looks at models through their small files; it loads no
weights and leaves nothing behind.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from alignkit.errors import AlignKitError, EnvironmentProblem, ModelError, Problem, UsageError
from alignkit.preflight.disk import checkpoint_bytes, require_space
from alignkit.preflight.doctor import Table
from alignkit.preflight.feedback import describe_evaluation, describe_feedback, require_feedback
from alignkit.preflight.lineage import list_data, list_needs, without_unmade
from alignkit.preflight.rows import describe_rows, find_doubts
from alignkit.preflight.versions import require_versions
from alignkit.recipe import Recipe, Stage, resolve
from alignkit.recipe.optimizers import find_optimizer
from alignkit.recipe.schema import FEEDBACK, LabelOptions, PpoOptions
from alignkit.rewards.kinds import describe_reward, list_sources
from alignkit.runs.form import form_of, require_form

if TYPE_CHECKING:
    from alignkit.models.chat import Chat

_Item = TypeVar("_Item")

_GIB = 2**30
_TRACKERS = {  # of report_to: what is imported, what is installed
    **{name: (name, "'alignkit[trackers]'") for name in ("tensorboard", "trackio", "wandb")},
    **{name: (name, name) for name in ("clearml", "codecarbon", "dagshub", "dvclive", "mlflow", "neptune", "swanlab")},
    "azure_ml": ("azureml", "azureml-core"), "comet_ml": ("comet_ml", "comet-ml"), "flyte": ("flytekit", "flytekit"),
}  # fmt: skip


@dataclass
class StageCheck:
    """What was found about one stage: facts, doubts, and what would stop it."""

    name: str
    method: str
    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)  # exit code 2
    environment: list[str] = field(default_factory=list)  # exit code 8

    def noting(self) -> _Noting:
        """Return a context that notes what stops the stage, and goes on after it."""
        return _Noting(self)


class _Noting:
    """A context that turns the errors a user can act on into findings; bugs pass through."""

    def __init__(self, check: StageCheck) -> None:
        self._check = check

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, EnvironmentProblem):
            self._check.environment.append(str(error))
        elif isinstance(error, UsageError):
            self._check.problems += error.problems
        return isinstance(error, EnvironmentProblem | UsageError)


@dataclass
class CheckReport:
    """The stages of a recipe in order."""

    recipe: str
    stages: list[StageCheck]
    environment: list[str]

    def error(self) -> AlignKitError | None:
        """Return the error to end with: 2 for the user's mistakes, 8 when only this machine is wrong."""
        problems = _unique(problem for stage in self.stages for problem in stage.problems)
        missing = _unique([*self.environment, *(line for stage in self.stages for line in stage.environment)])
        if problems:
            return UsageError([*problems, *(Problem(line) for line in missing)])
        return EnvironmentProblem("\n".join(missing)) if missing else None

    def tables(self) -> list[Table]:
        """Return the report for a terminal."""
        tables = []
        for stage in self.stages:
            rows = [[name, value] for name, value in stage.facts.items()]
            rows += [["warning", text] for text in stage.warnings]
            state = "would not run" if stage.problems or stage.environment or self.environment else "would run"
            tables.append((f"{stage.name} ({stage.method}): {state}", ["what", "found"], rows))
        return tables

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for --json."""
        return asdict(self) | {"ok": self.error() is None}


def check_recipe(recipe: Recipe, *, trust_code: bool = False) -> CheckReport:
    """Check every stage of a recipe; never raises for what it finds.

    Reads all rows into a temporary directory that is removed again.
    """
    report = CheckReport(recipe.path, [], [])
    try:
        require_versions()
    except EnvironmentProblem as error:
        report.environment.append(str(error))
        return report
    forms: dict[str, str | None] = {}  # chat or text, by stage
    for name in recipe.stage_names:
        check = StageCheck(name, recipe.stages[name].options.method)
        report.stages.append(check)
        with check.noting():
            stage = resolve(recipe, name, trust_code=trust_code)
            forms[name] = _check_stage(stage, check)
            require_form(stage, forms[name], forms)
    if recipe.evaluate.constitution is not None:
        report.stages.append(check := StageCheck("evaluate", "eval"))
        with check.noting():
            check.facts |= describe_evaluation(recipe)
    return report


def _check_stage(stage: Stage, check: StageCheck) -> str | None:
    """Note what is found; the result is the form of the rows, where they can be read."""
    stage, check.facts["starts from"] = start_today(stage)
    with check.noting():
        _check_start(stage, check)
    with check.noting():
        _check_feedback(stage, check)
    if stage.method in FEEDBACK:
        _check_sources(stage, check)
        return None
    _check_rewards(stage, check)
    with check.noting():
        _check_device(stage, check)
    with check.noting():
        check_packages(stage)
    chat: Chat | None = None
    with check.noting():
        chat = _check_tokenizer(stage, check)
    if chat is None:
        with check.noting():
            _read_rows_alone(stage, check)
        return None
    with check.noting():
        _check_model(stage, check, chat)
    ready = _use_made_rows(stage, check)
    return None if ready is None else _check_rows(ready, check, chat)


def _use_made_rows(stage: Stage, check: StageCheck) -> Stage | None:
    """Return the stage as it can be checked today: without the rows that other stages have yet to make."""
    options = stage.training
    data = without_unmade(options.data, stage)
    held_out = without_unmade(options.eval, stage) if isinstance(options.eval, list) else []
    for need in list_needs(stage):
        if need.rows and not need.is_made():
            check.facts[f"data {need.path}"] = f"of {need.stage}, not made yet: not checked"
    if not data:
        return None
    changed: dict[str, Any] = {"data": data}
    if isinstance(options.eval, list):
        changed["eval"] = held_out or None
    return replace(stage, options=options.model_copy(update=changed))


def _check_feedback(stage: Stage, check: StageCheck) -> None:
    """Look at constitutions, judges and generators; those that a stage of the recipe makes may still come."""
    require_feedback(stage, coming=tuple(stage.source_stages.values()))
    check.facts |= describe_feedback(stage)


def _check_sources(stage: Stage, check: StageCheck) -> None:
    """Read the rows that a stage asks about, as they are."""
    from alignkit.data import DataReport, Rejects, read_rows
    from alignkit.data.sources import locate

    given = isinstance(stage.options, LabelOptions) and stage.options.answers == "given"
    methods = {"data": "rm" if given else stage.method, "mix": "rm", "helpful.data": stage.method}
    for key, source in list_data(stage):
        with check.noting():
            if key in methods and without_unmade([source], stage):
                report = DataReport()
                for _ in read_rows(stage, [source], report=report, rejects=Rejects(), method=methods[key]):
                    pass
                check.facts[f"{key} {source.path}"] = f"{report.read} rows read, {report.rows} kept"
            elif key not in methods:
                locate([source])


def _read_rows_alone(stage: Stage, check: StageCheck) -> None:
    """Check the rows without a tokenizer: formats, places and counts, no lengths."""
    from alignkit.data import DataReport, Rejects, read_rows

    report = DataReport()
    sources = without_unmade(stage.options.data, stage)
    for _ in read_rows(stage, sources, report=report, rejects=Rejects()) if sources else ():
        pass
    check.facts["data"] = f"{report.read} rows read, {report.rows} kept; lengths not checked, there is no tokenizer"


def start_today(stage: Stage) -> tuple[Stage, str]:
    """Let a stage that starts from an untrained one start from the base, and say what it starts from."""
    if stage.start_stage and stage.start_dir and not Path(stage.start_dir).is_dir():
        said = f"{stage.start_stage}, not trained yet: looked at with {stage.model.path}"
        return replace(stage, start_dir=None, start_stage=None), said
    return stage, stage.start_dir or stage.model.path


def _check_start(stage: Stage, check: StageCheck) -> None:
    from alignkit.models.files import find_model_dir, inspect_model_dir

    source = stage.start_dir or stage.model.path
    directory = find_model_dir(source)
    if directory is None or (stage.model.init == "scratch" and not stage.start_dir):
        return
    files = inspect_model_dir(directory, trust_code=stage.trust_code)
    check.facts["starts from"] += f" ({files.kind}{', a reward model' if files.reward else ''})"
    if files.reward and stage.method != "rm":
        raise ModelError(
            f"{source} is a reward model; {stage.method} needs a policy to start from",
            where=stage.where(f"{stage.name}.start_from"),
        )


def _check_rewards(stage: Stage, check: StageCheck) -> None:
    for key, source in list_sources(stage):
        with check.noting():
            what = describe_reward(stage, key, source)
            check.facts[key] = f"{check.facts[key]}; {what}" if key in check.facts else what


def _check_device(stage: Stage, check: StageCheck) -> None:
    from alignkit.preflight.machine import try_quantization
    from alignkit.train.arguments import micro_batch_size, pick_device

    device = pick_device(stage)
    check.facts["device"] = device
    check.facts["batch"] = f"{stage.training.batch_size} rows a step, {micro_batch_size(stage)} at a time"
    if stage.model.quantization != "none":
        kind = stage.model.quantization
        ability = try_quantization(kind, device)
        if not ability.works:
            raise EnvironmentProblem(f"model.quantization {kind} does not work here: {ability.note}")


def check_packages(stage: Stage) -> None:
    """Raise EnvironmentProblem for a tracker or an optimizer whose package is not installed here."""
    asked = stage.trainer.get("report_to") or []
    optimizer = stage.trainer.get("optim", "")
    package = find_optimizer(optimizer).package
    wanted = [("report_to", name, *_TRACKERS[name]) for name in ([asked] if isinstance(asked, str) else asked)
              if name in _TRACKERS]  # fmt: skip
    wanted += [("optim", optimizer, *package)] if package else []
    problems = [
        f"{stage.where(f'{stage.name}.{key}')}: {key} {name} needs {module}, not installed here; pip install {install}"
        for key, name, module, install in wanted
        if importlib.util.find_spec(module) is None
    ]
    if problems:
        raise EnvironmentProblem("\n".join(problems))


def _check_tokenizer(stage: Stage, check: StageCheck) -> Chat:
    from alignkit.models.chat import Chat
    from alignkit.models.tokens import load_tokenizer

    tokenizer = load_tokenizer(stage)
    name = stage.model.chat_template or "the tokenizer's own"
    chat = Chat(tokenizer, name=name)
    ends = f"eos {tokenizer.eos_token}, pad {tokenizer.pad_token}"
    check.facts["tokenizer"] = f"{len(tokenizer)} tokens, {ends}"
    if chat.has_template:
        check.facts["chat template"] = f"{name}; {chat.template.describe()}"
    return chat


def _check_model(stage: Stage, check: StageCheck, chat: Chat) -> None:
    from alignkit.models.bases import pick_precision
    from alignkit.models.skeleton import build_skeleton

    skeleton = build_skeleton(stage, chat.tokenizer)
    check.warnings += skeleton.doubts
    if skeleton.notes:
        check.facts["not used"] = "; ".join(skeleton.notes)
    if stage.model.quantization != "none":
        check.facts["quantised"] = f"{skeleton.four_bit_share:.1%} of the weights ({stage.model.quantization})"
    dtype = str(pick_precision(stage).dtype).removeprefix("torch.")
    num_trained = skeleton.num_trained
    if isinstance(stage.options, PpoOptions) and stage.options.advantage == "gae":
        num_trained *= 2  # the critic is as large as the policy, in adapters or in weights
    # Rotation comes after the new checkpoint is sealed, so for a moment there is one more than is kept.
    num_checkpoints = stage.training.keep_checkpoints + 1
    needed = int(1.1 * num_checkpoints * checkpoint_bytes(num_trained, dtype=dtype))
    check.facts["trained parameters"] = f"{num_trained:,}"
    free = require_space(Path(stage.run_dir), needed, num_checkpoints=num_checkpoints)
    check.facts["disk"] = f"needs {needed / _GIB:.2f} GiB, {free / _GIB:.1f} GiB free"


def _check_rows(stage: Stage, check: StageCheck, chat: Chat) -> str | None:
    """Encode all rows as training would; after rows that do not fit, once more without them, for the rest's sake."""
    before = len(check.problems)
    with check.noting():
        return _encode(stage, check, chat)
    if len(check.problems) > before and stage.options.on_bad_row == "error":
        lenient = stage.options.model_copy(update={"on_bad_row": "skip"})
        with check.noting():
            _encode(replace(stage, options=lenient), check, chat)
    return None


def _encode(stage: Stage, check: StageCheck, chat: Chat) -> str | None:
    from alignkit.data import Rejects
    from alignkit.train.tables import prepare_tables

    rejects = Rejects()
    with tempfile.TemporaryDirectory(prefix="alignkit-check-") as directory:
        tables = prepare_tables(stage, chat, Path(directory), rejects=rejects)
        check.facts |= describe_rows(tables)
    report = tables.report.to_dict()
    check.warnings += [*tables.report.remarks(), *find_doubts(report)]
    return form_of(report)


def _unique(items: Iterable[_Item]) -> list[_Item]:
    return list(dict.fromkeys(items))
