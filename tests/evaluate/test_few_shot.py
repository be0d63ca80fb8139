"""Few-shot tasks: prompts byte for byte, three ways to rank choices, lm-evaluation-harness as a second opinion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alignkit.errors import DataError, EnvironmentProblem
from alignkit.evaluate.metrics.tasks import Item, measure_few_shot, measure_harness, read_task, write_prompt
from alignkit.evaluate.policy import Policy
from alignkit.rewards import Workspace

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
CHOICES = (" superb", " awful", " rather thin and slow", " a")


HARNESS = """task: films
dataset_path: json
dataset_kwargs: {data_files: {test: TASK}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(completion)}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [
        {"context": f"The {part} of the {kind} was", "completion": CHOICES[number % 4], "choices": list(CHOICES),
         "answer_context": "It was"}
        for number, (part, kind) in enumerate(
            (part, kind)
            for part in ("plot", "cast", "music", "ending", "script")
            for kind in ("drama", "western", "film")
        )
    ]  # fmt: skip
    return _write(tmp_path / "task.jsonl", rows)


def test_without_examples_the_prompt_is_the_context() -> None:
    items = [Item("\n\nQ: What is 1 plus 1?\n\nA:", " 2"), Item("\n\nQ: What is 2 plus 3?\n\nA:", " 5")]
    assert write_prompt(items, 0, shots=0, seed=0) == items[0].context
    assert write_prompt(items, 0, shots=1, seed=0) == "\n\nQ: What is 2 plus 3?\n\nA: 5\n\nQ: What is 1 plus 1?\n\nA:"


def test_examples_are_other_items_drawn_anew_for_each() -> None:
    items = [Item(f"q{number}:", f" a{number}") for number in range(30)]
    prompts = [write_prompt(items, number, shots=4, seed=0) for number in range(30)]
    for number, prompt in enumerate(prompts):
        parts = prompt.split("\n\n")
        assert parts[-1] == f"q{number}:" and len(set(parts)) == 5
        assert all(part == f"q{part[1:].split(':')[0]}: a{part[1:].split(':')[0]}" for part in parts[:-1])
    assert len({tuple(prompt.split("\n\n")[:-1]) for prompt in prompts}) == 30
    assert prompts[3] == write_prompt(items, 3, shots=4, seed=0) != write_prompt(items, 3, shots=4, seed=1)
    with pytest.raises(DataError, match="30 examples need a task of more than 30 rows"):
        write_prompt(items, 0, shots=30, seed=0)


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not beside the repository")
def test_published_tasks_are_read_as_they_stand() -> None:
    file = DATA / "gpt3-tasks/two_digit_addition.jsonl"
    items = read_task(file)
    first = json.loads(file.read_text().split("\n")[0])
    assert len(items) == 2000
    assert write_prompt(items, 0, shots=0, seed=0) == first["context"]
    assert len(read_task(DATA / "gpt3-tasks/reversed_words.jsonl.gz", max_rows=50)) == 50


def test_rows_that_are_no_items_are_all_named(tmp_path: Path) -> None:
    rows = [
        {"context": "a", "completion": "b"}, {"text": "x"}, {"context": "a", "completion": "c", "choices": ["d"]},
        {"context": "a", "completion": " b", "choices": [" b", " c"]},
        {"context": "a", "completion": " b", "choices": [" b", " c", " b"]},
        {"context": "a", "completion": " b", "choices": [" b"]}, {"context": "a", "completion": " b\nc"},
        {"context": "a \ud800", "completion": " b"}, {"context": "a", "completion": " b\n"},
    ]  # fmt: skip
    with pytest.raises(DataError) as caught:
        read_task(_write(tmp_path / "bad.jsonl", rows))
    assert [str(problem).rpartition("bad.jsonl")[2] for problem in caught.value.problems] == [
        ":2: needs the texts context and completion; the row has text",
        ":3: choices: the completion 'c' is not one of them",
        ":4: choices: the first item has none, this one differs; items with and without are two tasks",
        ":5: choices: must be two or more, each of them once",
        ":6: choices: must be two or more, each of them once",
        ":7: completion: has several lines, and an answer ends with its first; give choices",
        ":8: a text holds half of a surrogate pair, which is not valid Unicode",
    ]
    with pytest.raises(DataError, match="there is no such task"):
        read_task(tmp_path / "none.jsonl")


def test_choices_are_ranked_by_sum_per_token_and_relative(policy_dir: Path, task: Path, space: Workspace) -> None:
    policy, items = Policy(str(policy_dir), space), read_task(task)
    figures = {figure.metric: figure for figure in measure_few_shot(policy, items, shots=[0], seed=0, resamples=100)}
    right = {"likelihood_accuracy": 0, "likelihood_accuracy_sum": 0, "likelihood_accuracy_relative": 0}
    for item in items:
        given = policy.score_continuations([item.context] * 4, CHOICES)
        alone = policy.score_continuations(["It was"] * 4, CHOICES)
        rules = {
            "likelihood_accuracy": [found.logp / found.tokens for found in given],
            "likelihood_accuracy_sum": [found.logp for found in given],
            "likelihood_accuracy_relative": [a.logp - b.logp for a, b in zip(given, alone, strict=True)],
        }
        for name, values in rules.items():
            right[name] += CHOICES[values.index(max(values))] == item.completion
    assert {name: figure.value for name, figure in figures.items()} == {name: n / 15 for name, n in right.items()}
    assert {(figure.slice, figure.n, figure.interval) for figure in figures.values()} == {("K=0", 15, "wilson")}


