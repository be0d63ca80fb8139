"""`alignkit check` and `alignkit preview`: all about a recipe and its rows that can be known without training."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from alignkit.data.audit import audit_rows, compare_settings
from alignkit.errors import AlignKitError, EnvironmentProblem, Problem, RecipeError, UsageError
from alignkit.feedback.constitution import load_constitution
from alignkit.feedback.server import find_key
from alignkit.feedback.stage import describe_model
from alignkit.models.files import find_model_dir, inspect_model_dir
from alignkit.preflight import requirements
from alignkit.preflight.doctor import Table, require_versions, try_quantization
from alignkit.recipe import Recipe, Stage, resolve
from alignkit.recipe.methods import FEEDBACK, CritiqueOptions, LabelOptions, PpoOptions, TrainOptions
from alignkit.recipe.schema import DataSource
from alignkit.report.text import wilson
from alignkit.rewards.kinds import describe_reward
from alignkit.runs.directory import form_of, require_form
from alignkit.runs.files import describe_bytes

if TYPE_CHECKING:
    from alignkit.models.chat import Chat
    from alignkit.train.tables import Tables

_GIB = 2**30
_LOOKED_AT = 10_000  # rows whose tokens are looked at for faults
# Beyond these a run still works, but its result may not mean what it seems to.
_MANY_DUPLICATES = 0.01
_LENGTH_BIAS = 0.65
_FORMS = {"chat": "turns of the chat template", "text": "text, prompt and answer joined", "raw": "raw text"}


@dataclass
class StageCheck:
    """What was found about one stage: facts, doubts, and what would stop it."""

    name: str
    method: str
    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)  # exit code 2
    environment: list[str] = field(default_factory=list)  # exit code 8
    num_parameters: int | None = None  # of its model, where it is known

    def note(self, look: Callable[..., Any], *given: Any, **named: Any) -> Any:
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
    strict: bool = False  # warnings are mistakes

    def error(self) -> AlignKitError | None:
        """The error to end with: 2 for the user's mistakes, 8 when only this machine is wrong."""
        problems = dict.fromkeys(problem for stage in self.stages for problem in stage.problems)
        found = [*self.environment, *(line for stage in self.stages for line in stage.environment)]
        missing = dict.fromkeys(line for text in found for line in text.split("\n"))
        if self.strict:
            problems |= dict.fromkeys(Problem(text, stage.name) for stage in self.stages for text in stage.warnings)
        if problems:
            return UsageError([*problems, *map(Problem, missing)])
        return EnvironmentProblem("\n".join(missing)) if missing else None

    def tables(self) -> list[Table]:
        tables = []
        for stage in self.stages:
            rows = [[name, value] for name, value in stage.facts.items()]
            rows += [["warning", text] for text in stage.warnings]
            state = "would not run" if stage.problems or stage.environment or self.environment else "would run"
            tables.append((f"{stage.name} ({stage.method}): {state}", ["what", "found"], rows))
        return [table for table in tables if table[2]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.error() is None}


def check_recipe(recipe: Recipe, *, trust_code: bool = False, strict: bool = False) -> CheckReport:
    """Check every stage of a recipe; never raises for what it finds."""
    report = CheckReport(recipe.path, [], [], strict)
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
            unmade = [need.stage for need in requirements.list_needs(stage) if not need.is_made()]
            check.note(requirements.require_ready, stage, coming=unmade)
    if recipe.evaluates:
        report.stages.append(check := StageCheck("evaluate", "eval"))
        check.facts |= check.note(describe_evaluation, recipe) or {}
        check.warnings += check.note(requirements.require_held_out, recipe, recipe.order) or []
    if any(check.problems for check in report.stages):
        return report
    forms: dict[str, str | None] = {}  # chat or text, by stage
    for stage, check in stages:
        forms[stage.name] = check.note(_check_stage, stage, check)
        check.note(require_form, stage, forms[stage.name], forms)
    read = [(_with_made_rows(stage), check) for stage, check in stages if stage.method not in FEEDBACK]
    audited = [stage for stage, check in read if stage.options.data and not check.problems]
    evaluation = (recipe.evaluate.data or ()) if recipe.evaluates else ()
    advice = report.stages[-1].note(audit_rows, audited, evaluation, max_rows=recipe.evaluate.max_rows) or {}
    for stage, check in read:
        check.warnings += compare_settings(stage, num_parameters=check.num_parameters)
    for check in report.stages:
        check.warnings += advice.get(check.name, [])
    return report


