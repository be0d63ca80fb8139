"""Controlled sentiment with PPO: reward, held-out reward, realised KL against its target, and collapse without KL.

    python tests/experiments/sentiment.py PATH/sentence-polarity OUT [--seeds 3] [--targets 3 6 10 0] [--rollouts 60]

A small GPT-2 is pre-trained here on movie-review sentences (Pang & Lee 2005); the reward is the log-odds of a
bag-of-words classifier trained on half of the labels, the judge another one trained on the other half. Target 0 stands
for kl_coef 0. Every stage runs through the command line, in processes forked from one that has loaded the libraries.
Prints, over seeds with 95 % t intervals, reward and held-out reward before and after, KL in the last third of a run,
distinct-2, and whether the monitor warned. Takes about 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import zipfile
from pathlib import Path
from typing import Any

RECIPE = """
name: sentiment
seed: {seed}
model: {{path: {model}, init: scratch}}
pretrain: {{method: sft, objective: lm, data: {text}, eval: 0.05, max_length: 64, batch_size: 32, micro_batch_size: 32,
           learning_rate: 3e-3, num_train_epochs: 3, samples: {{num: 0}}, save_strategy: 'no', eval_strategy: 'no'}}
ppo:
  start_from: {start}
  data: {prompts}
  reward: {{function: "sentiment_reward:score"}}
  gold: {{function: "sentiment_judge:score"}}
  max_new_tokens: 24
  batch_size: 64
  micro_batch_size: 64
  ppo_epochs: 4
  learning_rate: {rate}
  lr_scheduler_type: constant
  warmup_steps: 0
  kl_coef: {coef}
  {adaptive}
  total_episodes: {episodes}
  reward_normalize: gain_and_bias
  save_strategy: 'no'
  logging_steps: 4
  samples: {{num: 8, max_new_tokens: 24}}
"""
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
    GPT2Config(vocab_size=1024, n_positions=64, n_embd=96, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
               pad_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(directory)  # fmt: skip


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


def answer(model_dir: Path, prompts: list[str]) -> list[str]:
    """Sample one answer per prompt at temperature 1, the same random numbers for every model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    torch.manual_seed(0)
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(
        **batch, do_sample=True, top_k=0, max_new_tokens=24, eos_token_id=0, pad_token_id=1, use_cache=True
    )
    return tokenizer.batch_decode(out[:, batch.input_ids.size(1) :], skip_special_tokens=True)


def distinct_2(answers: list[str]) -> float:
    pairs = [pair for text in answers for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def interval(values: list[float]) -> str:
    """Return the mean and the half width of its 95 % t interval over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:6.2f}       "
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return f"{mean:6.2f} ± {quantile * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def load_scorer(path: Path) -> Any:
    space: dict[str, Any] = {}
    exec(path.read_text(), space)  # the file we have just written
    return space["score"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", type=float, nargs="+", default=[3, 6, 10, 0])
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--coef", type=float, default=0.2)
    parser.add_argument("--horizon", type=int, default=300)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = read_sentences(options.data)
    half = len(rows) // 2
    accuracies = [
        train_classifier(rows[:half], rows[half:], out / "reward.json"),
        train_classifier(rows[half:], rows[:half], out / "judge.json"),
    ]
    for name in ("reward", "judge"):
        (out / f"sentiment_{name}.py").write_text(SCORER.format(path=str(out / f"{name}.json")))
    texts = [text for text, _ in rows]
    make_model(out / "blank", texts)
    starts = [" ".join(text.split()[:3]) for text in texts if len(text.split()) > 6]
    (out / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": start}) + "\n" for start in starts[256:2304]))
    held_out = starts[:256]
    score, judge = load_scorer(out / "sentiment_reward.py"), load_scorer(out / "sentiment_judge.py")

    from alignkit.launch import prepare_environment

    prepare_environment(tiny=True)
    import alignkit.train.ppo
    import alignkit.train.sft  # noqa: F401 - what every child shares

    start_dir = out / "runs" / "sentiment" / "pretrain"
    paths = {"model": out / "blank", "text": out / "text.jsonl", "prompts": out / "prompts.jsonl"}
    shared = {"rate": options.rate, "episodes": 64 * options.rollouts, **{name: str(p) for name, p in paths.items()}}
    if not (start_dir / "result.json").exists():
        recipe = out / "pretrain.yaml"
        recipe.write_text(RECIPE.format(seed=0, start="pretrain", coef=0.1, adaptive="kl_target: 6", **shared))
        run_stage(out, "sft", "-r", str(recipe), "--stage", "pretrain")
    before = answer(start_dir / "model", held_out)
    metrics = json.loads((start_dir / "result.json").read_text())["metrics"]
    print(f"classifiers: accuracy {accuracies[0]:.3f} (reward) and {accuracies[1]:.3f} (judge) on the other half")
    print(f"pre-trained: held-out loss {metrics.get('eval_loss', math.nan):.3f} nats a token")
    print(f"start: reward {statistics.mean(score(held_out, before)):.2f}, held-out reward "
          f"{statistics.mean(judge(held_out, before)):.2f}, distinct-2 {distinct_2(before):.2f}")  # fmt: skip
    found: dict[float, list[dict[str, float]]] = {target: [] for target in options.targets}
    for seed in range(options.seeds):  # all targets of a seed first: a run that is cut short still compares them
        for target in options.targets:
            folder = out / f"target-{target:g}-seed-{seed}"
            folder.mkdir(exist_ok=True)
            for name in ("reward", "judge"):
                (folder / f"sentiment_{name}.py").write_text(SCORER.format(path=str(out / f"{name}.json")))
            adaptive = f"kl_target: {target:g}\n  kl_horizon: {options.horizon}" if target else "keep_checkpoints: 1"
            coef = options.coef if target else 0
            (folder / "sentiment.yaml").write_text(
                RECIPE.format(seed=seed, start=str(start_dir), coef=coef, adaptive=adaptive, **shared)
            )
            run_stage(folder, "ppo", "-r", "sentiment.yaml", "--trust-code")  # a finished run is not trained again
            run = folder / "runs" / "sentiment" / "ppo"
            after = answer(run / "model", held_out)
            kls = [row["objective/kl"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
                   if "objective/kl" in row]  # fmt: skip
            found[target].append(
                {
                    "reward": statistics.mean(score(held_out, after)),
                    "judge": statistics.mean(judge(held_out, after)),
                    "kl": statistics.mean(kls[-(len(kls) // 3) :]),
                    "distinct": distinct_2(after),
                    "warned": float("the reward rose" in (folder / "log.txt").read_text()),
                }
            )
            values = ", ".join(f"{name} {value:.2f}" for name, value in found[target][-1].items())
            print(f"kl target {target:g}, seed {seed}: {values}", flush=True)
    print("\nkl target | reward after   | held-out reward | KL, last third | off target | distinct-2     | warned")
    for target, runs in found.items():
        columns = {name: interval([run[name] for run in runs]) for name in ("reward", "judge", "kl", "distinct")}
        off = f"{statistics.mean(run['kl'] for run in runs) / target - 1:+.0%}" if target else "-"
        warned = f"{int(sum(run['warned'] for run in runs))} of {len(runs)}"
        print(f"{target or 'kl_coef 0':>9} | {columns['reward']:14} | {columns['judge']:15} | {columns['kl']:14} | "
              f"{off:>10} | {columns['distinct']:14} | {warned}")  # fmt: skip


if __name__ == "__main__":
    main()
