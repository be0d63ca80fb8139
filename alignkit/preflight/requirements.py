"""What a stage needs before it may start: earlier stages, models, rewards, judges, rows, packages."""

import importlib.util
import os
import shlex
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from alignkit import errors
from alignkit.data import DataReport, Rejects, read_rows
from alignkit.data.sources import Located, locate
from alignkit.models.files import TEMPLATES, ModelFiles, find_model_dir, inspect_model_dir, require_available
from alignkit.preflight.doctor import require_versions
from alignkit.recipe import Recipe, Stage, resolve
from alignkit.recipe.methods import FEEDBACK, CritiqueOptions, LabelOptions
from alignkit.recipe.rules import find_optimizer
from alignkit.recipe.schema import LEARNT_TOKENIZERS, DataSource, FeedbackModel
from alignkit.runs.directory import RunDir, refuse_foreign

# Files up to this size are read in half a second, before the libraries load in ten; larger ones are checked only when
# they are tokenised.
_READ_AHEAD_BYTES = 8 << 20
_TRACKERS = {  # of report_to: what is imported, what is installed
    **{name: (name, "'alignkit[trackers]'") for name in ("tensorboard", "trackio", "wandb")},
    **{name: (name, name) for name in ("clearml", "codecarbon", "dagshub", "dvclive", "mlflow", "neptune", "swanlab")},
    "azure_ml": ("azureml", "azureml-core"), "comet_ml": ("comet_ml", "comet-ml"), "flyte": ("flytekit", "flytekit"),
}  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What one stage has from another: a model directory, or a file of rows."""

    stage: str  # the one that makes it
    path: str
    key: str  # of the stage that needs it, without its name
    rows: bool = False

    def is_made(self) -> bool:
        """Tell whether it is there; rows only count when all of them are."""
        return RunDir(Path(self.path).parent).is_finished() if self.rows else Path(self.path).is_dir()


def require_ready(stage: Stage, *, coming: Collection[str] = ()) -> None:
    """Raise all that would stop a stage and is found in about a second; `coming` are stages that run before it."""
    wrong: list[errors.UsageError] = []
    missing: list[str] = []
    looks: list[Callable[[], object]] = [partial(_require_made, stage, coming), partial(_require_start, stage)]
    if stage.rewards:
        from alignkit.rewards.kinds import check_rewards

        unmade = [need.stage for need in list_needs(stage) if not need.is_made()]
        looks.append(partial(check_rewards, stage, coming=[*coming, *unmade]))
    looks += [partial(_require_feedback_model, stage, key, model) for key, model in list_feedback_models(stage)]
    looks += [*_list_texts(stage), partial(refuse_foreign, Path(stage.run_dir)), partial(_require_rows, stage, coming)]
    looks += [require_versions, partial(require_packages, stage)]
    for require in looks:
        try:
            require()
        except errors.UsageError as error:
            wrong.append(error)
        except errors.EnvironmentProblem as error:
            missing.append(str(error))
    if wrong:
        kinds = {type(error) for error in wrong}
        problems = dict.fromkeys(problem for error in wrong for problem in error.problems)
        raise (kinds.pop() if len(kinds) == 1 else errors.UsageError)(problems)
    if missing:
        raise errors.EnvironmentProblem("\n".join(dict.fromkeys(missing)))


def list_needs(stage: Stage) -> list[Need]:
    """List everything a stage has from other stages of its recipe."""
    is_run = stage.start_stage is not None and stage.start_dir is not None
    needs = [Need(str(stage.start_stage), str(stage.start_dir), "start_from")] if is_run else []
    named = [(key, reward.model, stage.reward_stages, False) for key, reward in stage.rewards]
    named += [(key, source.path, stage.source_stages, True) for key, source in list_data(stage)]
    named += [(key, model.model, stage.source_stages, False) for key, model in list_feedback_models(stage)]
    return needs + [Need(made[path], path, key, rows) for key, path, made, rows in named if path and path in made]


def list_feedback_models(stage: Stage) -> Iterator[tuple[str, FeedbackModel]]:
    """Yield every judge, generator and teacher of a stage with its key."""
    for key in ("judge", "generator", "teacher"):
        if (model := getattr(stage.options, key, None)) is not None:
            yield key, model
    yield from ((f"{key}.judge", reward.judge) for key, reward in stage.rewards if reward.judge is not None)


def list_data(stage: Stage) -> Iterator[tuple[str, DataSource]]:
    """Yield every source of rows of a stage with its key."""
    options = stage.options
    for key in ("data", "eval", "normalize_data", "mix", "check"):
        sources = getattr(options, key, None)
        yield from ((key, source) for source in (sources if isinstance(sources, list) else ()))
    for key in ("ptx", "helpful"):
        yield from ((f"{key}.data", source) for source in getattr(getattr(options, key, None), "data", ()))


def without_unmade(sources: list[DataSource], stage: Stage, *, coming: Collection[str] = ()) -> list[DataSource]:
    """Leave out the rows that another stage has yet to make."""
    unmade = {need.path for need in list_needs(stage) if need.rows and (need.stage in coming or not need.is_made())}
    return [source for source in sources if source.path not in unmade]


def _require_made(stage: Stage, coming: Collection[str]) -> None:
    problems = []
    for need in list_needs(stage):
        if need.stage in coming or need.is_made():
            continue
        verb = {"start_from": "starts from", "reward": "is scored by", "gold": "is scored by"}.get(need.key, "needs")
        state = "has not been run to its end" if need.rows else "has not been trained to its end"
        instead = "the file of rows itself" if need.rows else f"another {need.key.split('.')[-1]}"
        what = f"{stage.name} {verb} {need.stage}, which {state}; {'run' if need.rows else 'train'} --stage "
        what += f"{need.stage} of {shlex.quote(stage.recipe_path)} first, or name {instead}"
        problems.append(errors.Problem(what, stage.where(f"{stage.name}.{need.key}")))
    if problems:
        raise errors.RunError(problems)


def _inspect(stage: Stage, key: str, source: str, *, weights: bool = True) -> ModelFiles | None:
    """Look at the files of a model unless it is built in, on the hub, or to come; ModelError names key and place."""
    if any(need.path == source and not need.is_made() for need in list_needs(stage)):
        return None
    try:
        require_available(source)
        directory = find_model_dir(source)
        return inspect_model_dir(directory, trust_code=stage.trust_code) if directory and weights else None
    except errors.UsageError as error:
        problems = [errors.Problem(f"{key}: {problem}", stage.where(key)) for problem in error.problems]
        raise errors.ModelError(problems) from error


def _require_start(stage: Stage) -> None:
    """Refuse weights that loading would refuse: misspelt, damaged, pickled, with code, or a reward model."""
    key = f"{stage.name}.start_from" if stage.start_dir else "model.path"
    source = stage.start_dir or stage.model.path
    files = _inspect(stage, key, source, weights=stage.model.init != "scratch" or bool(stage.start_dir))
    if files is not None and files.reward and (stage.method != "rm" or files.head) and stage.task is None:
        kind = "classifier" if files.head else "reward model"
        what = f"{source} is a {kind}; {stage.method} needs a policy to start from"
        raise errors.ModelError(what, where=stage.where(key))
    if stage.model.tokenizer and stage.model.tokenizer not in LEARNT_TOKENIZERS:
        _inspect(stage, "model.tokenizer", stage.model.tokenizer, weights=False)
    template = stage.model.chat_template or ""
    if template.startswith("/"):
        _require_file(stage, "model.chat_template", template)
    # Others may be names of templates that the tokenizer brings.
    elif template and template not in TEMPLATES and (hint := errors.suggest(template, TEMPLATES)):
        what = f"model.chat_template: {template!r} is neither a file nor one of {', '.join(TEMPLATES)}{hint}"
        raise errors.ModelError(what, where=stage.where("model.chat_template"))


def _require_feedback_model(stage: Stage, name: str, model: FeedbackModel) -> None:
    key = f"{stage.name}.{name}"
    if model.url is not None:
        from alignkit.feedback.server import find_key

        find_key(model, key=key, where=stage.where(f"{key}.api_key_env"))
        if importlib.util.find_spec("openai") is None:
            what = "a judge or generator with url needs the openai client: pip install 'alignkit[judge]'"
            raise errors.EnvironmentProblem(what)
    elif model.replay is not None:
        _require_file(stage, f"{key}.replay", model.replay)
    elif model.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        what = f"{stage.where(key)}: {name}.engine is vllm, which is not installed; use transformers or url"
        raise errors.EnvironmentProblem(what)
    elif model.model is not None:
        files = _inspect(stage, key, model.model)
        if files is not None and files.reward:
            what = f"{key} is {model.model}, a reward model, which cannot write or choose; name a language model"
            raise errors.ModelError(what, where=stage.where(key))


def _list_texts(stage: Stage) -> Iterator[Callable[[], object]]:
    """Yield what looks at the constitutions, examples and replays of a stage."""
    options = stage.options
    texts: list[tuple[str, str | list[str] | None, Callable[[list[str]], object]]] = []
    judged = [reward for _, reward in stage.rewards if reward.judge is not None]
    if judged or isinstance(options, CritiqueOptions | LabelOptions):
        from alignkit.feedback.constitution import load_constitution, load_examples
    if isinstance(options, CritiqueOptions | LabelOptions):
        needs: Literal["critique", "comparison"] = "critique" if stage.method == "critique" else "comparison"
        texts.append(("constitution", options.constitution, partial(load_constitution, needs=needs)))
        texts.append(("examples", options.examples, load_examples))
    for reward in judged:
        texts.append(("reward.constitution", reward.constitution, partial(load_constitution, needs="comparison")))
    for key, given, load in texts:
        values = [given] if isinstance(given, str) else given or []
        files = [value for value in values if value not in ("none", "builtin") and not value.startswith("builtin:")]
        missing = [file for file in files if not Path(file).is_file()]
        yield from (partial(_require_file, stage, f"{stage.name}.{key}", file) for file in missing)
        if values and not missing:
            yield partial(load, values)
    for path in getattr(options, "replay", None) or ():
        yield partial(_require_file, stage, f"{stage.name}.replay", path)


def _require_file(stage: Stage, key: str, path: str) -> None:
    if not Path(path).is_file():
        folder = Path(path).parent
        near = [file.name for file in folder.glob("*") if os.path.isfile(file)]
        hint = errors.suggest(Path(path).name, near)
        raise errors.RecipeError(f"{key}: {path} is not there{hint}", where=stage.where(key))


def locate_rows(stage: Stage, *, coming: Collection[str] = ()) -> tuple[dict[str, list[DataSource]], list[Located]]:
    """Find the sources of a stage, by key and all of them, without reading any; DataError names their place."""
    located: list[Located] = []
    problems: list[errors.Problem] = []
    groups: dict[str, list[DataSource]] = {}
    for key, source in list_data(stage):
        if without_unmade([source], stage, coming=coming):
            groups.setdefault(key, []).append(source)
    for name, sources in groups.items():
        key = f"{stage.name}.{name}"
        try:
            located += locate(sources)
        except errors.DataError as error:
            problems += [errors.Problem(f"{key}: {problem}", stage.where(key)) for problem in error.problems]
    if problems:
        raise errors.DataError(problems)
    return groups, located


def _require_rows(stage: Stage, coming: Collection[str]) -> None:
    """Find missing files, and bad rows where all files are small."""
    groups, located = locate_rows(stage, coming=coming)
    # Rows that are not in files (hub, built-in) are not read ahead.
    size = sum(path.stat().st_size for place in located for path in place.files)
    if all(place.files for place in located) and size <= _READ_AHEAD_BYTES:
        for name in groups.keys() & {"data", "eval"}:
            deque(read_rows(stage, groups[name], report=DataReport(), rejects=Rejects()), maxlen=0)


def require_packages(stage: Stage) -> None:
    """Raise EnvironmentProblem for a tracker or an optimizer whose package is not installed here."""
    asked = stage.trainer.get("report_to") or []
    optimizer = stage.trainer.get("optim", "")
    package = find_optimizer(optimizer).package
    names = [name for name in ([asked] if isinstance(asked, str) else asked) if name in _TRACKERS]
    wanted = [("report_to", name, *_TRACKERS[name]) for name in names]
    wanted += [("optim", optimizer, *package)] if package else []
    model = stage.model
    from_hub = model.use_kernels or "/" in (model.attn_implementation or "")
    if from_hub and not stage.trust_code:
        key = "use_kernels" if model.use_kernels else "attn_implementation"
        what = f"model.{key} runs code of the hub, which a recipe cannot allow; give --trust-code on the command line"
        raise errors.UsageError([errors.Problem(what, stage.where(f"model.{key}"))])
    flash = (model.attn_implementation or "").startswith("flash") and not importlib.util.find_spec("flash_attn")
    if from_hub or flash:  # transformers takes the hub's kernel where flash_attn is not installed
        key = "model.attn_implementation" if model.attn_implementation else "model.use_kernels"
        wanted.append((key, str(model.attn_implementation or ""), "kernels", "'alignkit[kernels]'"))
    problems = []
    for key, name, module, install in wanted:
        if importlib.util.find_spec(module) is None:
            where = stage.where(key if "." in key else f"{stage.name}.{key}")
            problems.append(f"{where}: {key} {name} needs {module}, not installed here; pip install {install}")
    if problems:
        raise errors.EnvironmentProblem("\n".join(problems))
    if stage.method not in FEEDBACK and stage.training.push_to:
        from alignkit.report.publish import require_hub

        require_hub(stage.training.push_to, key=stage.where(f"{stage.name}.push_to"))


def require_held_out(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Refuse an `evaluate:` that none of these stages keeps rows for; return the doubts where only some do."""
    options = recipe.evaluate
    if not recipe.evaluates or options.data or set(options.metrics or ()) == {"tasks"}:
        return []
    stages = [stage for stage in (resolve(recipe, name) for name in names) if stage.method not in FEEDBACK]
    ready = [options.eval or all(source.path.startswith("builtin:") for source in options.data)
             for options in (stage.training for stage in stages)]  # fmt: skip
    bare = [stage.name for stage, is_ready in zip(stages, ready, strict=True) if not is_ready]
    if bare and len(bare) == len(stages):
        what = f"evaluate: has no rows to measure on: {', '.join(bare)} {'keeps' if len(bare) == 1 else 'keep'} none "
        what += f"out of training; add eval: to {bare[0]} (a share such as 0.05, or files), or evaluate.data"
        where = next(place for key, place in recipe.origins.items() if key.split(".")[0] == "evaluate")
        raise errors.RecipeError(what, where=where)
    what = "which keeps no rows out of training; add eval: to it, or evaluate.data"
    return [f"evaluate: leaves out {name}, {what}" for name in bare]