def _check_stage(stage: Stage, check: StageCheck) -> str | None:
    """Note what is found; the result is the form of the rows, where they can be read."""
    stage, check.facts["starts from"] = start_today(stage)
    scratch = stage.model.init == "scratch" and not stage.start_dir
    if (directory := find_model_dir(stage.start_dir or stage.model.path)) and not scratch:
        files = inspect_model_dir(directory, trust_code=stage.trust_code)
        kind = ", a classifier" if files.head else ", a reward model" if files.reward else ""
        check.facts["starts from"] += f" ({files.kind}{kind})"
    check.facts |= describe_feedback(stage)
    if stage.method in FEEDBACK:
        given = isinstance(stage.options, LabelOptions) and stage.options.answers == "given"
        asked = "rm" if given else stage.method
        _read_rows(stage, check, {"data": asked, "mix": "rm", "helpful.data": stage.method})
        return None
    for key, source in stage.rewards:
        if what := check.note(describe_reward, stage, key, source):
            check.facts[key] = f"{check.facts[key]}; {what}" if key in check.facts else what
    check.note(_check_device, stage, check)
    chat = check.note(_check_tokenizer, stage, check)
    if chat is None:
        _read_rows(stage, check, {"data": stage.method}, "; lengths not checked, there is no tokenizer")
        return None
    check.note(_check_model, stage, check, chat)
    for need in requirements.list_needs(stage):
        if need.rows and not need.is_made():
            check.facts[f"data {need.path}"] = f"of {need.stage}, not made yet: not checked"
    stage = _with_made_rows(stage)
    if not stage.options.data:
        return None
    before = len(check.problems)
    form = check.note(_encode, stage, check, chat)
    if len(check.problems) > before and stage.options.on_bad_row == "error":  # and once more for the other rows' sake
        lenient = stage.options.model_copy(update={"on_bad_row": "skip"})
        check.note(_encode, replace(stage, options=lenient), check, chat)
    return form


def _with_made_rows(stage: Stage) -> Stage:
    """Leave out the files of rows that earlier stages have yet to write."""
    made: dict[str, Any] = {"data": requirements.without_unmade(stage.options.data, stage)}
    if isinstance(held_out := stage.training.eval, list):
        made["eval"] = requirements.without_unmade(held_out, stage) or None
    return replace(stage, options=stage.options.model_copy(update=made))


def describe_feedback(stage: Stage) -> dict[str, str]:
    """Say what a stage asks for feedback, and by how many principles."""
    options = stage.options
    facts = {key: describe_model(model, stage) for key, model in requirements.list_feedback_models(stage)}
    if isinstance(options, CritiqueOptions | LabelOptions) and options.constitution is not None:
        needs: Literal["critique", "comparison"] = "critique" if stage.method == "critique" else "comparison"
        facts["principles"] = str(len(load_constitution(options.constitution, needs=needs).principles))
    if isinstance(options, CritiqueOptions) and options.replay:
        facts["replay"] = ", ".join(options.replay)
    return facts


def describe_evaluation(recipe: Recipe) -> dict[str, str]:
    """Say who judges the win rates of `evaluate:`, and by how many principles; RecipeError for bad ones or no key."""
    judge, constitution = recipe.evaluate.judge, recipe.evaluate.constitution
    if judge is None or constitution is None:
        return {}
    if judge.url is not None:
        find_key(judge, key="evaluate.judge", where=recipe.origins.get("evaluate.judge.api_key_env"))
    who = judge.model or f"{judge.name} at {urlsplit(judge.url or '').netloc}"
    return {"judge": who, "principles": str(len(load_constitution(constitution, needs="comparison").principles))}


def _read_rows(stage: Stage, check: StageCheck, keys: dict[str, str], note: str = "") -> None:
    """Read rows as they are, without a tokenizer: formats, places and counts, of these keys by the method given."""
    from alignkit.data import DataReport, Rejects, read_rows

    sources: dict[str, list[DataSource]] = {}
    for key, source in requirements.list_data(stage):
        if key in keys and requirements.without_unmade([source], stage):
            name = f"{key} {source.path}" if stage.method in FEEDBACK else key
            sources.setdefault(name, []).append(source)
    for name, given in sources.items():
        report = DataReport()
        rows = read_rows(stage, given, report=report, rejects=Rejects(), method=keys[name.split()[0]])
        if check.note(deque, rows, maxlen=0) is not None:
            check.facts[name] = f"{report.read} rows read, {report.rows} kept{note}"


