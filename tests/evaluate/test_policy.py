"""What a model says of texts, against plain loops over its logits; answers, windows, cuts and the cache."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.data import Message, Row
from alignkit.errors import DataError, ModelError
from alignkit.evaluate.metrics.kl import measure_kl
from alignkit.evaluate.policy import Policy
from alignkit.feedback.cache import Store
from alignkit.rewards import Answers, Workspace
from alignkit.rewards.kinds import open_reward
from alignkit.rewards.kinds.function import is_function

POSITIONS = 96


def _loop(directory: Path, ids: list[int], start: int, temperature: float = 1.0) -> float:
    """Add up log p of ids[start:] one by one, each from its own forward pass."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total = 0.0
    for place in range(start, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:place]])).logits[0, -1] / temperature
        total += float(logits.log_softmax(-1)[ids[place]])
    return total


def test_completions_are_scored_as_a_loop_would(policy_dir: Path, space: Workspace) -> None:
    policy = Policy(str(policy_dir), space)
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    prompts, completions = ["The plot", "A much longer prompt about"], [" was superb.", " it"]
    found = policy.score_completions(prompts, completions)
    for prompt, completion, item in zip(prompts, completions, found, strict=True):
        head, tail = tokenizer(prompt).input_ids, tokenizer(completion).input_ids + [tokenizer.eos_token_id]
        assert item.logp == pytest.approx(_loop(policy_dir, head + tail, len(head)), abs=1e-3)
        assert (item.tokens, item.num_bytes) == (len(tail), len(completion))


def test_an_answer_in_a_conversation_is_scored_with_the_end_of_its_turn(policy_dir: Path, space: Workspace) -> None:
    policy = Policy(str(policy_dir), space)
    prompt, answer = [Message(role="user", content="Hi?")], [Message(role="assistant", content="Good.")]
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    text = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    head, tail = tokenizer(text).input_ids, tokenizer("Good.<|im_end|>").input_ids
    (found,) = policy.score_completions([prompt], [answer])
    assert found.tokens == len(tail)
    assert found.logp == pytest.approx(_loop(policy_dir, head + tail, len(head)), abs=1e-3)
    (whole,) = policy.score_documents([Row("messages", "", ([*prompt, *answer],))])
    assert (whole.logp, whole.num_bytes) == (pytest.approx(found.logp, abs=1e-3), 5)


def test_a_document_longer_than_the_model_is_read_in_windows(policy_dir: Path, space: Workspace) -> None:
    text = "superb plot, awful cast; " * 20
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
    assert len(ids) > 2 * POSITIONS
    (found,) = Policy(str(policy_dir), space).score_documents([Row("text", "", (text,))])
    windows = [ids[start : start + POSITIONS] for start in range(0, len(ids) - 1, POSITIONS - 1)]
    expected = sum(_loop(policy_dir, window, 1) for window in windows)
    assert found.logp == pytest.approx(expected, abs=1e-2)
    assert found.tokens == len(ids) - 1  # every token once, but the first
    assert found.num_bytes == len(text) - len(tokenizer.decode(ids[:1]))


def test_a_prompt_that_leaves_no_room_loses_its_beginning_and_says_so(policy_dir: Path, space: Workspace) -> None:
    policy = Policy(str(policy_dir), space)
    policy.score_completions(["word " * 200], [" end"])
    assert space.warnings == [f"1 prompts were cut on the left to fit the {POSITIONS} positions of {policy_dir}"]
    assert policy.score_completions(["a"], ["word " * 200])[0].tokens == 0
    assert space.warnings[1] == f"1 texts are longer than the {POSITIONS} positions of {policy_dir}: left out"
    with pytest.raises(DataError, match="is longer than .* can read"):
        policy.score_continuations(["a"], ["word " * 200])
    with pytest.raises(ModelError, match="max_new_tokens 96 fills the 96 positions"):
        policy.answer(["a"], max_new_tokens=96)


def test_answers_depend_on_seed_prompt_and_number_alone(policy_dir: Path) -> None:
    def ask(prompts: list[str], batch_size: int, seed: int = 0, **given: Any) -> dict[str, list[str]]:
        policy = Policy(str(policy_dir), Workspace(device="cpu", batch_size=batch_size))
        found = policy.answer(prompts, max_new_tokens=6, temperature=1.0, samples=3, seed=seed, **given)
        return {prompt: [answer.text for answer in group] for prompt, group in zip(prompts, found, strict=True)}

    first = ask(["one", "two two two", "three"], 16)
    assert ask(["three", "one"], 1) == {"three": first["three"], "one": first["one"]}
    assert len(set(first["one"])) == 3
    assert ask(["one"], 16, seed=1)["one"] != first["one"]
    assert ask(["one", "two two two", "three"], 2, engine="continuous") == first


