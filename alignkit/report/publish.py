"""What is made of a run that has begun: its page, its model card, and the upload of its model to the Hugging Face hub.

A page is one HTML file, for a run, for all runs of a recipe, or for the rows of a preview. It fetches nothing: style,
script and figures are inside, and its content security policy lets nothing else in.

What leaves the machine is listed, searched for secrets and stripped of its paths first: weights, tokenizer, template,
configuration and the card; never checkpoints, optimizer states, rows of the data or the report. A local model or file
is told by its last name only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import TemplateError
from markupsafe import Markup

from alignkit import __version__, console
from alignkit.errors import AlignKitError, DiskError, EnvironmentProblem, Problem, RunError, UsageError, first_line
from alignkit.report import charts, evaluation, facts
from alignkit.report.evaluation import tabulate
from alignkit.report.facts import METHODS, Facts, find_runs, gather_warnings, order_runs
from alignkit.report.text import duration, open_templates, short_count
from alignkit.report.verdict import judge
from alignkit.runs.directory import CARD, MANIFEST, Result, RunDir, find_damaged_product, read_result
from alignkit.runs.files import describe_bytes, disk_failures, read_json, write_json, write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

REPORT = "report.html"
_HERE = Path(__file__).parent
_REFRESH_SECONDS = 3
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_FILE = re.compile(r".*\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|yaml)", re.IGNORECASE)
_PATH = re.compile(r"(?:~|\.{0,2})(?:/[^\s/:,;'\"()]+){2,}/?|(?<![\w/.-])(?:[\w.-]+/){2,}[\w.-]+")
_SENT = (".safetensors", ".json", ".jinja", ".model", ".txt")
_STATE = frozenset({"trainer_state.json", "ppo_state.json", "critic.safetensors", "ema.safetensors", MANIFEST})
_VOCABULARY = frozenset({"tokenizer.json", "vocab.json", "merges.txt"})  # any text may be in a vocabulary
_Page = TypeVar("_Page")


def show(run: RunDir) -> None:
    """Write page and card of a run that has ended; neither can fail it."""
    attempt("model card", run.path, lambda: write_card(run.path))
    attempt("page", run.path, lambda: write_report(run.path))


def attempt(what: str, directory: Path, write: Callable[[], _Page]) -> _Page | None:
    """Write a page or a card of work that is done; where that cannot be, warn, keep the traceback, and go on."""
    try:
        return write()
    except Exception as error:
        console.warn(
            f"{directory.name}: its {what} could not be made ({type(error).__name__}: {first_line(error)}); the run "
            f"itself is whole, and `alignkit report {directory}` tries again"
        )
        with suppress(DiskError):
            write_text(RunDir(directory).error_log, console.redact("".join(traceback.format_exception(error))))
        return None


def leave_finished(run: RunDir) -> Result:
    """Say that a run has been finished already, make its page and card where they are missing, return how it ended."""
    result = read_result(run.result)
    console.note(f"{result.stage}: already finished, nothing to do (--force starts over)")
    if not run.report.is_file() or (run.model.is_dir() and not (run.model / CARD).is_file()):
        show(run)
    return result


def publish(
    target: Path, *, stages: Sequence[tuple[str, Path]] | None = None, out: Path | None = None,
    repo: str | None = None, public: bool = False, card: bool = True,
) -> dict[str, str]:  # fmt: skip
    """Write the page of a run, of a directory of runs or of a recipe's `stages`; give name -> path of what was made."""
    if public and repo is None:
        raise UsageError("--public has no effect without --push")
    if out is not None and out.is_dir():
        raise UsageError(f"--out: {str(out)!r} is a directory; name the file of the page")
    is_run = RunDir(target).stage.is_file()
    if repo is not None and not is_run:
        raise RunError("--push uploads the model of one run; name its directory", where=str(target))
    if is_run and (damage := find_damaged_product(RunDir(target).path)) is not None:
        what = f"{damage}: it was damaged after the run had finished; run its command again, which makes it anew"
        if repo is not None:
            raise RunError(what, where=str(target))
        console.warn(f"{target}: {what}")
    try:
        page = write_recipe_report(target.stem, stages, out=out) if stages else write_report(target, out=out)
        done = {"report": str(page)}
        if card and is_run and (written := write_card(target)) is not None:
            done["card"] = str(written)
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
        raise RunError(
            f"a record says what alignkit does not write there ({type(error).__name__}: {first_line(error)}), and no "
            "page can be made of it; put the file back as it was, or run the stage again with --force",
            where=str(target),
        ) from error
    if repo is not None:
        done["pushed"] = push(target, repo, public=public)
    return done


