"""Scores of answers, for ppo, gold, best-of-N, win rates and evaluation: one class a kind, listed in `kinds`."""
