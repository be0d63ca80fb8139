"""The page and the model card of a run that has ended; `alignkit report` makes them again, and pushes on request."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from alignkit import console
from alignkit.errors import DiskError, RunError, UsageError, first_line
from alignkit.runs.directory import CARD, Result, RunDir, find_damaged_product, read_result
from alignkit.runs.files import write_text

_Page = TypeVar("_Page")


def show(run: RunDir) -> None:
    """Write page and card of a run that has ended; neither can fail it."""
    from alignkit.report.card import write_card
    from alignkit.report.page import write_report

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
    from jinja2 import TemplateError

    from alignkit.report.card import push, write_card
    from alignkit.report.page import write_recipe_report, write_report

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