def start_today(stage: Stage) -> tuple[Stage, str]:
    """Let a stage that starts from an untrained one start from the base, and say what it starts from."""
    if stage.start_stage and stage.start_dir and not Path(stage.start_dir).is_dir():
        said = f"{stage.start_stage}, not trained yet: looked at with {stage.model.path}"
        # What it says of its start's adapter is right for the stage, and has no effect on the base.
        options = stage.options.model_copy(update={"adapter": None} if isinstance(stage.options, TrainOptions) else {})
        return replace(stage, start_dir=None, start_stage=None, options=options), said
    return stage, stage.start_dir or stage.model.path


def _check_device(stage: Stage, check: StageCheck) -> None:
    from alignkit.models.load import pick_device
    from alignkit.train.setup import micro_batch_size

    device, kind = pick_device(stage.launch.device, where=stage.where("launch.device")), stage.model.quantization
    check.facts["device"] = device
    check.facts["batch"] = f"{stage.training.batch_size} rows a step, {micro_batch_size(stage)} at a time"
    if kind != "none" and not (ability := try_quantization(kind, device)).works:
        raise EnvironmentProblem(f"model.quantization {kind} does not work here: {ability.note}")


def _check_tokenizer(stage: Stage, check: StageCheck) -> Chat:
    from alignkit.models.chat import load_chat
    from alignkit.train.tables import learn_vocabulary

    chat = load_chat(stage, learnt=learn_vocabulary(stage))
    tokenizer = chat.tokenizer
    needs = requirements.list_needs(stage)
    if stage.objective == "distill" and all(need.key != "teacher" or need.is_made() for need in needs):
        from alignkit.models.frozen import require_same_tokens

        check.note(require_same_tokens, stage, tokenizer)
    check.facts["tokenizer"] = f"{len(tokenizer)} tokens, eos {tokenizer.eos_token}, pad {tokenizer.pad_token}"
    if chat.has_template:
        check.facts["chat template"] = f"{chat.template.name}; {chat.template.describe()}"
    return chat


def _check_model(stage: Stage, check: StageCheck, chat: Chat) -> None:
    from alignkit.models.load import build_skeleton, pick_precision

    skeleton = build_skeleton(stage, chat.tokenizer)
    check.num_parameters = skeleton.num_parameters
    check.warnings += skeleton.doubts
    if skeleton.notes:
        check.facts["not used"] = "; ".join(skeleton.notes)
    if stage.model.quantization != "none":
        check.facts["quantised"] = f"{skeleton.four_bit_share:.1%} of the weights ({stage.model.quantization})"
    num_trained = skeleton.num_trained
    if isinstance(stage.options, PpoOptions) and stage.options.advantage == "gae":
        num_trained *= 2  # the critic is as large as the policy, in adapters or in weights
    # Rotation comes after the new checkpoint is sealed, so for a moment there is one more than is kept. From above:
    # the trained weights and AdamW's two values for each, in one dtype.
    num_checkpoints = stage.training.keep_checkpoints + 1
    needed = int(1.1 * num_checkpoints * 3 * num_trained * pick_precision(stage).dtype.itemsize)
    check.facts["trained parameters"] = f"{num_trained:,}"
    free = require_space(Path(stage.run_dir), needed, num_checkpoints=num_checkpoints)
    check.facts["disk"] = f"needs {describe_bytes(needed)}, {describe_bytes(free)} free"


