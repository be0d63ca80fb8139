"""Show and publish a run: its page, its model card, and on request its model on the Hugging Face hub.

What leaves the machine is listed, searched for secrets and stripped of its paths first: weights, tokenizer, template,
configuration and the card; never checkpoints, optimizer states, rows of the data or the report.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jinja2 import TemplateError

from alignkit import __version__, console
from alignkit.errors import DiskError, EnvironmentProblem, Problem, RunError, UsageError, first_line
from alignkit.report.card import is_public, public_name, render_card, write_card
from alignkit.report.facts import read_facts
from alignkit.report.page import write_recipe_report, write_report
from alignkit.runs.directory import CARD, Result, RunDir, find_damaged_product, read_result
from alignkit.runs.files import describe_bytes, read_json, write_text

_Page = TypeVar("_Page")
_SENT = (".safetensors", ".json", ".jinja", ".model", ".txt")
_RECORD = "alignkit.json"
_VOCABULARY = frozenset({"tokenizer.json", "vocab.json", "merges.txt"})  # any text may be in a vocabulary


def show(run: RunDir) -> None:
    """Write page and card of a run that has ended; neither can fail it."""
    attempt("model card", run.path, lambda: write_card(run.path))
    attempt("page", run.path, lambda: write_report(run.path))


def attempt(what: str, directory: Path, write: Callable[[], _Page]) -> _Page | None:
    """Write a page or a card of work that is done; where that cannot be, warn, keep the traceback, and go on.

    Whatever goes wrong in drawing is no reason to lose a run or its exit code.
    """
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
    target: Path,
    *,
    stages: Sequence[tuple[str, Path]] | None = None,
    out: Path | None = None,
    repo: str | None = None,
    public: bool = False,
) -> dict[str, str]:
    """Write the page of a run, a directory of runs, or a recipe's `stages`; return name -> path of all that was made.

    Raises what the writers raise, UsageError for --public without --push, RunError when more than a run is pushed or
    a record has other types or keys than alignkit writes.
    """
    if public and repo is None:
        raise UsageError("--public has no effect without --push")
    if out is not None and out.is_dir():
        raise UsageError(f"--out: {str(out)!r} is a directory; name the file of the page")
    is_run = RunDir(target).stage.is_file()
    if repo is not None and not is_run:
        raise RunError("--push uploads the model of one run; name its directory", where=str(target))
    if is_run and (damage := find_damaged_product(target.expanduser())) is not None:
        what = f"{damage}: it was damaged after the run had finished; run its command again, which makes it anew"
        if repo is not None:
            raise RunError(what, where=str(target))
        console.warn(f"{target}: {what}")
    try:
        page = write_recipe_report(target.stem, stages, out=out) if stages else write_report(target, out=out)
        done = {"report": str(page)}
        if is_run and (card := write_card(target)) is not None:
            done["card"] = str(card)
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
        raise RunError(
            f"a record says what alignkit does not write there ({type(error).__name__}: {first_line(error)}), and no "
            "page can be made of it; put the file back as it was, or run the stage again with --force",
            where=str(target),
        ) from error
    if repo is not None:
        done["pushed"] = push(target, repo, public=public)
    return done


@dataclass(frozen=True)
class Parcel:
    """What would be uploaded: name in the repository -> a file as it is, or bytes made for it."""

    files: dict[str, Path | bytes]
    left_out: list[str]
    summary: str


def pack(path: Path, repo: str) -> Parcel:
    """Collect what a push of this run would upload, without asking the network.

    Raises RunError, all problems at once, for a run that is not finished, an adapter whose base nobody else has, a
    wrong repository name, or a file that holds a secret.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    run = read_facts(path)
    model = RunDir(run.path).model
    problems = []
    try:
        validate_repo_id(repo)
    except HFValidationError:
        problems.append(Problem(f"{repo} is no repository name; use NAME or USER/NAME, of letters, digits, - _ and ."))
    if not run.is_finished or not model.is_dir():
        problems.append(Problem("is not finished; only the final, verified model is pushed", str(path)))
        raise RunError(problems)
    adapter = model / "adapter_config.json"
    base = str(read_json(adapter).get("base_model_name_or_path")) if adapter.is_file() else ""
    if base and not is_public(base):
        what = (
            f"the adapter belongs to a base on this machine ({public_name(base)}), so nobody else could load it; "
            "`alignkit merge RUN --out DIR` makes one whole model, and `hf upload NAME DIR` publishes it"
        )
        problems.append(Problem(what, str(adapter)))
    files: dict[str, Path | bytes] = {}
    left_out = []
    for file in sorted(each for each in model.rglob("*") if each.is_file() and each.name != CARD):
        name = file.relative_to(model).as_posix()
        if file.suffix not in _SENT or file.is_symlink():
            left_out.append(name)
            continue
        is_text = file.suffix != ".safetensors" and file.name not in _VOCABULARY
        if is_text and console.holds_secret(file.read_text(encoding="utf-8", errors="replace")):
            problems.append(Problem("holds something that looks like a secret; take it out before pushing", str(file)))
        files[name] = _without_paths(file) if file.name == _RECORD else file
    files[CARD] = render_card(run, repo=repo).encode()
    if problems:
        raise RunError(problems)
    return Parcel(files, left_out, run.full_name)


def _without_paths(file: Path) -> bytes:
    """Put the public names of what a model was made from in place of their paths."""
    record = read_json(file)
    record["lineage"] = [
        {**entry, "path": public_name(str(entry.get("path", "")))} for entry in record.get("lineage", [])
    ]
    return (json.dumps(record, indent=1) + "\n").encode()


def push(path: Path, repo: str, *, public: bool = False) -> str:
    """Upload the model of a run in one commit and return its address; the repository is made if it is not there.

    A new repository is private unless `public`; one that is there stays as it is. Raises what `pack` raises, and
    EnvironmentProblem when there is no token, the hub cannot be reached, or it refuses.
    """
    parcel = pack(path, repo)
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter is that of its HTTP library

    if constants.is_offline_mode():
        raise EnvironmentProblem("HF_HUB_OFFLINE is set, so nothing can be pushed; set HF_HUB_OFFLINE=0")
    if get_token() is None:
        raise EnvironmentProblem("the hub needs a token that may write: run `hf auth login`, or set HF_TOKEN")
    for name in parcel.left_out:
        console.note(f"not uploaded: {name}")
    contents = parcel.files.values()
    num_bytes = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in contents)
    console.note(f"pushing {len(parcel.files)} files, {describe_bytes(num_bytes)}, to {repo}")
    api = HfApi(library_name="alignkit", library_version=__version__)
    try:
        card = parcel.files[CARD]
        assert isinstance(card, bytes)
        ModelCard(card.decode()).validate()
        home = api.create_repo(repo, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in parcel.files.items()]
        message = f"{parcel.summary}, by alignkit {__version__}"
        return str(api.create_commit(home.repo_id, operations, commit_message=message).repo_url)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = console.redact(error.server_message or str(error).split("\n", 1)[0])
        advice = "; does your token have the right to write there?" if status in (401, 403, 404) else ""
        raise EnvironmentProblem(f"{repo}: the hub refused ({status}: {reason}){advice}") from error
    except ValueError as error:  # of `validate`, and of answers that make no sense
        raise EnvironmentProblem(f"{repo}: the hub refused ({console.redact(str(error))})") from error
    except (HTTPError, OSError) as error:
        raise EnvironmentProblem(f"{repo}: the hub cannot be reached ({console.redact(str(error))})") from error
