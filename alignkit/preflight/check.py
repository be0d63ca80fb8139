"""`alignkit check`: everything about a recipe that can be known without training, all problems at once.

It looks at two depths. First it goes through `requirements` for every stage, as a stage does that is about to start;
only where nothing of that is wrong it reads every row with the encoder that training uses and looks at models through
their small files. It loads no weights and leaves nothing behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar
from urllib.parse import urlsplit

from alignkit.errors import AlignKitError, EnvironmentProblem, Problem, UsageError
from alignkit.feedback.constitution import load_constitution
from alignkit.feedback.server import find_key
from alignkit.feedback.writer import describe_model
from alignkit.models.files import find_model_dir, inspect_model_dir
from alignkit.preflight.doctor import Table, require_versions, try_quantization
from alignkit.preflight.requirements import (
    list_data,
    list_feedback_models,
    list_needs,
    require_held_out,
    require_ready,
    without_unmade,
)
from alignkit.preflight.rows import describe_rows, find_doubts
from alignkit.recipe import Recipe, Stage, resolve
from alignkit.recipe.schema import FEEDBACK, CritiqueOptions, LabelOptions, PpoOptions
from alignkit.rewards.kinds import describe_reward, list_sources
from alignkit.runs.form import form_of, require_form

if TYPE_CHECKING:
    from alignkit.models.chat import Chat

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")

_GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class StageCheck:
    """What was found about one stage: facts, doubts, and what would stop it."""

    name: str
    method: str
    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)  # exit code 2
    environment: list[str] = field(default_factory=list)  # exit code 8

    def note(self, look: Callable[_Given, _Found], *given: _Given.args, **named: _Given.kwargs) -> _Found | None:
        """Call a function; None where it raises what a user can act on, which is noted. Bugs pass through."""
        try:
            return look(*given, **named)
        except EnvironmentProblem as error:
            self.environment.append(str(error))
        except UsageError as error:
            self.problems += error.problems
        return None


@dataclass
class CheckReport:
    """The stages of a recipe in order."""

    recipe: str
    stages: list[StageCheck]
    environment: list[str]

    def error(self) -> AlignKitError | None:
        """The error to end with: 2 for the user's mistakes, 8 when only this machine is wrong."""
        problems = dict.fromkeys(problem for stage in self.stages for problem in stage.problems)
        found = [*self.environment, *(line for stage in self.stages for line in stage.environment)]
        missing = dict.fromkeys(line for text in found for line in text.split("\n"))
        if problems:
            return UsageError([*problems, *(Problem(line) for line in missing)])
        return EnvironmentProblem("\n".join(missing)) if missing else None

    def tables(self) -> list[Table]:
        """The report for a terminal."""
        tables = []
        for stage in self.stages:
            rows = [[name, value] for name, value in stage.facts.items()]
            rows += [["warning", text] for text in stage.warnings]
            state = "would not run" if stage.problems or stage.environment or self.environment else "would run"
            if rows:
                tables.append((f"{stage.name} ({stage.method}): {state}", ["what", "found"], rows))
        return tables

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return asdict(self) | {"ok": self.error() is None}


def check_recipe(recipe: Recipe, *, trust_code: bool = False) -> CheckReport:
    """Check every stage of a recipe; never raises for what it finds.

    Reads all rows into a temporary directory that is removed again.
    """
    report = CheckReport(recipe.path, [], [])
    try:
        require_versions()
    except EnvironmentProblem as error:  # libraries that may not be loaded
        report.environment.append(str(error))
        return report
    stages: list[tuple[Stage, StageCheck]] = []
    for name in recipe.stage_names:
        report.stages.append(check := StageCheck(name, recipe.stages[name].options.method))
        if (stage := check.note(resolve, recipe, name, trust_code=trust_code)) is not None:
            stages.append((stage, check))
            unmade = [need.stage for need in list_needs(stage) if not need.is_made()]
            check.note(require_ready, stage, coming=unmade)
    if recipe.evaluates:
        report.stages.append(check := StageCheck("evaluate", "eval"))
        check.facts |= check.note(describe_evaluation, recipe) or {}
        check.warnings += check.note(require_held_out, recipe, recipe.order) or []
    if any(check.problems for check in report.stages):
        return report
    forms: dict[str, str | None] = {}  # chat or text, by stage
    for stage, check in stages:
        forms[stage.name] = check.note(_check_stage, stage, check)
        check.note(require_form, stage, forms[stage.name], forms)
    return report


def _check_stage(stage: Stage, check: StageCheck) -> str | None:
    """Note what is found; the result is the form of the rows, where they can be read."""
    stage, check.facts["starts from"] = start_today(stage)
    scratch = stage.model.init == "scratch" and not stage.start_dir
    if (directory := find_model_dir(stage.start_dir or stage.model.path)) and not scratch:
        files = inspect_model_dir(directory, trust_code=stage.trust_code)
        check.facts["starts from"] += f" ({files.kind}{', a reward model' if files.reward else ''})"
    check.facts |= describe_feedback(stage)
    if stage.method in FEEDBACK:
        _check_sources(stage, check)
        return None
    for key, source in list_sources(stage):
        if what := check.note(describe_reward, stage, key, source):
            check.facts[key] = f"{check.facts[key]}; {what}" if key in check.facts else what
    check.note(_check_device, stage, check)
    chat = check.note(_check_tokenizer, stage, check)
    if chat is None:
        check.note(_read_rows_alone, stage, check)
        return None
    check.note(_check_model, stage, check, chat)
    ready = _use_made_rows(stage, check)
    return None if ready is None else _check_rows(ready, check, chat)