def require_space(run_dir: Path, needed_bytes: int, *, num_checkpoints: int) -> int:
    """Count the free bytes where the run will be written; raises EnvironmentProblem when they are too few."""
    existing = next(place for place in (run_dir.absolute(), *run_dir.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        what = f"{existing} has {free / _GIB:.2f} GiB free; {num_checkpoints} checkpoints and the final model need "
        what += f"about {needed_bytes / _GIB:.2f} GiB; free some, lower keep_checkpoints, or choose another --out"
        raise EnvironmentProblem(what)
    return free


def _encode(stage: Stage, check: StageCheck, chat: Chat) -> str | None:
    from alignkit.data import Rejects
    from alignkit.train.tables import prepare_tables

    with tempfile.TemporaryDirectory(prefix="alignkit-check-") as directory:
        tables = prepare_tables(stage, chat, Path(directory), rejects=Rejects())
        check.facts |= describe_rows(tables)
    report = tables.report.to_dict()
    check.warnings += [*tables.report.remarks(), *find_doubts(report)]
    return form_of(report)


def describe_rows(tables: Tables) -> dict[str, str]:
    """Describe the rows of a stage by what was counted while they were encoded."""
    import numpy as np

    report, lengths = tables.report.to_dict(), tables.lengths
    facts = {}
    for source in report["sources"]:
        formats = ", ".join(f"{count} {name}" for name, count in source["formats"].items())
        said = f"{source['read']} rows read, {source['kept']} kept ({formats})"
        said += f", {source['rejected']} do not fit" if source["rejected"] else ""
        said += f", {source['duplicates_dropped']} duplicates dropped" if source["duplicates_dropped"] else ""
        said += f"; columns not used: {', '.join(source['ignored_columns'])}" if source["ignored_columns"] else ""
        said += f"; read as {', '.join(_FORMS[form] for form in source['forms'])}" if source["forms"] else ""
        facts[f"data {source['path']}"] = said
    middle, high = np.percentile(tables.train.data.column("length").to_numpy(), [50, 95])
    prompts_only = "prompt" in tables.train.column_names
    trained = "all in prompts" if prompts_only else f"of which {lengths.num_trained_tokens:,} are trained"
    facts["tokens"] = f"{lengths.num_tokens:,}, {trained}"
    facts["tokens a row"] = f"median {middle:.0f}, 95 % below {high:.0f}, longest {lengths.longest_tokens}"
    facts["too long"] = f"{lengths.truncated_share:.1%}: {lengths.num_truncated} cut, {lengths.num_too_long} left out"
    facts["too long"] += f"; first cut: {lengths.first_cut}" if lengths.first_cut else ""
    if lengths.num_untrained:
        facts["nothing to learn"] = f"{lengths.num_untrained} rows left out"
    if lengths.num_apart:
        facts["learnt apart"] = f"{lengths.num_apart} answers, each in a text of its own: later turns rewrite them"
    if "sequences" in tables.train.column_names:
        labels = Counter(tables.train["label"])
        facts["labels"] = ", ".join(f"{name} {count:,}" for name, count in sorted(labels.items()))
    facts["duplicates"] = f"{report['duplicates']} rows, {report['duplicate_prompts']} prompts"
    if report["longer_chosen_share"] is not None:
        facts["chosen is longer"] = f"in {report['longer_chosen_share']:.0%} of {report['comparisons']} comparisons"
    if tables.eval is not None:
        facts["held out"] = f"{len(tables.eval)} rows, {report['overlap']} prompts of them also in the training rows"
    return facts


def find_doubts(report: dict[str, Any]) -> list[str]:
    """Find what lets a stage run but makes its result doubtful; `report` is DataReport.to_dict()."""
    doubts = []
    if report["duplicates"] > _MANY_DUPLICATES * report["rows"]:
        doubts.append(f"{report['duplicates']} of {report['rows']} rows repeat an earlier one; dedupe: true drops them")
    if equal := sum(source["equal_answers"] for source in report["sources"]):
        doubts.append(f"{equal} rows have the same answer as chosen and rejected")
    share, count = report["longer_chosen_share"], report["comparisons"]
    if share is not None and abs(share - 0.5) > _LENGTH_BIAS - 0.5:
        kind, share = ("longer", share) if share > 0.5 else ("shorter", 1 - share)
        low, high = wilson(share * count, count)
        if low > 0.5:
            doubts.append(f"the chosen answer is the {kind} one in {share:.0%} of {count} comparisons ({low:.0%} to "
                          f"{high:.0%}): the model may learn length instead of quality")  # fmt: skip
    if report["overlap"]:
        places = ", ".join(report["overlap_places"])
        doubts.append(f"{report['overlap']} held-out rows have a prompt that is also trained on, first at {places}")
    return doubts


def preview_stage(stage: Stage, *, num_rows: int) -> dict[str, Any]:
    """Tokenise the rows of a stage as training does, collate the first ones and look for faults; loads no weights.
    Plain data: rows as `preview_rows` describes them, facts counted over all rows, and findings in words."""
    if stage.method in FEEDBACK:
        what = f"{stage.name} is a {stage.method} stage: it trains on no rows; preview the stage that trains on what it"
        raise RecipeError(f"{what} writes", where=stage.where(stage.name))
    from alignkit.data import Rejects
    from alignkit.models.chat import load_chat
    from alignkit.train.encode import preview_rows
    from alignkit.train.setup import training_rows
    from alignkit.train.tables import learn_vocabulary, prepare_tables

    stage, _ = start_today(stage)
    chat = load_chat(stage, learnt=learn_vocabulary(stage))
    with tempfile.TemporaryDirectory(prefix="alignkit-preview-") as directory:
        rejects = Rejects()
        tables = prepare_tables(stage, chat, Path(directory), rejects=rejects)
        limit = stage.trainer.get("max_length") if tables.lengths.first_cut else None
        table, collate = training_rows(stage, tables.train, chat.tokenizer, num_rows=num_rows)
        rows = preview_rows(table, collate, chat.tokenizer, num_rows=num_rows, limit=limit)
        facts = describe_rows(tables)
        findings = [*tables.report.remarks(), *find_faults(stage, tables, chat), *_left_out(tables, rejects)]
    return {"stage": stage.name, "method": stage.method, "rows": rows, "facts": facts, "findings": findings}


def find_faults(stage: Stage, tables: Tables, chat: Chat) -> list[str]:
    """Look at the tokens of the first 10,000 rows for what trains a model wrongly without stopping it."""
    tokenizer, limit = chat.tokenizer, stage.trainer.get("max_length")
    ends, bos = set(chat.stop_ids), tokenizer.bos_token_id
    found: Counter[str] = Counter()
    first: dict[str, int] = {}
    total = min(len(tables.train), _LOOKED_AT)
    for number, row in enumerate(tables.train.select(range(total)), 1):
        faults = set()
        for ids, answer in _sequences(row):
            if bos is not None and bos not in ends and ids[:2] == [bos, bos]:
                faults.add(f"begin with two {tokenizer.bos_token}")
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                faults.add(f"have characters that the tokenizer does not know ({tokenizer.unk_token})")
            if not answer or (limit and len(ids) >= limit):
                continue
            last = [token for token in answer[-3:] if token in ends]
            if not last:
                names = " or ".join(sorted(tokenizer.convert_ids_to_tokens(token) for token in ends))
                faults.add(f"end in an answer without {names}: the model will not learn to stop")
            elif len(last) > 1:
                faults.add(f"end with {''.join(tokenizer.convert_ids_to_tokens(last))}, more than one end")
        for fault in faults:
            found[fault] += 1
            first.setdefault(fault, number)
    return [f"{count} of {total} rows {fault}; first row {first[fault]}" for fault, count in found.most_common()]


def _sequences(row: dict[str, Any]) -> Iterator[tuple[list[int], list[int] | None]]:
    """Yield each sequence of a row of tokens, whole, and the part of it that the model writes."""
    if "labels" in row:
        yield row["input_ids"], [label for label in row["labels"] if label >= 0]
    elif "target_ids" in row:
        yield row["source_ids"], None
        yield row["target_ids"], row["target_ids"]
    elif "answers_ids" in row:
        yield from ((ids, ids) for ids in row["answers_ids"])
    elif "prompt" in row:
        yield row["prompt_ids"], None
    else:
        answers = [row[key] for key in ("chosen_ids", "rejected_ids", "completion_ids") if key in row]
        yield from ((row["prompt_ids"] + answer, answer) for answer in answers)


def _left_out(tables: Tables, rejects: Any) -> Iterator[str]:
    lengths = tables.lengths
    if lengths.num_truncated or lengths.num_too_long:
        said = f"{lengths.truncated_share:.1%} of the rows are longer than max_length: {lengths.num_truncated} cut, "
        said += f"{lengths.num_too_long} left out; the longest has {lengths.longest_tokens} tokens"
        yield said + (f"; first cut: {lengths.first_cut}" if lengths.first_cut else "")
    if lengths.num_untrained:
        yield f"{lengths.num_untrained} rows are left out: they have no token to learn from"
    for reject in rejects.first[:3]:
        yield f"{reject.where}: left out: {reject.what}"
