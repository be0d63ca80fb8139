"""What a label or critique stage works on, read and fingerprinted before a model is opened.

Equal facts and the same seed make the same rows; `alignkit run` compares them with those of the run that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.data import DataReport, Rejects, Row, read_rows
from alignkit.feedback.cache import key_of
from alignkit.feedback.constitution import Constitution, load_constitution
from alignkit.feedback.examples import Examples, load_examples
from alignkit.feedback.judge import Pairing
from alignkit.feedback.judge_report import read_labelled
from alignkit.feedback.writer import describe_source, fingerprint_file, own_model, speaks_chat
from alignkit.recipe.schema import CritiqueOptions, DataSource, FeedbackModel, LabelOptions
from alignkit.recipe.stage import Stage
from alignkit.runs.directory import RunDir, list_changes


@dataclass
class LabelInput:
    """Rows, principles and examples of a label stage."""

    stage: Stage
    options: LabelOptions
    constitution: Constitution
    examples: Examples
    rejects: Rejects = field(default_factory=Rejects)
    report: DataReport = field(default_factory=DataReport)
    mix_report: DataReport = field(default_factory=DataReport)
    rows: list[Row] = field(default_factory=list)
    mix: list[Row] = field(default_factory=list)
    check: list[Pairing] = field(default_factory=list)

    @classmethod
    def read(cls, stage: Stage) -> LabelInput:
        """Read everything; raises DataError and RecipeError for what cannot be used."""
        options = stage.expect(LabelOptions)
        constitution = load_constitution(options.constitution, needs="comparison")
        found = cls(stage, options, constitution, load_examples(options.examples))
        method = "rm" if found.is_given else None
        template = None if found.generator is None else speaks_chat(found.generator)
        found.rows = list(
            read_rows(stage, options.data, report=found.report, rejects=found.rejects, method=method, template=template)
        )
        if options.mix:
            found.mix = list(read_rows(stage, options.mix, report=found.mix_report, rejects=found.rejects, method="rm"))
        if options.check:
            found.check = read_labelled(stage, options.check, found.rejects)
        return found

    @property
    def is_given(self) -> bool:
        """Whether the answers are those of the rows, and none is sampled."""
        return self.options.answers == "given"

    @property
    def generator(self) -> FeedbackModel | None:
        """Return what answers the prompts."""
        return None if self.is_given else self.options.generator or own_model(self.stage)

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that can change a row."""
        options = self.options
        return {
            "method": "label",
            "seed": self.stage.seed,
            "judge": describe_source(options.judge),
            "generator": None if self.generator is None else describe_source(self.generator),
            "constitution": self.constitution.fingerprint,
            "examples": self.examples.fingerprint,
            "answers": options.answers,
            "orders": options.orders,
            "cot": options.cot,
            "cot_tokens": options.cot_tokens if options.cot else None,
            "bounds": list(options.bounds),
            "hard": options.hard,
            "temperature": options.temperature,
            "max_new_tokens": options.max_new_tokens,
            "data": self.report.fingerprint,
            "mix": self.mix_report.fingerprint,
            "check": key_of(keys=[pairing.key for pairing in self.check]),
        }


@dataclass
class CritiqueInput:
    """Prompts, principles and examples of a critique stage."""

    stage: Stage
    options: CritiqueOptions
    constitution: Constitution
    examples: Examples
    rejects: Rejects = field(default_factory=Rejects)
    report: DataReport = field(default_factory=DataReport)
    helpful_report: DataReport = field(default_factory=DataReport)
    rows: list[Row] = field(default_factory=list)
    helpful: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, stage: Stage) -> CritiqueInput:
        """Read everything; raises DataError and RecipeError for what cannot be used."""
        options = stage.expect(CritiqueOptions)
        constitution = load_constitution(options.constitution or (), needs="critique")
        found = cls(stage, options, constitution, load_examples(options.examples))

        template = speaks_chat(found.generator)

        def read(sources: Sequence[DataSource], report: DataReport) -> list[Row]:
            return list(read_rows(stage, sources, report=report, rejects=found.rejects, template=template))

        found.rows = read(options.data, found.report)
        found.helpful = read(options.helpful.data, found.helpful_report) if options.helpful else []
        return found

    @property
    def generator(self) -> FeedbackModel:
        """Return what answers, criticises and revises."""
        return self.options.generator or own_model(self.stage)

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that can change a row."""
        options = self.options
        return {
            "method": "critique",
            "seed": self.stage.seed,
            "generator": describe_source(self.generator),
            "constitution": self.constitution.fingerprint,
            "examples": self.examples.fingerprint,
            "rounds": options.rounds,
            "critiques": options.critiques,
            "temperature": options.temperature,
            "max_new_tokens": options.max_new_tokens,
            "helpful_samples": options.helpful.samples if options.helpful else 0,
            "data": self.report.fingerprint,
            "helpful_data": self.helpful_report.fingerprint,
        }


def replay_facts(options: CritiqueOptions) -> dict[str, Any]:
    """Return everything that can change a row made from published chains."""
    return {"method": "critique", "replay": [fingerprint_file(path) for path in options.replay or ()]}


def find_changes(stage: Stage, run_dir: Path, *, allow_change: Sequence[str] = ()) -> list[str]:
    """Return how a stage differs from the run that has begun there, "key: before -> now"; reads all of its rows."""
    options = stage.options
    if isinstance(options, CritiqueOptions):
        facts = replay_facts(options) if options.replay else CritiqueInput.read(stage).facts
    else:
        facts = LabelInput.read(stage).facts
    return list(list_changes(RunDir(run_dir), facts, allow_change=allow_change).values())
