"""The model card: metadata that the hub's own library reads, the run's facts, and nothing private."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from written_runs import HOSTILE, SECRET, WriteRun, figure

from alignkit.report.facts import Facts
from alignkit.report.publish import hide_paths, public_name, render_card, write_card

LOCAL = "/home/ann/secret-project/rows.jsonl"
HUB = {
    "lineage": [
        {"role": "base", "path": "meta-llama/Llama-3.2-1B"},
        {"role": "model", "path": "/home/ann/runs/a/sft/model"},
    ],
    "options": {"data": [{"path": "HuggingFaceH4/ultrafeedback_binarized"}, {"path": LOCAL}], "batch_size": 32},
    "data": {"sources": [{"path": LOCAL, "kept": 10, "formats": {"trl pair": 10}}]},
}


def card_of(run: Path, repo: str | None = None) -> ModelCard:
    return ModelCard(render_card(Facts(run), repo=repo))


def test_metadata_of_a_fine_tune_of_a_hub_model(write_run: WriteRun) -> None:
    evaluation = [
        figure("reward_accuracy", 0.816, 0.75, 0.865, unit="share", data="HuggingFaceH4/ultrafeedback_binarized[test]"),
        figure("reward_accuracy", 0.6, unit="share", slice="margin 0 to 1"),
        figure("kl", None),
    ]
    card = card_of(write_run("dpo", "dpo", stage=HUB, evaluation=evaluation))
    data = card.data.to_dict()
    assert data["base_model"] == "meta-llama/Llama-3.2-1B" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["HuggingFaceH4/ultrafeedback_binarized"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["alignkit", "trl", "dpo"] and "license" not in data
    (result,) = card.data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("reward_accuracy", 0.816)
    assert result.dataset_type == "HuggingFaceH4/ultrafeedback_binarized"
    assert "| Pair accuracy, margin 0 to 1 |" in card.text


def test_metadata_of_an_adapter_and_of_a_reward_model(write_run: WriteRun) -> None:
    run = write_run("rm", "rm", stage=HUB | {"lora": {"adapter_type": "vera"}})
    (run / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.2-1B"})
    )
    card = card_of(run, repo="me/judge")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-classification")
    assert data["base_model_relation"] == "adapter" and {"reward-model", "vera"} <= set(data["tags"])
    assert 'AutoPeftModelForSequenceClassification.from_pretrained("me/judge", num_labels=1)' in card.text
    assert card.text.startswith("\n# judge") or card.text.startswith("# judge")


def test_the_card_holds_the_facts_and_no_path_secret_or_row(write_run: WriteRun) -> None:
    evaluation = [figure("perplexity", 4.68, 4.31, 5.1, data="/home/ann/x/t.jsonl")]
    warnings = [f"14 rows overlap, first {LOCAL}:7 {SECRET}"]
    run = write_run("sft", stage=HUB, text=f"the row {SECRET}", evaluation=evaluation, warnings=warnings)
    text = str(card_of(run))
    for private in ("/home", "ann", "secret-project", SECRET, "the row", "Linux", "01234567"):
        assert private not in text, private
    for fact in ("rows.jsonl", "4.31 to 5.10", "supervised fine-tuning", "2. sft (model)", "batch_size` | 32",
                 "torch 2.13.0", "1 min 14 s", "14 rows overlap, first rows.jsonl:7"):  # fmt: skip
        assert fact in text, fact


def test_hostile_text_stays_text(write_run: WriteRun) -> None:
    evil = {"lineage": [{"role": HOSTILE, "path": f"x {HOSTILE}"}], "recipe": f"---\n{HOSTILE}"}
    run = write_run(stage=evil, evaluation=[figure(HOSTILE, 1.0, data=HOSTILE)], warnings=[HOSTILE])
    card = card_of(run)
    assert card.data.to_dict()["library_name"] == "transformers"
    assert not re.search(r"(?<!\\)<(script|img)", card.text)
    assert "\n---" not in card.text


@pytest.mark.parametrize(("forms", "chat"), [({"chat": 4}, True), ({"text": 4}, False), ({"raw": 4}, False)])
def test_usage_has_the_form_that_was_trained(write_run: WriteRun, forms: dict[str, int], chat: bool) -> None:
    sources = [{"path": "rows.jsonl", "kept": 4, "formats": {"prompt completion": 4}, "forms": forms}]
    text = card_of(write_run(stage={"data": {"sources": sources}})).text
    assert ("apply_chat_template" in text, 'tokenizer("..."' in text) == (chat, not chat)


def test_a_builtin_base_is_no_base_on_the_hub_and_no_model_has_no_card(write_run: WriteRun) -> None:
    run = write_run(finished=False)
    data = card_of(run).data.to_dict()
    assert "base_model" not in data and "datasets" not in data
    (run / "model").rename(run / "elsewhere")
    assert write_card(run) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("builtin:tiny-gpt2", "builtin:tiny-gpt2"),
        ("/home/ann/runs/demo/sft/model", "sft"),
        ("runs/demo/sft/model", "sft"),
        ("../data/rows.jsonl", "rows.jsonl"),
        ("data/rows.jsonl", "rows.jsonl"),
        ("~/models/llama", "llama"),
        ("C:\\models\\llama", "llama"),
        ("/", "local"),
    ],
)
def test_public_names(path: str, name: str) -> None:
    assert public_name(path) == name


def test_paths_in_texts_are_cut_and_ratios_are_not() -> None:
    assert hide_paths("see /home/ann/x/rows.jsonl:7 and runs/demo/sft/model") == "see rows.jsonl:7 and sft"
    assert (
        hide_paths("12/40 rows, eval_rewards/accuracies, lm_eval/arc/acc") == "12/40 rows, eval_rewards/accuracies, acc"
    )