def test_the_sampled_kl_agrees_with_the_exact_one(policy_dir: Path, reference_dir: Path, space: Workspace) -> None:
    """One token long answers: the KL is a sum over the vocabulary."""
    temperature = 2.0
    ids = torch.tensor([AutoTokenizer.from_pretrained(policy_dir)("The plot").input_ids])
    logps = []
    for directory in (policy_dir, reference_dir):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits[0, -1]
        logps.append((logits / temperature).log_softmax(-1))
    exact = float((logps[0].exp() * (logps[0] - logps[1])).sum())
    policy, reference = Policy(str(policy_dir), space), Policy(str(reference_dir), space)
    assert policy.tokens == reference.tokens
    answers = policy.answer(["The plot"], max_new_tokens=1, temperature=temperature, samples=800)
    ours = policy.score_answers(["The plot"], answers, temperature=temperature)
    theirs = reference.score_answers(["The plot"], answers, temperature=temperature)
    # 800 answers to one prompt: each is independent here.
    (figure,) = measure_kl([[a] for a in ours[0]], [[b] for b in theirs[0]], resamples=500)
    assert figure.low is not None and figure.high is not None
    assert figure.low < exact < figure.high and exact > 0.05


def test_what_was_asked_once_is_never_asked_again(policy_dir: Path, reward_dir: Path, tmp_path: Path) -> None:
    def ask(max_new_tokens: int = 5) -> tuple[list, Workspace, Policy]:
        space = Workspace(device="cpu", cache=Store(tmp_path / "cache.jsonl"))
        policy = Policy(str(policy_dir), space)
        answers = policy.answer(["a", "b"], max_new_tokens=max_new_tokens, temperature=1.0)
        scores = open_reward(str(reward_dir), space).score(Answers(["a", "b"], [group[0].text for group in answers]))
        return [answers, scores, policy.score_completions(["a"], ["b"])], space, policy

    first, space, _ = ask()
    assert len(space.cache) == 5
    again, space, policy = ask()
    assert again == first
    assert len(space.cache) == 5
    assert space.holder is None and policy._loaded is None  # no weights were read
    assert len(ask(max_new_tokens=4)[1].cache) > 5
    # A line torn by a kill costs that line only.
    text = (tmp_path / "cache.jsonl").read_text()
    (tmp_path / "cache.jsonl").write_text(text[:-9])
    assert ask()[0] == first


def test_other_weights_are_another_question(policy_dir: Path, reference_dir: Path, space: Workspace) -> None:
    found = [Policy(str(path), space).score_completions(["a"], ["b"])[0].logp for path in (policy_dir, reference_dir)]
    assert found[0] != found[1] and len(space.cache) == 2


def test_one_model_at_a_time_is_held(policy_dir: Path, reference_dir: Path, reward_dir: Path, space: Workspace) -> None:
    policy, reference = Policy(str(policy_dir), space), Policy(str(reference_dir), space)
    policy.score_completions(["a"], ["b"])
    reference.score_completions(["a"], ["b"])
    assert policy._loaded is None and reference._loaded is not None
    open_reward(str(reward_dir), space).score(Answers(["a"], ["b"]))
    assert reference._loaded is None


def test_a_reward_model_applies_the_norm_of_its_stage(reward_dir: Path, tmp_path: Path, space: Workspace) -> None:
    answers = Answers(["a", "b"], ["x", "y"])
    raw = open_reward(str(reward_dir), space).score(answers)
    normed = shutil.copytree(reward_dir, tmp_path / "normed")
    (normed / "reward_norm.json").write_text(json.dumps({"gain": 2.0, "bias": -1.0}))
    assert open_reward(str(normed), space).score(answers) == pytest.approx([2 * r - 1 for r in raw])


def test_rewards_are_told_apart_by_their_names(space: Workspace, tmp_path: Path) -> None:
    assert is_function("my_rewards:brevity") and is_function("a.b:c")
    assert not any(map(is_function, ["builtin:true-reward", "runs/x/rm", "owner/model", "C:/x"]))
    answers = Answers(["q", "q"], ["A superb plot", [Message(role="assistant", content="awful")]])
    assert open_reward("builtin:true-reward", space).score(answers) == [1.0, -1.0]
    with pytest.raises(Exception, match="is no builtin reward; the only one is builtin:true-reward"):
        open_reward("builtin:nope", space)
    with pytest.raises(Exception, match="is code, which a recipe cannot allow; read it, and give --trust-code"):
        open_reward("my_rewards:brevity", space)
    (tmp_path / "brevity_reward.py").write_text("def short(prompts, answers):\n    return [-len(a) for a in answers]\n")
    space.trust_code, space.folder = True, tmp_path
    assert open_reward("brevity_reward:short", space).score(Answers(["q"], ["four"])) == [-4.0]


def test_perplexity_of_a_uniform_model_is_its_vocabulary(policy_dir: Path, tmp_path: Path, space: Workspace) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "flat")
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    tokenizer.save_pretrained(tmp_path / "flat")
    (found,) = Policy(str(tmp_path / "flat"), space).score_completions(["a"], [" long answer"])
    assert math.exp(-found.logp / found.tokens) == pytest.approx(len(tokenizer), rel=1e-5)
