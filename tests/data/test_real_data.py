"""Real data sets, where they are: the formats people publish, with the faults they really have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Read = Callable[..., Any]
RejectedRows = Callable[..., list[dict[str, Any]]]
DATA = Path(__file__).resolve().parents[2] / "../shared/data"
HH = DATA / "hh-rlhf/harmless_pairs.jsonl.gz"
PREFERENCES = DATA / "preference-pairs/instruction-data-with-preference.json"

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the repository"),
]


@pytest.mark.parametrize("method", ["rm", "dpo"])
def test_hh_pairs(read: Read, rejected_rows: RejectedRows, method: str) -> None:
    reading = read(method, str(HH), on_bad_row="skip")
    report = reading.report
    assert reading.error is None
    assert (report.read, report.rows, report.rejected) == (1800, 1793, 7)
    assert report.sources[0].formats == {"hh pair": 1800}
    assert Counter(row["reason"] for row in rejected_rows(reading.rejects)) == {
        "rejected: its prompt (all up to the last '\\n\\nAssistant:') differs from that of chosen": 4,
        "chosen: the answer after the last '\\n\\nAssistant:' is empty": 3,
    }
    assert [row["line"] for row in rejected_rows(reading.rejects)] == [158, 328, 418, 632, 960, 964, 1010]
    # The published bar is 56.1 % for "shorter is better" on all 2,312 pairs.
    assert report.to_dict()["longer_chosen_share"] == pytest.approx(0.4473, abs=1e-4)
    for row in reading.rows:
        assert row.prompt[0]["role"] == row.prompt[-1]["role"] == "user"
        assert all(len(answer) == 1 and answer[0]["role"] == "assistant" for answer in row.completions)


def test_hh_without_skip_names_the_first_five_and_counts_the_rest(read: Read) -> None:
    *first, last = read("dpo", str(HH)).message.splitlines()
    assert [line.partition("harmless_pairs.jsonl.gz:")[2].partition(":")[0] for line in first] == [
        "158", "328", "418", "632", "960",
    ]  # fmt: skip
    assert last == "and 2 more of 1800 rows (on_bad_row: skip leaves such rows out and writes rejects.jsonl)"


def test_hh_for_sft_is_the_chosen_side(read: Read) -> None:
    pairs = read("dpo", str(HH), on_bad_row="skip").rows
    demonstrations = read("sft", str(HH), on_bad_row="skip").rows
    assert [(row.prompt, row.completions[0]) for row in pairs] == [
        (row.prompt, row.completions[0]) for row in demonstrations
    ]


def test_alpaca_preference_pairs_in_two_column_orders(read: Read) -> None:
    reading = read("dpo", str(PREFERENCES), on_bad_row="skip")
    (source,) = reading.report.sources
    assert source.formats == {"alpaca pair": 1100}
    assert (source.kept, source.equal_answers) == (1094, 6)
    assert source.ignored_columns == {"output": 1094}
    assert reading.rows[0].prompt == (
        "Evaluate the following phrase by transforming it into the spelling given.\n\nfreind --> friend"
    )


def test_alpaca_instructions(read: Read) -> None:
    reading = read("sft", str(DATA / "preference-pairs/instruction-data.json"))
    assert reading.report.sources[0].formats == {"alpaca prompt_completion": 1100}
    assert len(reading.rows) == 1100


def test_sharegpt_preferences(read: Read) -> None:
    reading = read("rm", str(DATA / "format-samples/dpo_en_demo.json"))
    assert reading.report.sources[0].formats == {"sharegpt pair": 300}
    assert Counter(row.prompt[0]["role"] for row in reading.rows) == {"user": 220, "system": 80}
    assert (reading.report.rows, reading.report.to_dict()["duplicates"]) == (300, 5)
    assert read("rm", str(DATA / "format-samples/dpo_en_demo.json"), dedupe=True).report.rows == 295


def test_shakespeare_as_lines_and_as_speeches(read: Read) -> None:
    path = str(DATA / "tinyshakespeare/input.txt")
    assert read("sft", path).report.rows == 32_777
    assert read("sft", path, format="text").report.rows == 7_222


def test_csv_with_columns_renamed(read: Read) -> None:
    path = str(DATA / "instructgpt-samples/tldr_samples.csv")
    reading = read("sft", path, columns={"prompt": "context", "completion": "sample"})
    assert reading.report.rows == 1200
    assert reading.rows[0].prompt.endswith("TL;DR:")
