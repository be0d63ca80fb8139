"""Supervised fine-tuning on labels: rows, losses, what is saved, and how a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignkit.errors import DataError, ModelError, RecipeError
from alignkit.runs.directory import RunDir

NLI = [
    {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1},
    {"premise": "It rains.", "hypothesis": "It is dry.", "label": 0},
]
THINGS = ("film", "book", "song", "day")
TONES = [{"text": f"{tone} {thing}", "label": tone} for tone in ("bad", "good") for thing in THINGS]


def _read(prepare: Callable, rows: list[dict], options: str) -> list[tuple[list[str], str]]:
    table = prepare(rows, f"sft: {{data: rows.jsonl, {options}}}")
    return [
        ([table.decode(ids).replace("|", "") for ids in row["sequences"]], row["label"]) for row in table.tables.train
    ]


def test_rows_of_every_task(prepare: Callable) -> None:
    pair = "<start>It rains.<delimiter>It is {}.<extract>"
    assert _read(prepare, NLI, "objective: classify") == [([pair.format("wet")], "1"), ([pair.format("dry")], "0")]
    named = _read(prepare, NLI, "objective: classify, labels: [contradiction, entailment]")
    assert [label for _, label in named] == ["entailment", "contradiction"]
    rows = [{"sentence": "fine", "label": True}, {"sentence": "poor", "label": False}]
    assert _read(prepare, rows, "objective: classify") == [
        (["<start>fine<extract>"], "true"),
        (["<start>poor<extract>"], "false"),
    ]
    rows = [{"question1": "Who?", "question2": "Whom?", "label": n} for n in (1, 0)]
    both = ["<start>Who?<delimiter>Whom?<extract>", "<start>Whom?<delimiter>Who?<extract>"]
    assert _read(prepare, rows, "objective: similarity") == [(both, "1"), (both, "0")]


@pytest.mark.parametrize(
    "row",
    [
        {"context": "It is", "question": "cold?", "choices": ["no", "yes"], "answer": 1},
        {"article": "It is", "question": "cold?", "options": ["no", "yes"], "answer": "B"},
        {"passage": "It is", "question": "cold?", "endings": ["no", "yes"], "label": "1"},
        {"context": "It is", "question": "cold?", "choices": ["no", "yes"], "answer": "yes"},
        {
            "context": "It is",
            "question": "cold?",
            "choices": {"text": ["no", "yes"], "label": ["1", "2"]},
            "answerKey": "2",
        },
    ],
)
def test_choices_as_data_sets_write_them(row: dict, prepare: Callable) -> None:
    sequences = [f"<start>It is\ncold?<delimiter>{answer}<extract>" for answer in ("no", "yes")]
    assert _read(prepare, [row], "objective: multiple_choice") == [(sequences, "1")]


@pytest.mark.parametrize(
    ("objective", "row", "said"),
    [
        ("classify", {"text": "a", "label": -1},
         "label: is -1, which stands for a row without a label; leave such rows out"),
        ("classify", {"text": "a", "label": 0.5}, "label: is 0.5; it must be the name or the number of a label"),
        ("classify", {"text": "a"}, "label: is missing; the row has text"),
        ("classify", {"text": "<|extract|>", "label": "x"}, "control tokens of the tokenizer in the text: <|extract|>"),
        ("classify, labels: [good, bad]", {"text": "a", "label": 2},
         "label: is 2, which is none of sft.labels: good, bad"),
        ("similarity", {"sentence1": "a", "label": 1}, "sentence2: is missing; the row has sentence1, label"),
        ("multiple_choice", {"context": "a", "choices": ["b"], "answer": 0},
         "choices: has one answer; a choice needs two or more"),
        ("multiple_choice", {"context": "a", "choices": ["b", "c"], "answer": 2},
         "answer: is 2, which is none of the 2 choices: give its number from 0, a letter, or the text"),
    ],
)  # fmt: skip
def test_a_bad_row_is_told_with_its_place(objective: str, row: dict, said: str, prepare: Callable) -> None:
    with pytest.raises(DataError) as caught:
        prepare([row], f"sft: {{data: rows.jsonl, objective: {objective}}}")
    assert str(caught.value.problems[0]).startswith(f"rows.jsonl:1: {said}")


@pytest.mark.parametrize("save", ["to_parquet", "save_to_disk"])
def test_the_names_of_a_class_label_are_honoured(save: str, prepare: Callable, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset

    rows = Dataset.from_list([{"text": "fine", "label": 1}, {"text": "poor", "label": 0}])
    getattr(rows.cast_column("label", ClassLabel(names=["neg", "pos"])), save)(tmp_path / "rows.parquet")
    table = prepare(None, "sft: {data: rows.parquet, objective: classify}").tables.train
    assert table["label"][:] == ["pos", "neg"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sft: {objective: classify, packing: true}",
         "sft.packing has no effect with objective: classify, which reads texts and labels"),
        ("sft: {lm_coef: 0.3}",
         "sft.lm_coef has no effect without an objective that learns labels: classify, similarity, multiple_choice"),
        ("a: {method: sft, objective: classify}\ndpo: {start_from: a}",
         "dpo.start_from is a, a classifier; a dpo stage starts from a language model"),
    ],
)  # fmt: skip
def test_what_a_classifier_cannot_do_is_refused(text: str, said: str, make_stage: Callable) -> None:
    with pytest.raises(RecipeError) as caught:
        make_stage(f"model: {{path: builtin:tiny-gpt2}}\ndata: builtin:sentiment\n{text}", "sft")
    assert str(caught.value.problems[0]).endswith(said)


def test_rows_with_one_label_teach_nothing(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    from alignkit.train.sft import build

    write_rows(TONES[:4])
    stage = make_stage("model: {path: builtin:tiny-gpt2}\nsft: {data: rows.jsonl, objective: classify}", "sft")
    with pytest.raises(DataError, match="all rows have the label bad; a classifier needs rows of two labels or more"):
        build(stage, RunDir(tmp_path / "run"))


RECIPE = """
model: {path: builtin:tiny-%s}
%s
sft: {objective: %s, data: rows.jsonl, batch_size: 4, max_steps: 4, save_steps: 2, learning_rate: 3e-3, lm_coef: %s,
      logging_steps: 1, samples: {num: 1}}
