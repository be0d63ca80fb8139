"""BLEU and ROUGE of published InstructGPT samples, to 0.01 (golden/instructgpt_samples_metrics.json)."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from alignkit.evaluate.metrics.overlap import measure_bleu, measure_rouge

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden/instructgpt_samples_metrics.json").read_text())
DATA = Path(__file__).resolve().parents[2] / "../shared/data"
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the repository"),
]


def _read(name: str) -> list[dict[str, str]]:
    with (DATA / "instructgpt-samples" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_bleu_of_all_24_published_translators() -> None:
    rows = _read("fr_to_en_samples.csv")
    for name, expected in GOLDEN["fr_en_first_line"].items():
        model, prompt = name.split("|")
        own = [row for row in rows if (row["model_type"], row["prompt_type"]) == (model, prompt)]
        answers = [row["sample"].strip().split("\n")[0] for row in own]
        bleu = measure_bleu(answers, [row["ref_text"] for row in own], resamples=100)[0]
        assert (bleu.n, bleu.value) == (expected["n"], pytest.approx(expected["bleu"], abs=0.01)), name
        assert bleu.low is not None and bleu.high is not None and bleu.low < expected["bleu"] < bleu.high


@pytest.mark.parametrize(("stemmer", "key"), [(True, "stem"), (False, "nostem")])
def test_rouge_of_all_12_published_summarisers(stemmer: bool, key: str) -> None:
    rows = _read("tldr_samples.csv")
    for model, expected in GOLDEN["tldr_rouge_f"][key].items():
        own = [row for row in rows if row["model_type"] == model]
        figures = measure_rouge(
            [row["sample"] for row in own], [row["ref_text"] for row in own], stemmer=stemmer, resamples=100
        )
        assert [figure.value for figure in figures] == pytest.approx([100 * value for value in expected], abs=0.01), (
            model
        )
