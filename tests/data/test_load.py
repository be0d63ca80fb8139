"""Rows for a stage: sources found, formats mixed or not, weights, dedupe, splits, overlap, and what is said of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import DataReport, Row, split_eval
from alignkit.data.files import ACCEPTED
from alignkit.recipe.schema import DataSource

Lines = Callable[..., Path]
Read = Callable[..., Any]
RejectedRows = Callable[..., list[dict[str, Any]]]


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": str(n)} for n in range(count)]


def answers(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(count)]


def test_rows_come_in_order_source_after_source(read: Read, lines: Lines) -> None:
    lines("a.jsonl", answers(2))
    lines("b.jsonl", [{"text": "one"}])
    reading = read("sft", "a.jsonl", "b.jsonl")
    assert [row.place for row in reading.rows] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert reading.report.kinds == {"prompt_completion": 2, "text": 1}


def test_bad_rows_are_all_counted_and_the_first_five_named(read: Read, lines: Lines) -> None:
    rows = pairs(20)
    for number in (1, 3, 5, 7, 9, 11, 13):
        del rows[number]["rejected"]
    reading = read("dpo", lines("pairs.jsonl", rows).name)
    assert reading.message == "\n".join(
        [
            *(f"pairs.jsonl:{line}: rejected: is missing; the row has prompt, chosen" for line in (2, 4, 6, 8, 10)),
            "and 2 more of 20 rows (on_bad_row: skip leaves such rows out and writes rejects.jsonl)",
        ]
    )
    assert len(reading.rows) == 13
    lines("pairs.jsonl", [*pairs(733), '{"prompt": "Hi", "chosen": "a" "rejected": "b"}', *pairs(2)])
    assert read("rm", "pairs.jsonl").message == (
        "pairs.jsonl:734: invalid JSON: Expecting ',' delimiter (column 32)\n"
        "1 of 736 rows cannot be used (on_bad_row: skip leaves such rows out and writes rejects.jsonl)"
    )


def test_skip_writes_rejects_with_file_line_and_reason(read: Read, lines: Lines, rejected_rows: RejectedRows) -> None:
    lines("pairs.jsonl", [*pairs(3), "{", {"prompt": "Hi", "chosen": "a", "rejected": "a"}])
    reading = read("dpo", "pairs.jsonl", on_bad_row="skip")
    assert reading.error is None
    assert len(reading.rows) == 3
    assert rejected_rows(reading.rejects) == [
        {
            "file": "pairs.jsonl",
            "line": 4,
            "reason": "invalid JSON: Expecting property name enclosed in double quotes (column 2)",
        },
        {"file": "pairs.jsonl", "line": 5, "reason": "rejected: is the same as chosen"},
    ]
    (source,) = reading.report.sources
    assert (source.read, source.kept, source.rejected, source.equal_answers) == (5, 3, 2, 1)


def test_no_row_left_says_why(read: Read, lines: Lines) -> None:
    lines("rows.jsonl", [{"text": ""}] * 7)
    reading = read("sft", "rows.jsonl", on_bad_row="skip")
    assert reading.message == "\n".join(
        [*(f"rows.jsonl:{line}: text: is empty" for line in range(1, 6)), "rows.jsonl: no row is left of 7 read"]
    )


def test_mixed_formats_name_the_first_two_lines_of_each_wherever_they_begin(read: Read, lines: Lines) -> None:
    lines("mixed.jsonl", [*answers(2), {"text": "one"}, *answers(3), {"text": "two"}, {"text": "three"}])
    assert read("sft", "mixed.jsonl").message == (
        "mixed.jsonl: mixes kinds of rows: 5 rows of trl prompt_completion (mixed.jsonl:1, mixed.jsonl:2, ...), "
        "3 rows of text (mixed.jsonl:3, mixed.jsonl:7, ...); give each kind its own source, or set on_bad_row: skip "
        "to keep the commonest"
    )
    lines("mixed.jsonl", [*answers(999), {"messages": [{"role": "user", "content": "Hi"}]}])
    assert "(mixed.jsonl:1, mixed.jsonl:2, ...), 1 row of openai messages (mixed.jsonl:1000); " in (
        read("sft", "mixed.jsonl").message
    )


def test_mixed_formats_under_skip_keep_the_commonest(read: Read, lines: Lines, rejected_rows: RejectedRows) -> None:
    lines("mixed.jsonl", [{"text": "first"}, *answers(2)])
    reading = read("sft", "mixed.jsonl", on_bad_row="skip")
    assert [row.kind for row in reading.rows] == ["prompt_completion"] * 2
    assert rejected_rows(reading.rejects) == [
        {
            "file": "mixed.jsonl",
            "line": 1,
            "reason": "is a row of text; most usable rows of the source are trl prompt_completion",
        }
    ]


def test_rows_the_method_cannot_take_are_one_problem(read: Read, lines: Lines) -> None:
    lines("rows.jsonl", answers(3))
    assert read("dpo", "rows.jsonl").message == (
        "rows.jsonl: 3 rows of trl prompt_completion (rows.jsonl:1, rows.jsonl:2, ...); "
        "dpo takes pair, ranked, unpaired; the rows have prompt, completion: "
        "data.columns: {chosen: COLUMN, rejected: COLUMN} names others"
    )


def test_sft_takes_the_best_answer_and_dpo_all_pairs_but_ties(read: Read, lines: Lines) -> None:
    lines("pairs.jsonl", [pairs(1)[0], pairs(1)[0] | {"label": 0.2}])
    lines("ranked.jsonl", [{"prompt": "Hi", "completions": ["a", "b", "c"], "scores": [1, 2, 2]}])
    reading = read("sft", "pairs.jsonl", "ranked.jsonl")
    assert [row.completions for row in reading.rows] == [("1",), ("0",), ("b",)]
    assert {row.kind for row in reading.rows} == {"prompt_completion"}
    reading = read("dpo", "ranked.jsonl")
    assert [row.completions for row in reading.rows] == [("b", "a"), ("c", "a")]
    assert [row.place for row in reading.rows] == ["ranked.jsonl:1", "ranked.jsonl:1"]


def test_critique_and_label_get_rows_as_they_are_and_may_read_them_as_another_method(read: Read, lines: Lines) -> None:
    lines("a.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad", "label": 0.75}])
    lines("b.jsonl", [{"prompt": "q"}])
    for method in ("critique", "label"):
        files = {} if method == "critique" else {"constitution": "c.yaml", "judge": "x/y"}
        kinds = [row.kind for name in ("a", "b") for row in read(method, f"{name}.jsonl", **files).rows]
        assert kinds == ["pair", "prompt"]
    (row,) = read("critique", "a.jsonl", read_as="rm").rows
    assert (row.kind, row.label) == ("pair", 0.75)
    assert "1 row of trl prompt" in (said := read("critique", "b.jsonl", read_as="rm").message)
    assert "rm takes pair, ranked; the rows have" in said


def test_dpo_does_not_mix_pairs_with_single_answers(read: Read, lines: Lines) -> None:
    lines("pairs.jsonl", pairs(2))
    lines("single.jsonl", [{"prompt": "Hi", "completion": "a", "label": True}])
    expected = "test.yaml:3: 2 pair rows and 1 unpaired rows cannot be trained on in one dpo stage; give each its own"
    assert read("dpo", "pairs.jsonl", "single.jsonl").message == expected


def test_weight_counts_passes(read: Read, lines: Lines) -> None:
    lines("a.jsonl", answers(400))
    assert len(read("sft", "a.jsonl", weight=2).rows) == 800
    half, other = read("sft", "a.jsonl", weight=0.5, seed=1), read("sft", "a.jsonl", weight=0.5, seed=2)
    assert 160 < len(half.rows) < 240
    assert half.rows == read("sft", "a.jsonl", weight=0.5, seed=1).rows != other.rows
    (source,) = half.report.sources
    assert source.kept + source.not_sampled == source.read == 400
    more = Counter(row.place for row in read("sft", "a.jsonl", weight=2.5, seed=1).rows)
    assert {place for place, count in more.items() if count == 3} == {row.place for row in half.rows}
    assert set(more.values()) == {2, 3}
    thrice = read("sft", "a.jsonl", weight=3, dedupe=True)  # copies are no duplicates
    assert (len(thrice.rows), thrice.report.to_dict()["duplicates"]) == (1200, 0)


def test_max_rows_takes_the_first_good_rows(read: Read, lines: Lines) -> None:
    lines("a.jsonl", ["{", *answers(9)])
    reading = read("sft", "a.jsonl", max_rows=3, on_bad_row="skip")
    assert [row.place for row in reading.rows] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]


def count_repeats(report: DataReport) -> tuple[int, int]:
    found = report.to_dict()
    return found["duplicates"], found["duplicate_prompts"]


def test_dedupe_drops_exact_repeats_across_sources(read: Read, lines: Lines) -> None:
    lines("a.jsonl", [*answers(3), answers(1)[0]])
    lines("b.jsonl", [*answers(5), {"prompt": "0+1=", "completion": "one"}])
    kept = read("sft", "a.jsonl", "b.jsonl", dedupe=True)
    places = [row.place for row in kept.rows]
    assert places == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:4", "b.jsonl:5", "b.jsonl:6"]
    assert [source.duplicates_dropped for source in kept.report.sources] == [1, 3]
    assert count_repeats(kept.report) == (4, 1)
    everything = read("sft", "a.jsonl", "b.jsonl")
    assert len(everything.rows) == 10
    assert count_repeats(everything.report) == (4, 5)


def test_half_a_surrogate_pair_is_a_bad_row(read: Read, lines: Lines) -> None:
    lines("a.jsonl", [{"text": "fine"}, '{"text": "half \\ud83d"}', '{"text": "whole \\ud83d\\ude00"}'])
    assert read("sft", "a.jsonl").message.startswith(
        "a.jsonl:2: text holds \\ud83d, half of a surrogate pair: it is not valid Unicode; remove it\n1 of 3 rows"
    )


def test_columns_are_renamed_in_every_row(read: Read, lines: Lines) -> None:
    lines("a.jsonl", [{"question": "Hi", "answer": "Hello", "id": 1}, {"question": "Ho", "reply": "Hello"}])
    reading = read("sft", "a.jsonl", columns={"prompt": "question", "completion": "answer"}, on_bad_row="skip")
    assert [row.completions for row in reading.rows] == [("Hello",)]
    assert reading.report.sources[0].ignored_columns == {"id": 1}
    message = read("sft", "a.jsonl", columns={"prompt": "question", "completion": "answer"}).message
    assert message.startswith("a.jsonl:2: answer: is missing (columns.completion); the row has question, reply\n")


def test_fingerprint_depends_on_rows_and_order_only(read: Read, lines: Lines) -> None:
    lines("a.jsonl", answers(5))
    lines("b.jsonl", answers(5))
    lines("c.jsonl", reversed(answers(5)))
    (first, second, third) = (read("sft", name).report.fingerprint for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert first == second != third
    # Written down once, so that a release that changes it by accident is noticed: runs would refuse to resume.
    assert first == "ab2800a5e3c44be7da5c630a8099a757"


def test_split_keeps_a_prompt_on_one_side(read: Read, lines: Lines) -> None:
    rows = [row | {"completion": f"{row['completion']}{copy}"} for row in answers(500) for copy in "abc"]
    lines("a.jsonl", rows)
    split = list(split_eval(read("sft", "a.jsonl").rows, 0.1, seed=0))
    held_out = {row.prompt for is_eval, row in split if is_eval}
    trained = {row.prompt for is_eval, row in split if not is_eval}
    assert not held_out & trained
    assert len(held_out) + len(trained) == 500
    assert 25 < len(held_out) < 80
    assert [is_eval for is_eval, _ in split] == [e for e, _ in split_eval((row for _, row in split), 0.1, seed=0)]
    assert held_out != {row.prompt for is_eval, row in split_eval((row for _, row in split), 0.1, seed=1) if is_eval}


def test_split_of_conversations_goes_by_what_was_asked_first() -> None:
    def conversation(*contents: str) -> Row:
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        return Row("messages", "", (messages,))

    rows = [conversation(f"{n}", "yes") for n in range(50)] + [
        conversation(f"{n}", "no", "why", "so") for n in range(50)
    ]
    sides = [is_eval for is_eval, _ in split_eval(rows, 0.5, seed=0)]
    assert sides[:50] == sides[50:]
    assert 10 < sum(sides[:50]) < 40


def test_overlap_with_the_training_prompts_is_counted_and_placed(read: Read, lines: Lines) -> None:
    lines("train.jsonl", answers(10))
    lines(
        "eval.jsonl", [{"prompt": [{"role": "user", "content": f"{n}+1= "}], "completion": "x"} for n in (8, 9, 10, 11)]
    )
    train = read("sft", "train.jsonl")
    held_out = read("sft", "eval.jsonl", known_prompts=train.report.prompt_hashes.sort())
    assert held_out.report.overlap == 2
    assert held_out.report.overlap_places == ["eval.jsonl:1", "eval.jsonl:2"]
    assert train.report.overlap == 0


def test_length_bias_is_reported(read: Read, lines: Lines) -> None:
    rows = [("aaaa", "b"), ("aa", "bbb"), ("aa", "bb"), ("aaa", "b")]
    lines("a.jsonl", [{"prompt": "p", "chosen": chosen, "rejected": rejected} for chosen, rejected in rows])
    report = read("rm", "a.jsonl").report.to_dict()
    assert report["comparisons"] == 4
    assert report["longer_chosen_share"] == (2 + 0.5) / 4
    assert report["mean_chosen_chars"] == 11 / 4
    assert report["mean_rejected_chars"] == 7 / 4
    assert json.loads(json.dumps(report)) == report


def test_a_directory_gives_its_data_files_by_name(read: Read, lines: Lines) -> None:
    lines("data/b.jsonl", answers(1))
    lines("data/a.jsonl", answers(2))
    lines("data/README.md", ["not data"])
    assert [row.place for row in read("sft", "data").rows] == ["data/a.jsonl:1", "data/a.jsonl:2", "data/b.jsonl:1"]


@pytest.mark.parametrize(
    ("files", "keys", "found"),
    [
        (["train-00000.jsonl", "test-00000.jsonl", "dev.jsonl"], {}, ["train-00000.jsonl:1"]),
        (["train.jsonl", "dev.jsonl"], {"split": "validation"}, ["dev.jsonl:1"]),
        (["alpaca_train.jsonl", "alpaca_test.jsonl"], {"split": "test"}, ["alpaca_test.jsonl:1"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"], {},
         ["train-00000-of-00002.jsonl:1", "train-00001-of-00002.jsonl:1"]),
        (["train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"], {},
         "has no split train; it has train_gen, train_sft: write split: NAME"),
        (["train_sft.jsonl", "train_gen.jsonl"], {"split": "train_sft+train_gen"},
         ["train_sft.jsonl:1", "train_gen.jsonl:1"]),
        (["test.jsonl"], {}, "has no split train; it has test: write split: NAME"),
        (["train.jsonl", "more.jsonl"], {},
         "holds train.jsonl, which names a split, and more.jsonl, which names none; name the files to use"),
        (["deep/a.jsonl"], {}, ["deep/a.jsonl:1"]),
        (["x/a.jsonl", "y/b.jsonl"], {"data_dir": "y"}, ["y/b.jsonl:1"]),
        (["x/a.jsonl", "y/b.jsonl"], {}, "holds data files in data/x, data/y; name one with data_dir:, or several "
         "with a pattern such as DIR/**/*.jsonl"),
        (["a.jsonl"], {"name": "other"}, "data.name has no effect: the directory's README.md lists no configs"),
    ],
)  # fmt: skip
def test_a_directory_is_read_by_split_and_never_mixed(
    read: Read, lines: Lines, files: list[str], keys: dict[str, str], found: list[str] | str
) -> None:
    for name in files:
        lines(f"data/{name}", answers(1))
    reading = read("sft", "data", **keys)
    if isinstance(found, str):
        assert reading.message == f"data: {found}"
    else:
        assert [row.place for row in reading.rows] == [f"data/{name}" for name in found]


def test_files_about_a_data_set_are_not_read_as_rows(read: Read, lines: Lines) -> None:
    lines("data/train.jsonl", answers(1))
    for name in ("dataset_infos.json", "dataset_info.json", "config.json"):
        lines(f"data/{name}", [{"default": {"features": {}}}])
    assert [row.place for row in read("sft", "data").rows] == ["data/train.jsonl:1"]


def test_a_shard_without_rows_does_not_stop_the_others(read: Read, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    rows = pa.Table.from_pylist(answers(2))
    for number, table in enumerate((rows.slice(0, 0), rows)):
        pq.write_table(table, tmp_path / f"data/train-0000{number}-of-00002.parquet")
    assert [row.place for row in read("sft", "data").rows] == [
        f"data/train-00001-of-00002.parquet[row {number}]" for number in (1, 2)
    ]
    alone = "data/train-00000-of-00002.parquet"
    assert read("sft", alone).message == f"{alone}: the file has no rows"


def test_a_pipe_is_refused_and_not_waited_for(read: Read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert read("sft", "rows.jsonl").message == f"rows.jsonl: is not a data file we read ({ACCEPTED})"


def test_a_pattern_gives_its_files_and_a_slice_its_rows(read: Read, lines: Lines) -> None:
    lines("data/train-1.jsonl", answers(3))
    lines("data/train-2.jsonl", answers(1))
    lines("data/test-1.jsonl", answers(2))

    def places(path: str, **keys: str) -> list[str]:
        return [row.place.removeprefix("data/") for row in read("sft", path, **keys).rows]

    assert places("data/train-*.jsonl", split="train[1:]") == ["train-1.jsonl:2", "train-1.jsonl:3", "train-2.jsonl:1"]
    assert places("data/test-*") == ["test-1.jsonl:1", "test-1.jsonl:2"]
    assert places("data", split="train[:50%]+test[1:]") == ["train-1.jsonl:1", "train-1.jsonl:2", "test-1.jsonl:2"]
    assert places("data/train-1.jsonl", split="train[-1:]") == ["train-1.jsonl:3"]
    matches = "data/*: matches files of the splits test, train; write split: NAME, or name the files"
    assert read("sft", "data/*").message == matches
    assert read("sft", "data", split="train[a]").message.startswith("data: split: Unrecognized instruction format")


def test_a_local_copy_is_read_as_its_readme_says(read: Read, lines: Lines) -> None:
    lines("hub/data/train-a.jsonl", answers(2))
    lines("hub/data/test-a.jsonl", answers(1))
    lines("hub/more/a.jsonl", answers(3))
    lines("hub/README.md", ["---", "license: mit", "configs:", "- config_name: default", "  data_files:",
                            "  - {split: train, path: data/train-*}", "  - {split: test, path: data/test-*}",
                            "- config_name: other", "  data_dir: more", "---"])  # fmt: skip
    assert len(read("sft", "hub").rows) == 2
    assert [row.place for row in read("sft", "hub", split="test").rows] == ["hub/data/test-a.jsonl:1"]
    assert len(read("sft", "hub", name="other").rows) == 3
    assert "Available: ['default', 'other']" in read("sft", "hub", name="nothing").message
    lines("hub/README.md", ["---", "configs:", "- {config_name: a, data_dir: data}",
                            "- {config_name: b, data_dir: more}", "---"])  # fmt: skip
    assert read("sft", "hub").message.endswith("among the available configs: ['a', 'b']; name one with data.name")
    lines("hub/README.md", ["---", "configs: [", "---"])
    assert read("sft", "hub").message.startswith("hub: cannot be read as its README.md describes it: while parsing")


def test_sources_that_cannot_be_used_are_all_named(read: Read, lines: Lines) -> None:
    lines("pairs.jsonl", pairs(1))
    lines("data/LICENSE", ["MIT"])
    lines("rows.xlsx", ["x"])
    assert read("dpo", "pair.jsonl", "no/such/file.csv", "pairs.jsonl", "data", "rows.xlsx").message == (
        "pair.jsonl: no such file; did you mean pairs.jsonl?\n"
        "no/such/file.csv: no such file; the directory no does not exist\n"
        f"data: the directory has no data files ({ACCEPTED})\n"
        f"rows.xlsx: is not a data file we read ({ACCEPTED})"
    )
    assert read("rm", "pairs.jsonl", split="test", revision="main").message == (
        "pairs.jsonl: data.revision has no effect on a local file; remove it\n"
        "pairs.jsonl: data.split has no effect on a local file; remove it"
    )


def test_text_files_are_lines_or_blocks_by_format(read: Read, lines: Lines) -> None:
    lines("a.txt", ["one", "two", "", "three"])
    assert len(read("sft", "a.txt").rows) == 3
    assert [row.completions for row in read("sft", "a.txt", format="text").rows] == [("one\ntwo",), ("three",)]


def test_labels_and_scores_in_csv_are_numbers(read: Read, lines: Lines) -> None:
    lines("a.csv", ["prompt,chosen,rejected,label,margin", "Hi,a,b,0.8,2", "Ho,a,b,,"])
    reading = read("rm", "a.csv", on_bad_row="skip")
    assert [(row.label, row.margin) for row in reading.rows] == [(0.8, 2.0), (None, None)]


@pytest.fixture
def saved_dataset(tmp_path: Path) -> Iterator[Path]:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "saved"
    splits = {"train": datasets.Dataset.from_list(answers(5)), "test": datasets.Dataset.from_list(answers(2))}
    datasets.DatasetDict(splits).save_to_disk(str(path))
    yield path


def test_data_saved_by_datasets_is_read_by_split(read: Read, saved_dataset: Path) -> None:
    assert len(read("sft", "saved").rows) == 5
    assert read("sft", "saved", split="test").rows[1].place == "saved[row 2]"
    assert [row.place for row in read("sft", "saved", split="train[3:]").rows] == ["saved[row 4]", "saved[row 5]"]
    expected = "has no split dev; it has train, test: write split: NAME"
    assert read("sft", "saved", split="dev").message == f"saved: {expected}"
    lone = "saved/train"  # a Dataset that does not know its split
    assert len(read("sft", lone, split="train[:1]").rows) == 1
    expected = "has no split test; it has train: write split: NAME"
    assert read("sft", lone, split="test").message == f"{lone}: {expected}"
    (arrow,) = Path("saved/train").glob("*.arrow")
    assert [row.place for row in read("sft", str(arrow), split="train[:1]").rows] == [f"{arrow}[row 1]"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dataset_dict.json", '{"splits": 3}'),
        ("dataset_dict.json", "[]"),
        ("train/dataset_info.json", '{"features": "x"}'),
        ("train/state.json", '{"_data_files": 3}'),
    ],
)
def test_a_damaged_record_of_data_saved_by_datasets_is_one_message(
    read: Read, saved_dataset: Path, name: str, text: str
) -> None:
    (saved_dataset / name).write_text(text)
    said = read("sft", "saved").message
    assert "saved: cannot be read as a data set saved on disk: " in said and "\n" not in said


def test_conversations_that_stand_as_json_in_a_cell_are_read(read: Read, lines: Lines) -> None:
    def cell(*said: tuple[str, str]) -> str:
        text = json.dumps([{"role": role, "content": content} for role, content in said]).replace('"', '""')
        return f'"{text}"'

    chosen, rejected = (cell(("user", "q"), ("assistant", answer)) for answer in "ab")
    lines("pairs.csv", ["chosen,rejected", f"{chosen},{rejected}"])
    (row,) = read("dpo", "pairs.csv").rows
    assert row.prompt == [{"role": "user", "content": "q"}]
    assert row.completions == ([{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}])
    lines("shown.tsv", ["messages", "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]"])
    expected = "shown.tsv:2: messages: holds a conversation as text that is no JSON; write the cell with json.dumps"
    assert read("sft", "shown.tsv").message.splitlines()[0] == expected
    answer = '[{"role": "admin"}]'
    lines("text.jsonl", [{"prompt": "List the roles.", "completion": answer}])  # JSON as an answer stays one
    assert read("sft", "text.jsonl").rows[0].completions == (answer,)


@pytest.mark.slow
def test_a_hub_id_that_cannot_be_had_is_one_line(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = read("sft", "nobody/nothing").message
    assert message.startswith(
        "nobody/nothing: no such local path, and not to be had as a hub data set (split train): "
        "HF_HUB_OFFLINE is set, so only the cache was searched; "
    )
    assert "\n" not in message


def test_a_source_that_is_bad_and_one_that_is_mixed_are_both_reported(read: Read, lines: Lines) -> None:
    lines("a.jsonl", [*answers(2), {"text": "x"}])
    lines("b.jsonl", [*answers(1), "{"])
    read_both = read("sft", DataSource(path="a.jsonl"), DataSource(path="b.jsonl", weight=2))
    first, second, third = read_both.message.splitlines()
    assert first.startswith("a.jsonl: mixes kinds of rows: ")
    assert second.startswith("b.jsonl:2: invalid JSON: ")
    assert third.startswith("1 of 5 rows cannot be used ")
