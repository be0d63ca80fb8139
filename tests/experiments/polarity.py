"""The small world of the PPO experiments: movie-review sentences, a GPT-2 pre-trained on them, two classifiers.

The sentences are Pang & Lee's (2005); reward and judge are bag-of-words classifiers, each trained on the labels of one
half of them. 512 sentences are kept out of everything: their beginnings are the prompts that are judged, they
themselves the text on which a language model is measured. Trains nothing by reinforcement.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Scorer = Callable[[list[str], list[str]], list[float]]
PRETRAIN = """
name: sentiment
seed: 0
model: {{path: {model}, init: scratch}}
pretrain: {{method: sft, objective: lm, data: {text}, max_length: 64, batch_size: 32, micro_batch_size: 32,
           learning_rate: 3e-3, num_train_epochs: 3, samples: {{num: 0}}, save_strategy: 'no', eval_strategy: 'no'}}
"""
NUM_HELD_OUT = 512  # sentences that nothing is trained on: prompts to answer, and text for the language model's loss
SCORER = '''"""Log-odds of a bag of words, learnt by tests/experiments/sentiment.py."""
import json, re
from pathlib import Path

LEARNT = json.loads(Path({path!r}).read_text())

def score(prompts, completions):
    return [LEARNT["bias"] + sum(LEARNT["words"].get(word, 0.0) for word in set(re.findall(r"[a-z']+", text)))
            for text in (prompt + answer for prompt, answer in zip(prompts, completions))]
'''


def read_sentences(path: Path) -> list[tuple[str, int]]:
    """Return (sentence, is positive), shuffled once and for all."""
    with zipfile.ZipFile(path / "sentence_polarity.zip") as archive:
        rows = [
            (" ".join(line.split()), label)
            for label, name in enumerate(("neg", "pos"))
            for line in archive.read(f"sentence_polarity/rt-polarity.{name}").decode("latin-1").splitlines()
        ]
    random.Random(0).shuffle(rows)
    return rows


def train_classifier(rows: list[tuple[str, int]], others: list[tuple[str, int]], path: Path) -> float:
    """Write a logistic regression on the words of a sentence; return its accuracy on other rows."""
    import re
    from collections import Counter

    import torch

    bags = [sorted(set(re.findall(r"[a-z']+", text))) for text, _ in rows]
    counts = Counter(word for bag in bags for word in bag)
    words = {word: number for number, word in enumerate(sorted(word for word, count in counts.items() if count > 1))}
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(len(words), 1, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([table, bias], lr=0.03)
    labels = torch.tensor([float(label) for _, label in rows])
    ids = [torch.tensor([words[word] for word in bag if word in words], dtype=torch.long) for bag in bags]
    for _ in range(12):
        for chosen in torch.randperm(len(rows), generator=generator).split(64):
            batch = [ids[number] for number in chosen]
            offsets = torch.tensor([0, *map(len, batch[:-1])]).cumsum(0)
            logits = torch.nn.functional.embedding_bag(torch.cat(batch), table, offsets, mode="sum")[:, 0] + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[chosen])
            loss = loss + 1e-4 * (table**2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    offset = float(bias.detach())
    learnt = {word: round(float(table[number].detach()), 5) for word, number in words.items()}
    path.write_text(json.dumps({"bias": offset, "words": learnt}))
    right = [
        (offset + sum(learnt.get(word, 0.0) for word in set(re.findall(r"[a-z']+", text))) > 0) == bool(label)
        for text, label in others
    ]
    return sum(right) / len(right)


def make_model(directory: Path, texts: list[str]) -> None:
    """Write a GPT-2 config of 0.3 M parameters and a 1,024-token BPE learnt on the sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|pad|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1]).save_pretrained(
        directory
    )
    GPT2Config(
        vocab_size=1024, n_positions=64, n_embd=96, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ).save_pretrained(directory)  # fmt: skip


def _first_words(text: str) -> str:
    return " ".join(text.split()[:3])


def _scorer(out: Path, name: str) -> Path:
    path = out / f"sentiment_{name}.py"
    path.write_text(SCORER.format(path=str(out / f"{name}.json")))
    return path


def run_stage(folder: Path, *arguments: str) -> None:
    """Run an alignkit command in a forked child, its output in a log; stop the experiment when it fails."""
    log = folder / "log.txt"
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["alignkit", *arguments]
        from alignkit.cli import main

        code = main()
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"alignkit {' '.join(arguments)} failed in {folder}:\n{log.read_text()[-2000:]}")


def answer(model_dir: Path, prompts: list[str], *, tokenizer_dir: Path | None = None, seed: int = 0) -> list[str]:
    """Sample 24 tokens after each prompt at temperature 1, the same random numbers for every model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir or model_dir, padding_side="left")
    torch.manual_seed(seed)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(
        **batch, do_sample=True, top_k=0, max_new_tokens=24, min_new_tokens=24, eos_token_id=0, pad_token_id=1
    )
    return tokenizer.batch_decode(out[:, batch.input_ids.size(1) :], skip_special_tokens=True)


def distinct_2(answers: list[str]) -> float:
    pairs = [pair for text in answers for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def interval(values: list[float], digits: int = 2) -> str:
    """Return the mean and the half width of its 95 % t interval over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:6.{digits}f}"
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return f"{mean:6.{digits}f} ± {quantile * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def load_scorer(path: Path) -> Scorer:
    space: dict[str, Any] = {}
    exec(path.read_text(), space)  # the file we have just written
    score: Scorer = space["score"]
    return score


@dataclass(frozen=True)
class World:
    """What the experiments on these sentences share."""

    model: Path  # pre-trained here
    prompts: Path
    text: Path  # what it was pre-trained on
    held_out_text: list[str]
    held_out: list[str]  # prompts of those
    score: Scorer
    judge: Scorer
    accuracies: tuple[float, float]
    out: Path

    def place_scorers(self, folder: Path) -> None:
        """Write the two reward functions where a recipe of that folder finds them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("reward", "judge"):
            (folder / f"sentiment_{name}.py").write_text(SCORER.format(path=str(self.out / f"{name}.json")))


def prepare_world(data: Path, out: Path) -> World:
    """Train the two classifiers and pre-train the language model, once; then load the libraries that children share."""
    out.mkdir(parents=True, exist_ok=True)
    rows = read_sentences(data)
    held, rows = rows[:NUM_HELD_OUT], rows[NUM_HELD_OUT:]
    half = len(rows) // 2
    accuracies = (
        train_classifier(rows[:half], rows[half:], out / "reward.json"),
        train_classifier(rows[half:], rows[:half], out / "judge.json"),
    )
    texts, starts = [text for text, _ in rows], [_first_words(text) for text, _ in rows]
    make_model(out / "blank", texts)
    (out / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": start}) + "\n" for start in starts[:2048]))
    run = out / "runs" / "sentiment" / "pretrain"

    from alignkit.cli import quiet_libraries

    quiet_libraries()
    import alignkit.train.ppo
    import alignkit.train.sft  # noqa: F401 - what every child shares

    world = World(
        run / "model", out / "prompts.jsonl", out / "text.jsonl", [text for text, _ in held],
        [_first_words(text) for text, _ in held], load_scorer(_scorer(out, "reward")),
        load_scorer(_scorer(out, "judge")), accuracies, out,
    )  # fmt: skip
    if not (run / "result.json").exists():
        (out / "pretrain.yaml").write_text(PRETRAIN.format(model=out / "blank", text=out / "text.jsonl"))
        run_stage(out, "sft", "-r", "pretrain.yaml")
    return world
