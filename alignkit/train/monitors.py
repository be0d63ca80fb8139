"""What tells a person that PPO goes wrong: a reward that rises while answers grow or repeat, and a KL beyond bounds.

It looks at numbers only and changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkit.errors import NonFiniteError
from alignkit.recipe.schema import PpoOptions

_WINDOW = 4  # rollouts compared: the first ones with the latest ones
_LONGER = 1.5  # times the length at the start
_MORE_REPETITION = 0.2


class KlTooLarge(Exception):
    """The KL passed `max_kl`; caught by the trainer, which goes back to the last good checkpoint."""

    def __init__(self, kl: float, step: int) -> None:
        super().__init__(f"KL {kl:.3g} at step {step}")
        self.kl, self.step = kl, step


@dataclass
class HackingMonitor:
    """Says once when the reward has risen while length or repetition exploded."""

    start: list[dict[str, float]] = field(default_factory=list)
    latest: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    said: bool = False

    def look(self, metrics: dict[str, float]) -> str | None:
        """Take the metrics of a rollout; return the warning when it is due."""
        seen = {name: metrics[name] for name in ("reward", "response_length", "repetition")}
        if len(self.start) < _WINDOW:
            self.start.append(seen)
        self.latest.append(seen)
        if self.said or len(self.latest) < _WINDOW:
            return None
        before, now = _mean(self.start), _mean(list(self.latest))
        if now["reward"] <= before["reward"]:
            return None
        signs = []
        if now["response_length"] > _LONGER * before["response_length"]:
            signs.append(f"answers grew from {before['response_length']:.0f} to {now['response_length']:.0f} tokens")
        if now["repetition"] > before["repetition"] + _MORE_REPETITION:
            signs.append(f"repetition rose from {before['repetition']:.2f} to {now['repetition']:.2f}")
        if not signs:
            return None
        self.said = True
        return (
            f"the reward rose from {before['reward']:.3g} to {now['reward']:.3g} while {' and '.join(signs)}: the "
            "policy may be exploiting the reward; read samples.jsonl, raise kl_coef or set max_kl"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"start": self.start, "latest": list(self.latest), "said": self.said}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        self.start, self.said = list(state["start"]), bool(state["said"])
        self.latest = deque(state["latest"], maxlen=_WINDOW)


def judge_first(options: PpoOptions, ended: Sequence[bool], scores: Sequence[float]) -> str | None:
    """Return what is wrong with the first rollout where nothing can be learnt from it; `scores` are final."""
    if not any(ended):
        end = (
            "without the token of truncate"
            if options.truncate
            else f"cut off at max_new_tokens ({options.max_new_tokens})"
        )
        rule = options.missing_eos
        replaced = f", and missing_eos gives each the score {rule.score:g}" if rule and rule.score is not None else ""
        return (
            f"all {len(ended)} answers of the first rollout are {end}{replaced}; raise max_new_tokens, or start from a "
            "model that ends its answers"
        )
    if len(scores) > 1 and len(set(scores)) == 1:
        return f"all {len(scores)} answers of the first rollout have the reward {scores[0]:g}: nothing tells them apart"
    return None


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def require_finite_scores(scores: list[float], *, step: int) -> None:
    """Raise NonFiniteError naming the first answer whose reward is not a number."""
    for number, score in enumerate(scores):
        if score != score or score in (float("inf"), float("-inf")):
            raise NonFiniteError(
                f"step {step}: the reward of answer {number} is {score}; stopped before the optimizer step. Look at "
                "the reward on that answer (samples.jsonl has others)"
            )
