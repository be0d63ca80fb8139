"""PPO against the optimum that is known in closed form: pi* = pi_ref exp(r / kl_coef) / Z (Ziegler 2019, section 2.1).

The world: one prompt, seven letters and an end, at most three tokens, 400 answers in all, each with a reward of its
own. Every answer's probability is computed exactly, so that KL(pi || pi*) is a number and no estimate.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from alignkit.models.logprobs import pad_answers
from alignkit.runs.directory import RunDir
from alignkit.train import ppo

LETTERS, END = "abcdefg", 7
REWARD = """
import torch

generator = torch.Generator().manual_seed(1)
PLACES = torch.randn(4, 8, generator=generator).tolist()
PAIRS = torch.randn(8, 8, generator=generator).tolist()


def worth(ids):
    return 0.5 * (sum(PLACES[i][t] for i, t in enumerate(ids)) + sum(PAIRS[a][b] for a, b in zip(ids, ids[1:])))


def score(prompts, completions, **_):
    return [worth(["abcdefg".index(c) for c in text] + [7] * (len(text) < 3)) for text in completions]
"""
RECIPE = """
name: world
model: {{path: ./model}}
{lora}
ppo:
  data: {{path: ./prompts.jsonl}}
  reward: {{function: "worth:score"}}
  batch_size: 256
  micro_batch_size: 256
  max_new_tokens: 3
  max_steps: {steps}
  kl_coef: {kl_coef}
  learning_rate: {rate}
  lr_scheduler_type: linear
  save_strategy: "no"
  logging_steps: 100
  samples: {{num: 0}}
  {extra}
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Write model, prompt and reward into an empty directory; return all answers."""
    monkeypatch.chdir(tmp_path)
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)} | {"<end>": END}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>").save_pretrained("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=8, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, eos_token_id=END, bos_token_id=END, pad_token_id=END, tie_word_embeddings=False,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        model.lm_head.weight.data.normal_(0, 0.15)  # a reference that is not uniform
    model.save_pretrained("model")
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    Path("worth.py").write_text(REWARD)
    letters = range(len(LETTERS))
    short = [[*answer, END] for size in range(3) for answer in itertools.product(letters, repeat=size)]
    return short + [list(answer) for answer in itertools.product(letters, repeat=3)]


def exact_logps(model: torch.nn.Module, answers: list[list[int]]) -> torch.Tensor:
    """Return the log-probability of every answer, float64."""
    batch = pad_answers([[0]] * len(answers), answers, pad_id=END)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits.double()
    tokens = logits.log_softmax(-1)[batch.rows_N, batch.columns_N].gather(1, batch.targets_N[:, None])[:, 0]
    return torch.zeros(len(answers), dtype=torch.double).index_add(0, batch.rows_N, tokens)


def train_towards_the_optimum(
    make_stage: Callable, answers: list[list[int]], *, kl_coef: float, steps: int, lora: str = "", extra: str = ""
) -> list[float]:
    """Train and return KL(pi || pi*) before and at ten points of training."""
    rate = 2e-2 if lora else 2e-3
    text = RECIPE.format(lora=lora, kl_coef=kl_coef, steps=steps, rate=rate, extra=extra)
    stage = replace(make_stage(text, "ppo"), trust_code=True)
    run = RunDir(Path("run").resolve())
    run.path.mkdir()
    trainer = ppo.build(stage, run).trainer
    trainer.remove_callback(PrinterCallback)
    namespace: dict = {}
    exec(compile(REWARD, "worth.py", "exec"), namespace)
    rewards = torch.tensor([namespace["worth"](ids) for ids in answers], dtype=torch.double)
    reference = exact_logps(trainer.model, answers)
    assert float(reference.exp().sum()) == pytest.approx(1, abs=1e-9)  # these are all answers there are
    optimum = reference + rewards / kl_coef
    optimum = optimum - optimum.logsumexp(0)
    distances: list[float] = []

    def measure() -> None:
        logps = exact_logps(trainer.model, answers)
        distances.append(float((logps.exp() * (logps - optimum)).sum()))

    class Watch(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            if state.global_step % max(steps // 10, 1) == 0:
                measure()

    measure()
    trainer.add_callback(Watch())
    trainer.train()
    print(json.dumps({"kl_coef": kl_coef, "lora": bool(lora), "KL to the optimum": [round(d, 4) for d in distances]}))
    return distances


def test_ppo_heads_for_the_optimum(world: list[list[int]], make_stage: Callable) -> None:
    distances = train_towards_the_optimum(make_stage, world, kl_coef=0.5, steps=40)
    assert distances[0] > 1.4 and distances[-1] < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(("kl_coef", "start"), [(0.5, 1.4), (1.0, 0.38)])
def test_ppo_reaches_the_optimum(kl_coef: float, start: float, world: list[list[int]], make_stage: Callable) -> None:
    distances = train_towards_the_optimum(make_stage, world, kl_coef=kl_coef, steps=600)
    assert distances[0] > start and distances[-1] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["rloo", "reinforce"])
def test_estimators_without_a_critic_reach_it_too(advantage: str, world: list[list[int]], make_stage: Callable) -> None:
    distances = train_towards_the_optimum(make_stage, world, kl_coef=0.5, steps=600, extra=f"advantage: {advantage}")
    assert distances[-1] < 0.03
