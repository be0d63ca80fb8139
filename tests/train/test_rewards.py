"""Reward models, functions and sums of them on real tiny models, and what is said about those that cannot score."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from alignkit.data import true_reward
from alignkit.errors import RewardError
from alignkit.models.chat import Chat, load_tokenizer
from alignkit.models.frozen import load_classifier
from alignkit.models.load import Precision
from alignkit.models.save import save_model
from alignkit.models.start import builtin_config, builtin_tokenizer
from alignkit.recipe import Stage, load_recipe, resolve
from alignkit.rewards.kinds import fingerprint_rewards
from alignkit.train.ppo.answers import Rewards, Rollout, build_rewards, encode_ids

QUESTION = [{"role": "user", "content": "Was it good?"}]
WORDS = ["yes", "no", "it", "was", "good", "bad", "?", ".", "Was"]


def write_recipe(folder: Path, reward: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(f"model: {{path: builtin:tiny-gpt2}}\nppo:\n  reward: {reward}\n  data: builtin:prompts\n")
    return path


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rewards]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(reward: str, **options: Any) -> Rewards:
        stage = resolve(load_recipe(write_recipe(tmp_path, reward)), trust_code=True)
        return build_rewards(stage, stage.options.reward, chat=policy_chat(stage), device="cpu", **options)  # type: ignore[attr-defined]

    return run


def policy_chat(stage: Stage) -> Chat:
    return Chat(load_tokenizer(stage))


def own_model(folder: Path, *, template: str | None = None, tokenizer: Any = None, norm: bool = False) -> Path:
    """A reward model as an rm stage leaves it, with random weights."""
    torch.manual_seed(0)
    config = builtin_config("builtin:tiny-gpt2")
    config.num_labels = 1
    tokenizer = tokenizer or builtin_tokenizer()
    config.pad_token_id = tokenizer.pad_token_id
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    model = GPT2ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    if template is not None:
        tokenizer.chat_template = template
    save_model(model, tokenizer, folder, precision=Precision(torch.float32, "cpu"))
    if norm:
        (folder / "reward_norm.json").write_text(json.dumps({"gain": 2.0, "bias": -1.0, "num_rows": 4}))
    return folder


def chatml() -> str:
    return (Path(__file__).parents[2] / "alignkit" / "models" / "templates" / "chatml.jinja").read_text()


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", "[PAD]", *WORDS])}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def foreign_model(folder: Path, *, labels: int, template: str | None = None, positions: int = 64) -> Path:
    """A classifier that somebody else trained: BERT with a vocabulary of its own."""
    torch.manual_seed(1)
    config = BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=positions, num_labels=labels, pad_token_id=1)  # fmt: skip
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def rollout(*answers: str, ended: bool = True, text: bool = False) -> Rollout:
    """Answers as the policy's tokenizer writes them, an end token where they ended."""
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = chatml()
    chat = Chat(tokenizer)
    prompt: Any = "Was it good? " if text else QUESTION
    end = [tokenizer.eos_token_id if text else chat.end_of_turn] if ended else []
    ids = [tokenizer(answer).input_ids + end for answer in answers]
    return Rollout(
        prompts=[prompt] * len(answers),
        prompt_ids=chat.encode_prompts([prompt] * len(answers)),
        completion_ids=ids,
        completions=[answer if text else [{"role": "assistant", "content": answer}] for answer in answers],
        ended=[ended] * len(answers),
        columns={},
        sampled_ids=ids,
    )


def test_the_toy_worlds_reward_needs_no_code(build: Callable[..., Rewards]) -> None:
    scored = build("builtin:true-reward")(rollout("I loved the superb plot.", "It was awful.", ""))
    assert scored[0].tolist() == [1.0, -1.0, 0.0]
    assert list(scored[1]) == ["true_reward"]


def test_a_sum_is_weighted_and_its_parts_are_raw(build: Callable[..., Rewards], tmp_path: Path) -> None:
    (tmp_path / "by_length.py").write_text(
        "def score(prompts, completions):\n    return [len(c[0]['content']) for c in completions]\n"
    )
    rewards = build("[{model: builtin:true-reward, weight: 2}, {function: 'by_length:score', weight: -0.5}]")
    scored = rewards(rollout("superb", "awful"))
    assert scored[1]["score"].tolist() == [6.0, 5.0]
    assert scored[0].tolist() == [2 * 1 - 0.5 * 6, 2 * -1 - 0.5 * 5]
    del sys.modules["by_length"]


def test_parts_of_one_name_stay_apart(build: Callable[..., Rewards]) -> None:
    assert list(build("[builtin:true-reward, builtin:true-reward]").sources) == ["true_reward", "true_reward_2"]


