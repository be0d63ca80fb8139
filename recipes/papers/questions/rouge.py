"""ROUGE-L and length of the TL;DR answers that OpenAI published with InstructGPT, by model:

    python rouge.py tldr_samples.csv

The file is in github.com/openai/following-instructions-human-feedback. Mean and 95 % interval over posts (normal).
"""

import csv
import statistics
import sys

from rouge_score.rouge_scorer import RougeScorer

scorer = RougeScorer(["rougeL"])
found: dict[str, list[tuple[float, int]]] = {}
with open(sys.argv[1], newline="", encoding="utf-8") as file:
    for row in csv.DictReader(file):
        score = scorer.score(row["ref_text"], row["sample"])["rougeL"].fmeasure
        found.setdefault(row["model_type"], []).append((score, len(row["sample"].split())))
for model, rows in found.items():
    scores, words = zip(*rows, strict=True)
    half = 1.96 * statistics.stdev(scores) / len(scores) ** 0.5
    rouge, length = statistics.mean(scores), statistics.mean(words)
    print(f"{model:16} n {len(rows)}  ROUGE-L {rouge:.3f} ± {half:.3f}  {length:.0f} words")
