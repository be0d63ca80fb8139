"""Chat or text: decided once, said, and the same for everything that reads one model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkit.data import DataReport, Rejects, read_rows
from alignkit.errors import DataError, UsageError
from alignkit.evaluate.run import _read as read_measured_rows
from alignkit.evaluate.run import evaluate
from alignkit.evaluate.target import find_target
from alignkit.preflight.check import check_recipe
from alignkit.recipe import load_recipe
from alignkit.recipe.schema import DataSource, EvaluateOptions
from alignkit.rewards import Workspace
from alignkit.train import dpo, sft

BASE = "model: {path: builtin:tiny-llama}\n"
ASKED = "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"
ALPACA = {"instruction": "Name a fruit.", "input": "", "output": "A fig."}
PAIR = {"prompt": "Name a fruit.", "chosen": "A fig.", "rejected": "A stone."}


@pytest.fixture
def read(prepare: Callable) -> Callable:
    """Return a function that gives every sequence of a stage's rows as text, and the forms that were counted."""

    def read(rows: list[dict], recipe: str) -> tuple[list[str], dict[str, int]]:
        made = prepare(rows, recipe)
        texts = []
        for row in made.tables.train:
            columns = [row[key] for key in ("input_ids", "chosen_ids", "rejected_ids", "completion_ids") if key in row]
            found = [*columns, *row.get("answers_ids", ())] or [[]]
            texts += [made.decode(row.get("prompt_ids", []) + ids) for ids in found]
        return texts, made.tables.report.to_dict()["sources"][0]["forms"]

    return read


@pytest.mark.parametrize(
    ("section", "row", "turns", "joined"),
    [
        ("sft: {", ALPACA, [ASKED + "A fig.<|im_end|>\n"], ["Name a fruit.\nA fig.<|endoftext|>"]),
        ("sft: {", {"prompt": "Name a fruit.", "completion": " A fig."}, [ASKED + "A fig.<|im_end|>\n"],
         ["Name a fruit. A fig.<|endoftext|>"]),
        ("dpo: {", PAIR, [ASKED + "A fig.<|im_end|>\n", ASKED + "A stone.<|im_end|>\n"],
         ["Name a fruit.\nA fig.<|endoftext|>", "Name a fruit.\nA stone.<|endoftext|>"]),
        ("rm: {", {"prompt": "Name a fruit.", "completions": ["A fig.", "No."], "scores": [2, 1]},
         [ASKED + "A fig.<|im_end|>\n", ASKED + "No.<|im_end|>\n"],
         ["Name a fruit.\nA fig.<|endoftext|>", "Name a fruit.\nNo.<|endoftext|>"]),
        ("dpo: {loss_type: kto, ", {"prompt": "Name a fruit.", "completion": "A fig.", "label": True},
         [ASKED + "A fig.<|im_end|>\n"], ["Name a fruit.\nA fig.<|endoftext|>"]),
        ("ppo: {reward: builtin:true-reward, max_new_tokens: 4, ", {"prompt": "Name a fruit."}, [ASKED],
         ["Name a fruit."]),
    ],
)  # fmt: skip
def test_prompts_and_answers_become_turns_where_there_is_a_template(
    read: Callable, section: str, row: dict, turns: list, joined: list
) -> None:
    def shown(more: str = "") -> tuple[list[str], dict[str, int]]:
        texts, forms = read([row], f"{section}data: {{path: ./rows.jsonl{more}}}}}")
        return [text.removesuffix("\n") for text in texts], forms

    expected = [text.removesuffix("\n") for text in turns]
    assert shown() == shown(", chat: true") == (expected, {"chat": 1})
    assert shown(", chat: false") == (joined, {"text": 1})


@pytest.mark.parametrize(
    ("separator", "completion", "prompt", "answer"),
    [
        ("\n", "A fig.", "Name a fruit.\n", "A fig."),
        (" => ", "A fig.", "Name a fruit. =>", " A fig."),  # tokenizers count a blank to the word that follows
        ("", "A fig.", "Name a fruit.", "A fig."),
        ("\n", " A fig.", "Name a fruit.", " A fig."),
    ],
)
def test_the_separator_is_part_of_the_prompt_whatever_is_trained(
    prepare: Callable, separator: str, completion: str, prompt: str, answer: str
) -> None:
    single = {"prompt": "Name a fruit.", "completion": completion}
    pair = {"prompt": "Name a fruit.", "chosen": completion, "rejected": completion.replace("fig", "stone")}
    source = json.dumps({"path": "./rows.jsonl", "separator": separator, "chat": False})
    whole = (prompt, f"{answer}<|endoftext|>")
    for method, row, key in (
        ("sft", single, ""), ("dpo", pair, ""), ("dpo", {**single, "label": True}, ", loss_type: kto"), ("rm", pair, "")
    ):  # fmt: skip
        found = prepare([row], f"{method}: {{data: {source}{key}}}")
        made, say = found.tables.train[0], found.decode
        if method == "sft":
            start = made["labels"].count(-100)
            assert (say(made["input_ids"][:start]), say(made["labels"][start:])) == whole
        elif method == "dpo":
            assert (say(made["prompt_ids"]), say(made["completion_ids" if key else "chosen_ids"])) == whole
        else:
            assert say(made["answers_ids"][0]) == "".join(whole)