def test_an_answer_written_after_the_read_that_scores_is_the_plain_one(
    policy_dir: Path, space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, contexts = Policy(str(policy_dir), space), ["One", "The plot of the film was", "A very long context: two"]
    first = policy.answer(contexts, max_new_tokens=7, plain=True)
    ends = [*policy.chat.stop_ids, *(group[0].ids[3 + number] for number, group in enumerate(first))]
    monkeypatch.setitem(vars(policy.chat), "stop_ids", ends)  # so that some answers end before they are cut off
    said = [group[0].text for group in policy.answer(contexts, max_new_tokens=10, plain=True)]
    asked = [(context, text[:size] + end or " a")
             for context, text in zip(contexts, said, strict=True)
             for size, end in ((len(text), ""), (len(text) // 2, " zz"), (0, " never"), (3, ""))]  # fmt: skip
    given, wanted = [context for context, _ in asked], [text for _, text in asked]
    scored = policy.score_continuations(given, wanted)
    longest = max(item.tokens for item in scored)
    plain = [group[0].text for group in policy.answer(given, max_new_tokens=longest + 8, plain=True)]
    for num_whole in (len(asked), 0):
        found = policy.match(given, wanted, spare_tokens=8, num_whole=num_whole)
        assert [item.logp for item, _ in found] == pytest.approx([item.logp for item in scored], abs=1e-4)
        assert [item.tokens for item, _ in found] == [item.tokens for item in scored]
        texts = [text for _, text in found]
        assert texts == plain if num_whole else all(a.startswith(b) for a, b in zip(plain, texts, strict=True))
        right = [text.strip() == each.strip() for text, each in zip(texts, wanted, strict=True)]
        assert right == [text.strip() == each.strip() for text, each in zip(plain, wanted, strict=True)]
        assert any(right) and not all(right)


def test_broken_characters_are_followed_as_long_as_they_can_become_the_right_answer(
    policy_dir: Path, space: Workspace
) -> None:
    policy = Policy(str(policy_dir), space)
    tokenizer, model = policy.loaded.tokenizer, policy.loaded.model
    broken = next(token for token in range(len(tokenizer)) if tokenizer.decode([token] * 9) == "\ufffd" * 9)
    with torch.no_grad():  # it says nothing else
        model.transformer.wte.weight[broken] *= 100
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[broken])
    # A character has four bytes: with a fourth one that is broken, three of which could still be mended, none begins.
    given, wanted = ["One", "Two", "Three"], [" one", " two", " " + "\ufffd" * 6 + "."]
    most = max(item.tokens for item in policy.score_continuations(given, wanted)) + 8
    for num_whole, first in ((0, 4), (1, most)):
        found = policy.match(given, wanted, spare_tokens=8, num_whole=num_whole)
        assert [text for _, text in found] == ["\ufffd" * length for length in (first, 4, 10)]


def test_exact_match_compares_the_first_line(policy_dir: Path, space: Workspace) -> None:
    policy = Policy(str(policy_dir), space)
    contexts = ["One", "Two", "Three"]
    said = [group[0].text for group in policy.answer(contexts, max_new_tokens=12, plain=True)]
    items = [Item(context, f" {text.strip()}  ") for context, text in zip(contexts, said, strict=True)]
    assert all(item.completion.strip() for item in items)
    # What is asked depends on the longest completion: it must not cut the answers short of what was said.
    found = measure_few_shot(policy, [*items, Item("Four", " never this")], shots=[0], seed=0, resamples=100)
    match, logp = found
    longest = max(item.tokens for item in policy.score_continuations(contexts, [item.completion for item in items]))
    full = policy.answer([*contexts, "Four"], max_new_tokens=longest + 8, plain=True)
    wanted = [*[item.completion for item in items], " never this"]
    right = sum(group[0].text.strip() == text.strip() for group, text in zip(full, wanted, strict=True))
    assert (match.metric, match.value, match.n) == ("exact_match", right / 4, 4)
    assert logp.unit == "nats per token" and match.details is not None and len(match.details) == 4


def test_lm_evaluation_harness_agrees(policy_dir: Path, task: Path, space: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install 'alignkit[eval]')")
    yaml = tmp_path / "films.yaml"
    yaml.write_text(HARNESS.replace("TASK", str(task)))
    policy = Policy(str(policy_dir), space)
    theirs = measure_harness(policy, str(yaml), shots=[0], max_rows=None, batch_size=4, seed=0)
    (acc,) = [figure for figure in theirs if figure.metric == "lm_eval/films/acc"]
    ours = measure_few_shot(policy, read_task(task), shots=[0], seed=0, resamples=100)
    (summed,) = [figure for figure in ours if figure.metric == "likelihood_accuracy_sum"]
    assert (acc.value, acc.n, acc.low, acc.high) == (summed.value, summed.n, summed.low, summed.high)
    assert (acc.better, acc.slice) == ("higher", "K=0")
    # Not only the same winners: the same log-likelihoods.
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    items = read_task(task)
    asked = [(item.context, choice) for item in items for choice in item.choices]
    lm = HFLM(pretrained=policy.loaded.model, tokenizer=policy.loaded.tokenizer, batch_size=4)
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
    expected = [logp for logp, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    found = policy.score_continuations(*map(list, zip(*asked, strict=True)))
    assert [item.logp for item in found] == pytest.approx(expected, abs=1e-3)


def test_a_missing_harness_is_one_line(policy_dir: Path, space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(EnvironmentProblem, match="lm-evaluation-harness is not installed; pip install"):
        measure_harness(Policy(str(policy_dir), space), "arc_easy", shots=[0], max_rows=1, batch_size=1, seed=0)