def test_an_rm_stage_reads_the_policys_own_tokens(build: Callable[..., Rewards], tmp_path: Path) -> None:
    """The score is that of plain transformers on prompt and answer, end token included, whatever stands beside it."""
    own_model(tmp_path / "rm", template=chatml())
    answers = rollout("yes", "it was good, I loved it very much")
    scored = build("./rm")(answers)[0]
    model = GPT2ForSequenceClassification.from_pretrained(tmp_path / "rm")
    with torch.no_grad():
        expected = [float(model(torch.tensor([ids])).logits) for ids in answers.whole_ids]
    assert torch.allclose(scored, torch.tensor(expected), atol=1e-5)


def test_what_the_rm_stage_measured_is_applied(build: Callable[..., Rewards], tmp_path: Path) -> None:
    own_model(tmp_path / "raw", template=chatml())
    own_model(tmp_path / "rm", template=chatml(), norm=True)
    answers = rollout("yes", "no")
    raw, normed = build("./raw")(answers)[0], build("./rm")(answers)[0]
    assert torch.allclose(normed, 2 * raw - 1)


def test_a_damaged_norm_is_named(build: Callable[..., Rewards], tmp_path: Path) -> None:
    own_model(tmp_path / "rm", template=chatml())
    (tmp_path / "rm" / "reward_norm.json").write_text('{"gain": 1}')
    with pytest.raises(RewardError, match=r"^a.yaml:3: ppo.reward: .*reward_norm.json: does not hold gain and bias"):
        build("./rm")


def test_an_adapter_held_on_the_policys_base_is_asked_and_normalised(build: Callable, tmp_path: Path) -> None:
    own_model(tmp_path / "rm", template=chatml(), norm=True)
    asked: list[list[list[int]]] = []

    def score_ids(sequences: list[list[int]]) -> torch.Tensor:
        asked.append(sequences)
        return torch.tensor([1.0, 3.0])

    answers = rollout("yes", "no")
    assert build("./rm", held={0: (load_classifier("./rm", device="cpu"), score_ids)})(answers)[0].tolist() == [
        1.0,
        5.0,
    ]
    assert asked == [answers.whole_ids]


def test_another_template_means_the_text_is_written_anew(build: Callable[..., Rewards], tmp_path: Path) -> None:
    """The same words under a template of its own are other tokens, and the score is that of those."""
    plain = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}Q: {{ m.content }}\nA:\n{% endif %}{% endfor %}"
    )
    own_model(tmp_path / "rm", template=plain)
    tokenizer = builtin_tokenizer()
    model = GPT2ForSequenceClassification.from_pretrained(tmp_path / "rm")

    @torch.no_grad()
    def expect(text: str) -> float:
        return float(model(torch.tensor([tokenizer(text).input_ids])).logits)

    rewards = build("./rm")
    scored = rewards(rollout("yes"))[0]
    assert scored.tolist() == pytest.approx([expect("Q: Was it good?\nA:\nyes<|endoftext|>")], abs=1e-5)
    cut = rewards(rollout("yes", ended=False))[0]  # an answer that was cut off is not given an end
    assert cut.tolist() == pytest.approx([expect("Q: Was it good?\nA:\nyes")], abs=1e-5)


def test_a_foreign_tokenizer_reads_texts_its_own_way(build: Callable[..., Rewards], tmp_path: Path) -> None:
    foreign_model(tmp_path / "bert", labels=1)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    ids = torch.tensor([word_tokenizer()("Was it good? yes it was").input_ids])
    scored = build("./bert")(rollout("yes it was", "no", text=True))[0]
    assert scored[0] == pytest.approx(float(model(ids).logits), abs=1e-5)


def test_two_labels_give_the_log_odds_of_the_second(build: Callable[..., Rewards], tmp_path: Path) -> None:
    foreign_model(tmp_path / "bert", labels=2)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    (logits,) = model(torch.tensor([word_tokenizer()("Was it good? yes").input_ids])).logits.tolist()
    scored = build("./bert")(rollout("yes", text=True))[0]
    assert scored.tolist() == pytest.approx([logits[1] - logits[0]], abs=1e-5)


def test_a_template_of_the_classifier_is_used_for_conversations(build: Callable[..., Rewards], tmp_path: Path) -> None:
    foreign_model(tmp_path / "bert", labels=1, template="{% for m in messages %}{{ m.content }} . {% endfor %}")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    ids = torch.tensor([word_tokenizer()("Was it good? . yes . ").input_ids])
    assert build("./bert")(rollout("yes"))[0].tolist() == pytest.approx([float(model(ids).logits)], abs=1e-5)