def write_card(path: Path) -> Path | None:
    """Write the card of a run into its model directory and return its path; None when there is no model."""
    run = RunDir(path)
    if not run.model.is_dir():
        return None
    if run.model.is_symlink():
        raise RunError("is a link, and the card would be written where it points to", where=str(run.model))
    write_text(run.model / CARD, render_card(Facts(run.path)))
    return run.model / CARD


def render_card(run: Facts, *, repo: str | None = None) -> str:
    """Render the card's text, YAML metadata, then Markdown; `repo` is the hub id it will be published under."""
    model = RunDir(run.path).model
    bases = [each.get("path", "") for each in run.stage.get("lineage") or [] if each.get("role") == "base"]
    root = str((*bases, (run.stage.get("model") or {}).get("path", ""))[0])
    base = root if is_public(root) else None  # a reader could not find a local one
    name = repo.rpartition("/")[2] if repo else run.full_name.replace("/", "-")
    is_adapter = (model / "adapter_config.json").is_file()
    forms = {form for each in run.sources for form in each.get("forms", ())}
    settings = []  # that the recipe gave for this stage and that are plain values, paths left out
    for key, value, origin in facts.list_settings(run):
        section, _, short = key.rpartition(".")
        is_told = key == "seed" or (origin != "default" and section in ("lora", run.name) and short != "start_from")
        if is_told and isinstance(value, int | float | str) and "/" not in str(value):
            settings.append((short if section != "lora" else key, value))
    templates = open_templates()
    templates.filters |= {  # a cell shows its text as it is, inside a table or out of it
        "cell": lambda text: re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(text).split())),
        "public_name": public_name, "hide_paths": hide_paths,
    }  # fmt: skip
    text = templates.get_template("card.md.jinja").render(
        name=name, repo=repo or re.sub(r"[^\w.-]+", "-", name), run=run, stage=run.stage, base=base, settings=settings,
        method=METHODS.get(run.method, run.method), is_adapter=is_adapter,
        has_chat=(not forms or "chat" in forms) and (model / "chat_template.jinja").is_file(),
        evaluation=tabulate([run]), about=facts,
    )  # fmt: skip
    return f"---\n{_describe(run, name, base, is_adapter=is_adapter).to_yaml()}\n---\n\n{text.strip()}\n"


def _describe(run: Facts, name: str, base: str | None, *, is_adapter: bool) -> ModelCardData:
    """Collect the metadata; its model index has the whole figures of eval.json, without slices."""
    from huggingface_hub import EvalResult, ModelCardData

    is_reward = run.method == "rm"
    task = "text-classification" if is_reward or run.task else "text-generation"
    on_hub = base if base and not base.startswith("builtin:") else None
    sources = [str(source.get("path", "")) for source in (run.stage.get("options") or {}).get("data") or []]
    datasets = [path for path in dict.fromkeys(sources) if is_public(path) and not path.startswith("builtin:")]
    adapter = [(run.stage.get("lora") or {}).get("adapter_type", "lora")] if is_adapter else []
    results = []
    for result in run.evaluation.get("results", []):
        value, data = result.get("value"), hide_paths(str(result.get("data") or "unknown"))
        if result.get("slice") is None and isinstance(value, int | float):
            kind = data.partition("[")[0] or "unknown"
            results.append(EvalResult(task, kind, data, metric_type=str(result.get("metric")), metric_value=value))
    return ModelCardData(
        base_model=on_hub, base_model_relation=("adapter" if is_adapter else "finetune") if on_hub else None,
        datasets=datasets or None, library_name="peft" if is_adapter else "transformers", pipeline_tag=task,
        tags=["alignkit", "trl", run.method, *["reward-model"] * is_reward, *adapter],
        model_name=name if results else None, eval_results=results or None,
    )  # fmt: skip