"""
CHOICES = [
    {"context": f"The {thing} was", "choices": ["good", "bad", "so so"][: 2 + number % 2], "answer": number % 2}
    for number, thing in enumerate(THINGS)
]


def test_the_loss_is_that_of_plain_models(make_stage: Callable, write_rows: Callable, tmp_path: Path) -> None:
    """L3 = L2 + lambda L1, each part by a model that transformers makes of the saved weights, row by row."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from alignkit.train.sft import build

    write_rows(TONES)
    setup = build(make_stage(RECIPE % ("llama", "", "classify", 0.5), "sft"), RunDir(tmp_path / "run"))
    trainer = setup.trainer
    setup.trainer.model.eval().save_pretrained(tmp_path / "plain")
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    scoring = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    rows = [trainer.train_dataset[number] for number in (0, 3, 6)]
    expected = []
    for row in rows:
        ids = torch.tensor(row["sequences"])
        logits = scoring(input_ids=ids).logits.log_softmax(-1)[0]
        language = causal(input_ids=ids, labels=ids).loss
        expected.append(-logits[scoring.config.label2id[row["label"]]] + 0.5 * language)
    batch = trainer.data_collator(rows)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(sum(expected).item() / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "lora", "objective", "lm_coef"),
    [
        ("gpt2", "", "classify", 0.5),
        ("llama", "", "multiple_choice", 0.5),
        ("gpt2", "lora: {r: 4}", "classify", 0.5),
        ("llama", "lora: {r: 4}", "multiple_choice", 0),
    ],
)
def test_a_stopped_run_ends_with_the_same_bits_and_loads_plainly(
    model: str, lora: str, objective: str, lm_coef: float, make_stage: Callable, write_rows: Callable,
    resume_exactly: Callable,
) -> None:  # fmt: skip
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    from alignkit.models.load import load_trained

    write_rows(TONES if objective == "classify" else CHOICES)
    directory = resume_exactly(make_stage(RECIPE % (model, lora, objective, lm_coef), "sft")) / "model"
    labels = 2 if objective == "classify" else 1
    if lora:
        plain = AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=labels)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(directory)
        assert objective != "classify" or plain.config.id2label == {0: "bad", 1: "good"}
    ids = torch.tensor([[512, 70, 80, 514]])
    ours = load_trained(directory, reward=True)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert ours.shape == (1, labels)
    torch.testing.assert_close(plain.eval()(input_ids=ids).logits, ours)
    logged = [json.loads(line) for line in (directory.parent / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy"} <= logged[0].keys() and ("lm_loss" in logged[0]) == (lm_coef > 0)
    (sample, *_) = map(json.loads, (directory.parent / "samples.jsonl").read_text().splitlines())
    assert sample["reference"] in ("good", "bad") and 0 <= sample["probability"] <= 1


def test_a_classifier_is_measured_beside_its_baselines_and_goes_on(make_stage: Callable, tmp_path: Path) -> None:
    from alignkit.evaluate.run import evaluate
    from alignkit.models.load import load_policy
    from alignkit.recipe.schema import EvaluateOptions
    from alignkit.train.sft import run as train

    base = "model: {path: builtin:tiny-llama}\n"
    source = "{path: builtin:sentiment, max_rows: 200}"
    first = make_stage(
        f"{base}sft: {{objective: classify, data: {source}, learning_rate: 5e-3, num_train_epochs: 2}}", "sft"
    )
    train(first, Path(first.run_dir))
    rows = {"path": "builtin:sentiment", "split": "test", "max_rows": 100}
    found = evaluate(first.run_dir, EvaluateOptions.model_validate({"data": rows}))["results"]
    figures = {(figure["metric"], figure["slice"]): figure for figure in found}
    accuracy = figures["accuracy", None]
    assert accuracy["value"] > 0.9 and accuracy["n"] == 100 and accuracy["interval"] == "wilson"
    assert figures["accuracy_majority", None]["value"] < 0.7
    assert figures["accuracy_bag_of_words", None]["value"] > 0.9
    assert {name for name, _ in figures} == {"accuracy", "accuracy_majority", "accuracy_bag_of_words"}

    start = (
        f"{base}sft: {{objective: classify, data: {source}, max_steps: 1, labels: [%s], start_from: {first.run_dir}}}"
    )
    again = make_stage(start % "negative, positive", "sft")
    train(again, tmp_path / "again")  # the trained head goes on: its first loss is near the last one
    logged = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["task_loss"] < 0.3
    with pytest.raises(ModelError, match="a head of negative, positive, and it needs one of positive, negative"):
        train(make_stage(start % "positive, negative", "sft"), tmp_path / "other")
    for method, said in (("dpo", "is a reward model"), ("rm", "a head of negative, positive, and it needs one of one")):
        stage = make_stage(f"{base}{method}: {{data: builtin:preferences, start_from: {first.run_dir}}}", method)
        with pytest.raises(ModelError, match=said):
            load_policy(stage, run_dir=tmp_path, reward=method == "rm")


def test_an_adapter_of_a_language_model_goes_on_as_a_classifier_s_and_merges(
    make_stage: Callable, write_rows: Callable, tmp_path: Path
) -> None:
    from alignkit.models.load import load_trained
    from alignkit.models.save import merge
    from alignkit.train.sft import run as train

    write_rows(TONES)
    base = "model: {path: builtin:tiny-gpt2}\nlora: {r: 2}\n"
    data = "{path: builtin:reviews, max_rows: 20}"
    first = make_stage(f"{base}sft: {{objective: lm, data: {data}, max_length: 64, max_steps: 1}}", "sft")
    train(first, tmp_path / "lm")
    rest = f"objective: classify, data: rows.jsonl, max_steps: 2, start_from: {tmp_path / 'lm'}"
    train(make_stage(f"{base}sft: {{{rest}}}", "sft"), tmp_path / "cls")
    merge(tmp_path / "cls" / "model", tmp_path / "merged")  # compares what both compute
    merged = load_trained(tmp_path / "merged", reward=True)
    assert merged.config.id2label == {0: "bad", 1: "good"}
    assert merged.get_input_embeddings().num_embeddings == 515


def test_a_row_is_cut_to_what_the_model_can_read(prepare: Callable) -> None:
    rows = [{"text": "word " * 900, "label": "long"}, {"text": "word", "label": "short"}]
    found = prepare(rows, "sft: {data: rows.jsonl, objective: classify, max_truncated: 1}", model="builtin:tiny-gpt2")
    assert found.tables.train[0]["length"] == 512  # its positions, though max_length is 1024
    assert found.tables.lengths.num_truncated == 1