def test_conversations_without_a_template_cannot_be_scored(build: Callable[..., Rewards], tmp_path: Path) -> None:
    foreign_model(tmp_path / "bert", labels=1)
    with pytest.raises(RewardError, match="the reward model bert has no chat template and the prompts are conv"):
        build("./bert")(rollout("yes"))


def test_a_template_that_refuses_is_one_message(build: Callable[..., Rewards], tmp_path: Path) -> None:
    foreign_model(tmp_path / "bert", labels=1, template="{{ raise_exception('only one turn') }}")
    with pytest.raises(RewardError, match="template of the reward model bert refuses answer 0: only one turn"):
        build("./bert")(rollout("yes"))


def test_answers_longer_than_the_reward_model_reads(build: Callable[..., Rewards], tmp_path: Path) -> None:
    foreign_model(tmp_path / "bert", labels=1, positions=6)
    with pytest.raises(RewardError, match="bert reads 6 tokens, and answer 1 with its prompt has 12; lower max_new"):
        build("./bert")(rollout("yes", "yes it was good it was good .", text=True))


def test_empty_answers_and_answers_without_end_are_scored(build: Callable[..., Rewards], tmp_path: Path) -> None:
    own_model(tmp_path / "rm", template=chatml())
    foreign_model(tmp_path / "bert", labels=1)
    assert build("./rm")(rollout("", "", ended=False))[0].isfinite().all()
    assert build("./rm")(rollout("yes", "no", ended=False))[0].isfinite().all()
    assert build("./bert")(rollout("", "no", ended=False, text=True))[0].isfinite().all()


def test_an_answer_that_a_truncation_token_ended_is_closed_for_the_rm_stage() -> None:
    """Whole answers are what it was trained on; one without the token stays open."""
    answers = rollout("yes.", ended=False, text=True)
    encode = partial(encode_ids, stop_ids=[7, 8], end_of_text=7, end_of_turn=8)
    assert encode(answers) == answers.whole_ids
    answers.ended = [True]
    assert encode(answers) == [[*answers.whole_ids[0], 7]]
    answers.completion_ids[0].append(8)
    assert encode(answers) == answers.whole_ids


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: foreign_model(path, labels=3), "has 3 labels; a reward needs one (its logit) or two"),
        (lambda path: GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16)).save_pretrained(path),
         "is GPT2LMHeadModel; a reward model is a ...ForSequenceClassification, such as an rm stage makes"),
        (lambda path: (foreign_model(path, labels=1) / "model.safetensors").rename(path / "pytorch_model.bin"),
         "weights only as pickles (pytorch_model.bin), which can run code when opened"),
        (lambda path: [file.unlink() for file in foreign_model(path, labels=1).glob("tokenizer*")],
         "has no tokenizer; copy the one it was trained with into it"),
        (lambda path: path.mkdir(), "no config.json and no adapter_config.json: not a model directory"),
    ],
    ids=["three labels", "language model", "pickles", "no tokenizer", "empty"],
)  # fmt: skip
def test_what_is_no_reward_model_is_refused(
    build: Callable[..., Rewards], tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "model_x")
    with pytest.raises(RewardError) as caught:
        build("./model_x")
    assert str(caught.value).startswith("a.yaml:3: ppo.reward: ") and message in str(caught.value)


def test_a_reward_that_is_not_finite_stops_with_its_name(build: Callable[..., Rewards], tmp_path: Path) -> None:
    from alignkit.errors import NonFiniteError

    own_model(tmp_path / "rm", template=chatml())
    held = load_classifier("./rm", device="cpu"), lambda sequences: torch.tensor([0.0, float("inf")])
    rewards = build("./rm", held={0: held})
    with pytest.raises(NonFiniteError, match="the reward rm of answer 1 is inf"):
        rewards(rollout("yes", "no"))


def test_the_fingerprint_follows_weights_and_normalisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own_model(tmp_path / "rm", template=chatml())
    stage = resolve(load_recipe(write_recipe(tmp_path, "./rm")))
    first = fingerprint_rewards(stage)
    (tmp_path / "rm" / "reward_norm.json").write_text("{}")
    second = fingerprint_rewards(stage)
    torch.manual_seed(3)
    foreign_model(tmp_path / "rm", labels=1)
    assert first != second != fingerprint_rewards(stage)


def test_true_reward_reads_the_answer_only(build: Callable[..., Rewards]) -> None:
    answers = rollout("dull")
    answers.prompts = [[{"role": "user", "content": "superb?"}]]
    assert build("builtin:true-reward")(answers)[0].tolist() == [true_reward("dull")]
