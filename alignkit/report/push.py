"""Publish the model of a finished run on the Hugging Face hub, and nothing else of the run.

What leaves the machine is listed, looked through for secrets and stripped of its paths first: weights, tokenizer,
template, configuration and the model card; never checkpoints, optimizer states, rows of the data or the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit import __version__, console
from alignkit.errors import EnvironmentProblem, Problem, RunError
from alignkit.report.card import CARD, is_public, public_name, render_card
from alignkit.report.facts import Facts, read_facts
from alignkit.runs.directory import RunDir
from alignkit.runs.files import describe_bytes, read_json

_SENT = (".safetensors", ".json", ".jinja", ".model", ".txt")
_RECORD = "alignkit.json"
_VOCABULARY = frozenset({"tokenizer.json", "vocab.json", "merges.txt"})  # any text may be in a vocabulary
_BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class Parcel:
    """What would be uploaded: name in the repository -> a file as it is, or bytes made for it."""

    repo: str
    files: dict[str, Path | bytes]
    left_out: list[str]

    @property
    def num_bytes(self) -> int:
        return sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in self.files.values())


def pack(path: Path, repo: str) -> Parcel:
    """Return what a push of this run would upload, without asking the network.

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
    problems += _find_local_base(model)
    files: dict[str, Path | bytes] = {}
    left_out = []
    for file in sorted(each for each in model.rglob("*") if each.is_file() and each.name != CARD):
        name = file.relative_to(model).as_posix()
        if file.suffix not in _SENT or file.is_symlink():
            left_out.append(name)
            continue
        if file.suffix != ".safetensors" and file.name not in _VOCABULARY:
            problems += _find_secret(file)
        files[name] = _without_paths(file) if file.name == _RECORD else file
    files[CARD] = render_card(run, repo=repo).encode()
    if problems:
        raise RunError(problems)
    return Parcel(repo, files, left_out)


def push(path: Path, repo: str, *, public: bool = False) -> str:
    """Upload the model of a run in one commit and return its address; the repository is made if it is not there.

    A new repository is private unless `public`; one that is there stays as it is. Raises what `pack` raises, and
    EnvironmentProblem when there is no token, the hub cannot be reached, or it refuses.
    """
    parcel = pack(path, repo)
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token

    if constants.is_offline_mode():
        raise EnvironmentProblem("HF_HUB_OFFLINE is set, so nothing can be pushed; set HF_HUB_OFFLINE=0")
    if get_token() is None:
        raise EnvironmentProblem("the hub needs a token that may write: run `hf auth login`, or set HF_TOKEN")
    for name in parcel.left_out:
        console.note(f"not uploaded: {name}")
    console.note(f"pushing {len(parcel.files)} files, {describe_bytes(parcel.num_bytes)}, to {repo}")
    api = HfApi(library_name="alignkit", library_version=__version__)
    with _explain(repo):
        card = parcel.files[CARD]
        assert isinstance(card, bytes)
        ModelCard(card.decode()).validate()
        home = api.create_repo(repo, private=not public, exist_ok=True)
        commit = api.create_commit(
            home.repo_id,
            [CommitOperationAdd(name, content) for name, content in parcel.files.items()],
            commit_message=f"{_describe(read_facts(path))}, by alignkit {__version__}",
        )
    return str(commit.repo_url)


def _describe(run: Facts) -> str:
    return "/".join(part for part in (str(run.stage.get("recipe", "")), run.name) if part)


def _find_local_base(model: Path) -> list[Problem]:
    """Return the problem of an adapter that belongs to a base on this machine only."""
    config = model / "adapter_config.json"
    base = str(read_json(config).get(_BASE)) if config.is_file() else ""
    if not base or is_public(base):
        return []
    what = (
        f"the adapter belongs to a base on this machine ({public_name(base)}), so nobody else could load it; "
        "`alignkit merge RUN --out DIR` makes one whole model, and `hf upload NAME DIR` publishes it"
    )
    return [Problem(what, str(config))]


def _find_secret(file: Path) -> list[Problem]:
    text = file.read_text(encoding="utf-8", errors="replace")
    if console.redact(text) == text:
        return []
    return [Problem("holds something that looks like a secret; take it out before pushing", str(file))]


def _without_paths(file: Path) -> bytes:
    """Return our record of a model with the public names of what it was made from."""
    record = read_json(file)
    lineage: list[dict[str, Any]] = record.get("lineage", [])
    record["lineage"] = [{**entry, "path": public_name(str(entry.get("path", "")))} for entry in lineage]
    return (json.dumps(record, indent=1) + "\n").encode()


@contextmanager
def _explain(repo: str) -> Iterator[None]:
    """Turn what the hub client raises into one EnvironmentProblem."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter is that of its HTTP library

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = console.redact(error.server_message or str(error).split("\n", 1)[0])
        advice = "; does your token have the right to write there?" if status in (401, 403, 404) else ""
        raise EnvironmentProblem(f"{repo}: the hub refused ({status}: {reason}){advice}") from error
    except ValueError as error:  # of `validate`, and of answers that make no sense
        raise EnvironmentProblem(f"{repo}: the hub refused ({console.redact(str(error))})") from error
    except (HTTPError, OSError) as error:
        raise EnvironmentProblem(f"{repo}: the hub cannot be reached ({console.redact(str(error))})") from error
