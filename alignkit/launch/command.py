"""A stage command as it was given, to be started again elsewhere: by a launcher, by SLURM, by the pipeline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.recipe import Stage
from alignkit.recipe.schema import FEEDBACK


@dataclass(frozen=True)
class Command:
    """`alignkit METHOD --recipe FILE ...`: what decides the work; not --force, --retries or --json."""

    method: str  # the command: that of critique and label stages is rlaif
    recipe: str
    stage: str
    overrides: tuple[str, ...] = ()
    out: str | None = None
    trust_code: bool = False
    allow_change: tuple[str, ...] = ()
    allow_key: tuple[str, ...] = ()
    node_rank: int | None = None  # --node-rank: of this machine, so never part of `arguments`

    @classmethod
    def of(
        cls,
        stage: Stage,
        overrides: Sequence[str],
        *,
        out: Path | None = None,
        allow_change: tuple[str, ...] = (),
        allow_key: tuple[str, ...] = (),
        node_rank: int | None = None,
    ) -> Command:
        """Return the command of a resolved stage, its name always written out."""
        return cls(
            method="rlaif" if stage.method in FEEDBACK else stage.method,
            recipe=stage.recipe_path,
            stage=stage.name,
            overrides=tuple(overrides),
            out=str(out) if out else None,
            trust_code=stage.trust_code,
            allow_change=allow_change,
            allow_key=allow_key,
            node_rank=node_rank,
        )

    def arguments(self) -> list[str]:
        """Return what stands after `alignkit`."""
        words = [self.method, "--recipe", self.recipe, "--stage", self.stage]
        for override in self.overrides:
            words += ["--set", override]
        for key in self.allow_change:
            words += ["--allow-change", key]
        for name in self.allow_key:
            words += ["--allow-key", name]
        words += ["--out", self.out] if self.out else []
        return words + (["--trust-code"] if self.trust_code else [])

    def argv(self) -> list[str]:
        """Return the whole command with this interpreter, as subprocess takes it."""
        return [sys.executable, "-m", "alignkit", *self.arguments()]