def public_name(path: str) -> str:
    """Shorten a model or data source to what may be told: a hub id or builtin name as it is, else the last name."""
    if is_public(path):
        return path
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    if parts and parts[-1] == "model" and len(parts) > 1:  # `model/` of a run is told by the run
        parts.pop()
    return parts[-1] if parts else "local"


def is_public(path: str) -> bool:
    """Tell whether a path means the same to everybody: a hub id or a builtin, as far as its form and the disk tell."""
    if path.startswith("builtin:"):
        return True
    is_id = bool(_HUB_ID.fullmatch(path)) and not _DATA_FILE.fullmatch(path) and ".." not in path and "--" not in path
    return is_id and not Path(path).exists()


def hide_paths(text: str) -> str:
    """Cut every path in a text to its last name."""
    return _PATH.sub(lambda found: public_name(found[0]), text)


def pack(path: Path, repo: str) -> tuple[dict[str, Path | bytes], list[str]]:
    """Collect what a push would upload and what it leaves out; RunError, with all problems, where it must not be."""
    run, model, problems = Facts(path), RunDir(path).model, list(_check_name(repo))
    if not run.is_finished or not model.is_dir():
        problems.append(Problem("is not finished; only the final, verified model is pushed", str(path)))
        raise RunError(problems)
    files, left_out = _collect(model, problems)
    if problems:
        raise RunError(problems)
    return {CARD: render_card(run, repo=repo).encode(), **files}, left_out


def _collect(model: Path, problems: list[Problem]) -> tuple[dict[str, Path | bytes], list[str]]:
    """Collect the files of a model directory that may be sent, and the names of those that are not."""
    adapter = model / "adapter_config.json"
    base = str(read_json(adapter).get("base_model_name_or_path")) if adapter.is_file() else ""
    if base and not is_public(base):
        what = f"the adapter belongs to a base on this machine ({public_name(base)}), so nobody else could load it; "
        what += "`alignkit merge RUN --out DIR` makes one whole model, and `hf upload NAME DIR` publishes it"
        problems.append(Problem(what, str(adapter)))
    files: dict[str, Path | bytes] = {}
    left_out = []
    for file in sorted(each for each in model.rglob("*") if each.is_file() and each.name != CARD):
        name = file.relative_to(model).as_posix()
        if file.suffix not in _SENT or file.is_symlink() or name in _STATE:
            left_out.append(name)
            continue
        is_text = file.suffix != ".safetensors" and file.name not in _VOCABULARY
        if is_text and console.holds_secret(file.read_text(encoding="utf-8", errors="replace")):
            problems.append(Problem("holds something that looks like a secret; take it out before pushing", str(file)))
        files[name] = file
        if file.name == "alignkit.json":
            record = read_json(file)
            for entry in record.get("lineage", []):
                entry["path"] = public_name(str(entry.get("path", "")))
            files[name] = (json.dumps(record, indent=1) + "\n").encode()
    return files, left_out


def push(path: Path, repo: str, *, public: bool = False) -> str:
    """Upload the model of a run in one commit to a repository, made private unless `public`; give its address."""
    files, left_out = pack(path, repo)
    require_hub(repo)
    for name in left_out:
        console.note(f"not uploaded: {name}")
    num_bytes = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values())
    console.note(f"pushing {len(files)} files, {describe_bytes(num_bytes)}, to {repo}")
    return _commit(files, repo, f"{Facts(path).full_name}, by alignkit {__version__}", public=public)


def _check_name(repo: str) -> Iterator[Problem]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        yield Problem(f"{repo} is no repository name; use NAME or USER/NAME, of letters, digits, - _ and .")