def describe_feedback(stage: Stage) -> dict[str, str]:
    """Say what a stage asks for feedback, and by how many principles."""
    options = stage.options
    facts = {key: describe_model(model, stage) for key, model in list_feedback_models(stage)}
    if isinstance(options, CritiqueOptions | LabelOptions) and options.constitution is not None:
        part: Literal["critique", "comparison"] = "critique" if isinstance(options, CritiqueOptions) else "comparison"
        facts["principles"] = str(len(load_constitution(options.constitution, needs=part).principles))
    if isinstance(options, CritiqueOptions) and options.replay:
        facts["replay"] = ", ".join(options.replay)
    return facts


def describe_evaluation(recipe: Recipe) -> dict[str, str]:
    """Say who judges the win rates of `evaluate:`, and by how many principles; nothing without those.

    Raises RecipeError for a constitution that is none and for a key that nobody has set.
    """
    judge, constitution = recipe.evaluate.judge, recipe.evaluate.constitution
    if judge is None or constitution is None:
        return {}
    if judge.url is not None:
        find_key(judge, key="evaluate.judge", where=recipe.origins.get("evaluate.judge.api_key_env"))
    principles = load_constitution(constitution, needs="comparison").principles
    who = judge.model or f"{judge.name} at {urlsplit(judge.url or '').netloc}"
    return {"judge": who, "principles": str(len(principles))}


def _use_made_rows(stage: Stage, check: StageCheck) -> Stage | None:
    """Leave out the rows that other stages have yet to make; None where no others are left."""
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


def _check_sources(stage: Stage, check: StageCheck) -> None:
    """Read the rows that a stage asks about, as they are."""
    from alignkit.data import DataReport, Rejects, read_rows

    given = isinstance(stage.options, LabelOptions) and stage.options.answers == "given"
    methods = {"data": "rm" if given else stage.method, "mix": "rm", "helpful.data": stage.method}
    for key, source in list_data(stage):
        if key in methods and without_unmade([source], stage):
            report = DataReport()
            rows = read_rows(stage, [source], report=report, rejects=Rejects(), method=methods[key])
            if check.note(deque, rows, maxlen=0) is not None:
                check.facts[f"{key} {source.path}"] = f"{report.read} rows read, {report.rows} kept"


def _read_rows_alone(stage: Stage, check: StageCheck) -> None:
    """Check the rows without a tokenizer: formats, places and counts, no lengths."""
    from alignkit.data import DataReport, Rejects, read_rows

    report = DataReport()
    sources = without_unmade(stage.options.data, stage)
    deque(read_rows(stage, sources, report=report, rejects=Rejects()) if sources else (), maxlen=0)
    check.facts["data"] = f"{report.read} rows read, {report.rows} kept; lengths not checked, there is no tokenizer"


def start_today(stage: Stage) -> tuple[Stage, str]:
    """Let a stage that starts from an untrained one start from the base, and say what it starts from."""
    if stage.start_stage and stage.start_dir and not Path(stage.start_dir).is_dir():
        said = f"{stage.start_stage}, not trained yet: looked at with {stage.model.path}"
        return replace(stage, start_dir=None, start_stage=None), said
    return stage, stage.start_dir or stage.model.path


def _check_device(stage: Stage, check: StageCheck) -> None:
    from alignkit.train.arguments import micro_batch_size, pick_device

    device = pick_device(stage)
    check.facts["device"] = device
    check.facts["batch"] = f"{stage.training.batch_size} rows a step, {micro_batch_size(stage)} at a time"
    if stage.model.quantization != "none":
        kind = stage.model.quantization
        ability = try_quantization(kind, device)
        if not ability.works:
            raise EnvironmentProblem(f"model.quantization {kind} does not work here: {ability.note}")


def _check_tokenizer(stage: Stage, check: StageCheck) -> Chat:
    from alignkit.models.tokens import load_chat

    chat = load_chat(stage)
    tokenizer = chat.tokenizer
    check.facts["tokenizer"] = f"{len(tokenizer)} tokens, eos {tokenizer.eos_token}, pad {tokenizer.pad_token}"
    if chat.has_template:
        check.facts["chat template"] = f"{chat.template.name}; {chat.template.describe()}"
    return chat


def _check_model(stage: Stage, check: StageCheck, chat: Chat) -> None:
    from alignkit.models.load import pick_precision
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


def checkpoint_bytes(num_trained: int, *, dtype: str) -> int:
    """Size of a checkpoint, from above: the trained weights and AdamW's two values for each, in one dtype."""
    return 3 * num_trained * _BYTES[dtype]


def require_space(run_dir: Path, needed_bytes: int, *, num_checkpoints: int) -> int:
    """Return the free bytes where the run will be written; raises EnvironmentProblem when they are too few."""
    existing = next(place for place in (run_dir.absolute(), *run_dir.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise EnvironmentProblem(
            f"{existing} has {free / _GIB:.2f} GiB free; {num_checkpoints} checkpoints and the final model need about "
            f"{needed_bytes / _GIB:.2f} GiB; free some, lower keep_checkpoints, or choose another --out"
        )
    return free


def _check_rows(stage: Stage, check: StageCheck, chat: Chat) -> str | None:
    """Encode all rows as training would; after rows that do not fit, once more without them, for the rest's sake."""
    before = len(check.problems)
    form = check.note(_encode, stage, check, chat)
    if len(check.problems) > before and stage.options.on_bad_row == "error":
        lenient = stage.options.model_copy(update={"on_bad_row": "skip"})
        check.note(_encode, replace(stage, options=lenient), check, chat)
    return form


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
