"""What `alignkit report` does: the page, the model card, and on request the upload, in this order.

It decides only which of them apply to what was named.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignkit.errors import RunError, UsageError
from alignkit.runs.card import write_card
from alignkit.runs.layout import RunDir
from alignkit.runs.report import write_recipe_report, write_report


def publish(
    target: Path,
    *,
    stages: Sequence[tuple[str, Path]] | None = None,
    out: Path | None = None,
    repo: str | None = None,
    public: bool = False,
) -> dict[str, str]:
    """Write the page of a run, a directory of runs, or a recipe's `stages`; return name -> path of all that was made.

    Raises what the writers raise, UsageError for --public without --push, RunError when more than a run is pushed.
    """
    if public and repo is None:
        raise UsageError("--public has no effect without --push")
    is_run = RunDir(target.expanduser()).stage.is_file()
    if repo is not None and not is_run:
        raise RunError("--push uploads the model of one run; name its directory", where=str(target))
    page = write_recipe_report(target.stem, stages, out=out) if stages else write_report(target, out=out)
    done = {"report": str(page)}
    if is_run and (card := write_card(target)) is not None:
        done["card"] = str(card)
    if repo is not None:
        from alignkit.runs.push import push

        done["pushed"] = push(target, repo, public=public)
    return done