def require_hub(repo: str, *, key: str = "") -> None:
    """Raise RunError for what is no repository's name, EnvironmentProblem where the hub is off or there is no token."""
    from huggingface_hub import constants, get_token

    for problem in _check_name(repo):
        raise RunError(problem.what, where=key or None)
    if constants.is_offline_mode():
        raise EnvironmentProblem("HF_HUB_OFFLINE is set, so nothing can be pushed; set HF_HUB_OFFLINE=0")
    if get_token() is None:
        raise EnvironmentProblem("the hub needs a token that may write: run `hf auth login`, or set HF_TOKEN")


def _commit(files: Mapping[str, Path | bytes], repo: str, message: str, *, public: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter is that of its HTTP library

    api = HfApi(library_name="alignkit", library_version=__version__)
    try:
        if isinstance(card := files.get(CARD), bytes):
            ModelCard(card.decode()).validate()
        home = api.create_repo(repo, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(home.repo_id, operations, commit_message=message).repo_url)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = f"the hub refused ({status}: {console.redact(error.server_message or str(error).split(chr(10))[0])})"
        reason += "; does your token have the right to write there?" if status in (401, 403, 404) else ""
    except ValueError as error:  # of `validate`, and of answers that make no sense
        reason = f"the hub refused ({console.redact(str(error))})"
    except (HTTPError, OSError) as error:
        reason = f"the hub cannot be reached ({console.redact(str(error))})"
    raise EnvironmentProblem(f"{repo}: {reason}")


class Pusher:
    """Pushes the models of checkpoints while a run trains, one at a time, and the final one; a failure is a warning."""

    def __init__(self, run: RunDir, repo: str, *, every: int | None, step: int) -> None:
        self._run, self._repo, self._every, self._pushed = run, repo, every, step
        more = "" if every is None else f", and that of a checkpoint every {every} steps"
        console.note(f"{run.path.name}: its model will be pushed to {repo}{more}")
        self._threads, self._pending = ThreadPoolExecutor(1), list[tuple[str, Future[str]]]()

    def push_checkpoint(self, checkpoint: Path, step: int) -> None:
        """Begin to push where it is time and no other push is under way."""
        self._settle()
        if self._every is None or step < self._pushed + self._every or self._pending:
            return
        problems, self._pushed = list[Problem](), step
        files, _ = _collect(checkpoint, problems)
        if problems:
            console.warn(f"{checkpoint.name} is not pushed: {'; '.join(problem.what for problem in problems)}")
            return
        held = self._run.cache / "push"  # links, for the checkpoint may be removed before all of it is sent
        shutil.rmtree(held, ignore_errors=True)
        for name, content in files.items():
            if isinstance(content, Path):
                (held / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(content, held / name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(content, held / name)
                files[name] = held / name
        message = f"{self._run.path.name} at step {step}, by alignkit {__version__}"
        job = self._threads.submit(_commit, files, self._repo, message, public=False)
        self._pending.append((checkpoint.name, job))

    def push_final(self) -> None:
        """Push the finished run's model, when what was under way has ended."""
        self._settle(wait=True)
        self._pending.append(("the model", self._threads.submit(push, self._run.path, self._repo)))
        self._settle(wait=True)

    def _settle(self, *, wait: bool = False) -> None:
        while self._pending and (wait or self._pending[0][1].done()):
            what, job = self._pending.pop(0)
            try:
                console.note(f"{what} is pushed to {job.result()}")
            except AlignKitError as error:
                later = f"`alignkit report {self._run.path} --push {self._repo}` does it when the run has finished"
                console.warn(f"{what} could not be pushed: {error}; {later}")


def write_report(path: Path, *, out: Path | None = None) -> Path:
    """Write the report of a run or a directory of runs to `out`, or report.html in it; RunError where there is none."""
    directory = path.expanduser().absolute()
    if RunDir(directory).stage.is_file():
        return _write(render_run(Facts(directory)), out or directory / REPORT)
    found = find_runs(directory) if directory.is_dir() else []
    if not found:
        known = ", ".join(sorted(str(stage.parent) for stage in Path("runs").glob("*/*/stage.json")))
        there = f"the runs here are {known}" if known else "name a run directory such as runs/demo/sft, or runs/demo"
        raise RunError(f"holds no run; {there}", where=str(path))
    return _write_recipe(directory.name, list(map(Facts, found)), (), out or directory / REPORT)


def write_recipe_report(name: str, stages: Sequence[tuple[str, Path]], *, out: Path | None = None) -> Path:
    """Write the report of a recipe's stages, given as (name, run directory), beside the first; RunError for none."""
    begun = [Facts(path) for _, path in stages if RunDir(path).stage.is_file()]
    if not begun:
        raise RunError("no stage of this recipe has been started; `alignkit run` trains them", where=name)
    waiting = [stage for stage, path in stages if not RunDir(path).stage.is_file()]
    title = str(begun[0].stage.get("recipe") or name)
    return _write_recipe(title, begun, waiting, out or stages[0][1].expanduser().absolute().parent / REPORT)


def _write_recipe(name: str, runs: Sequence[Facts], waiting: Sequence[str], out: Path) -> Path:
    """Write the page of a recipe, in the order in which one stage needs the other; beside it its frontier, if any."""
    ordered = order_runs(runs)
    found = charts.read_frontiers(ordered)
    num_warnings = sum(len(gather_warnings(run)) for run in ordered)
    seconds = sum(part.get("wall_seconds") or 0.0 for run in ordered for part in (run.result, run.evaluation))
    tiles = [
        ("wall time, with evaluation", duration(seconds)),
        ("tokens", short_count(sum(run.result.get("tokens", 0) for run in ordered))),
        ("stages", len(ordered) + len(waiting)), ("warning" if num_warnings == 1 else "warnings", num_warnings),
    ]  # fmt: skip
    _write(_render("recipe", title=name, tiles=tiles, runs=ordered, waiting=waiting, frontiers=found,
                   verdicts=list(map(judge, ordered))), out)  # fmt: skip
    if found:
        write_json(out.with_name("frontier.json"), {"schema": 1, "frontiers": [asdict(each) for each in found]})
        picture = charts.draw_frontier_file(found[0], (_HERE / "report.css").read_text(encoding="utf-8"))
        write_text(out.with_name("frontier.svg"), picture)
    return out


def watch(find: Callable[[], Sequence[Path]], write: Callable[[], Path]) -> None:
    """Write the page, which reloads itself, whenever a file of the runs changes, until all are finished or Ctrl-C."""
    shared = open_templates().globals
    shared["refresh_seconds"], seen = _REFRESH_SECONDS, None
    try:
        while True:
            runs = [RunDir(path) for path in find()]
            files = [file for run in runs for file in run.path.glob("*.json*")]
            now = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(files)]
            if now != seen:
                page = write()
                if seen is None:
                    console.note(f"watching: open {page.as_uri()} (Ctrl-C ends this)")
                seen = now
            if all(run.is_finished() for run in runs):
                return
            time.sleep(1)
    except KeyboardInterrupt:
        return
    finally:
        shared["refresh_seconds"] = None


def write_preview(preview: dict[str, Any], out: Path) -> Path:
    """Write the page of `alignkit preview`; `preview` is that of `preview_stage`. Raises DiskError."""
    return _write(_render("preview", title=f"{preview['stage']}: rows", run=preview), out)


def render_run(run: Facts) -> str:
    recipe = str(run.stage.get("recipe", ""))
    title = f"{recipe} / {run.name}" if recipe else run.name
    return _render("run", title=title, run=run, recipe_name=recipe, verdict=judge(run))


def _write(page: str, out: Path) -> Path:
    with disk_failures(out.parent, out.name):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    return out


def _render(template: str, **values: Any) -> str:
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    templates = open_templates()
    templates.globals |= {"METHODS": METHODS, "charts": charts, "evaluate": evaluation, "about": facts}
    page = templates.get_template(f"{template}.html.jinja")
    return page.render(style=Markup(style), script=Markup(script), script_hash=digest, written=written, **values)