@pytest.mark.parametrize(
    ("separator", "prompt"), [("\n", "Name a fruit.\n"), (" => ", "Name a fruit. =>"), ("", "Name a fruit.")]
)
def test_a_prompt_alone_ends_as_it_does_in_training(read: Callable, separator: str, prompt: str) -> None:
    source = json.dumps({"path": "./rows.jsonl", "separator": separator, "chat": False})
    recipe = f"ppo: {{data: {source}, reward: builtin:true-reward, max_new_tokens: 4}}"
    assert read([{"prompt": "Name a fruit."}], recipe)[0] == [prompt]


def test_the_stage_says_it_for_sources_that_do_not(read: Callable) -> None:
    found, _ = read([ALPACA], "sft: {data: {path: ./rows.jsonl, separator: ' => '}, chat: false}")
    assert found == ["Name a fruit. => A fig.<|endoftext|>"]


def test_raw_text_is_never_a_turn(read: Callable) -> None:
    raw = [{"text": "Once."}]
    assert read(raw, "sft: {data: ./rows.jsonl}") == (["Once.<|endoftext|>"], {"raw": 1})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: is raw text, of which chat: true makes no turns"):
        read(raw, "sft: {data: {path: ./rows.jsonl, chat: true}}")
    turns = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: is a conversation, which chat: false cannot join"):
        read(turns, "sft: {data: {path: ./rows.jsonl, chat: false}}")


def test_a_model_without_a_template_reads_text_and_refuses_chat_true(
    make_stage: Callable, write_rows: Callable
) -> None:
    write_rows([ALPACA])
    stage = make_stage(BASE + "sft: {data: ./rows.jsonl}", "sft")

    def rows(**change: Any) -> list[Any]:
        source = DataSource(path=stage.options.data[0].path, **change)
        return list(read_rows(stage, [source], report=DataReport(), rejects=Rejects(), template=False))

    assert [(row.prompt, row.completions) for row in rows()] == [("Name a fruit.\n", ("A fig.",))]
    with pytest.raises(DataError, match="chat: true needs a chat template, and the model has none"):
        rows(chat=True)


def test_two_forms_in_one_model_are_refused_by_check_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "Name a fruit.", "completion": "A fig."}\n')
    (tmp_path / "p.jsonl").write_text('{"prompt": "Name a fruit.", "chosen": "A fig.", "rejected": "A stone."}\n')
    (tmp_path / "r.yaml").write_text(
        BASE + "name: forms\nsft: {data: ./a.jsonl, chat: false}\n"
        "rm: {data: ./p.jsonl}\n"
        "dpo: {start_from: sft, data: ./p.jsonl}\n"
        "ppo: {data: ./p.jsonl, reward: rm, chat: false, max_new_tokens: 4}\n"
    )
    report = check_recipe(load_recipe(tmp_path / "r.yaml"))
    found = {stage.name: [str(problem) for problem in stage.problems] for stage in report.stages}
    assert found["sft"] == found["rm"] == []
    (of_dpo,), (of_ppo,) = found["dpo"], found["ppo"]
    assert of_dpo.endswith(
        "r.yaml:5: the rows are turns of its chat template, and the model it starts from (sft) was trained on text "
        "without a chat template; chat: false gives them the same form"
    )
    assert "r.yaml:6: the rows are text without a chat template, and its reward model (rm) was trained on" in of_ppo
    assert report.stages[0].facts[f"data {tmp_path / 'a.jsonl'}"].endswith("read as text, prompt and answer joined")


def test_a_trained_model_is_used_in_the_form_it_knows(
    make_stage: Callable, write_rows: Callable, tmp_path: Path
) -> None:
    """Text on a model that has a template: evaluation follows, in the separator too; another form is refused."""
    write_rows([PAIR, {**PAIR, "prompt": "Name a tree."}])
    short = "batch_size: 2, max_steps: 1, samples: {num: 0}"
    text = (
        f"{BASE}sft: {{data: {{path: ./rows.jsonl, separator: ' => '}}, chat: false, {short}}}\n"
        f"dpo: {{start_from: sft, data: ./rows.jsonl, {short}}}"
    )
    first = make_stage(text, "sft")
    run = Path(first.run_dir)
    run.mkdir(parents=True)
    sft.run(first, run)
    second = make_stage(text, "dpo")
    Path(second.run_dir).mkdir(parents=True)
    with pytest.raises(DataError, match="the rows are turns of its chat template, and the model it starts from"):
        dpo.run(second, Path(second.run_dir))
    options = EvaluateOptions(data=[{"path": str(tmp_path / "rows.jsonl")}], metrics=["perplexity"])
    rows, _ = read_measured_rows(find_target(str(run), trust_code=False), options, Workspace())
    assert [row.prompt for row in rows] == ["Name a fruit. =>", "Name a tree. =>"]
    assert {row.completions for row in rows} == {(" A fig.", " A stone.")}
    forced = options.model_copy(update={"data": [DataSource(path=str(tmp_path / "rows.jsonl"), chat=True)]})
    with pytest.raises(UsageError, match=r"rows\.jsonl has chat: true, and .*sft was trained on text; take it out"):
        evaluate(str(run), forced)
