"""The pre-training text that PPO-ptx mixes in: InstructGPT (arXiv 2203.02155) eq. 2, its second expectation.

Which blocks a step reads follows from the seed and the step alone, so that nothing needs to be saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from alignkit.train.experience import prompt_numbers
from alignkit.train.readout import Batch, pad_answers

if TYPE_CHECKING:
    from datasets import Dataset

_SEED_OFFSET = 7919  # another order than that of the prompts


@dataclass
class Ptx:
    """Blocks of raw text and the weight of their loss."""

    blocks: Dataset  # input_ids
    coef: float
    batch_size: int  # blocks per optimizer step
    seed: int
    pad_id: int

    def micro_batches(self, step: int, number: int, count: int) -> list[int]:
        """Return the blocks that micro batch `number` of `count` of a step reads; together they are the step's."""
        numbers = prompt_numbers(
            step * self.batch_size, self.batch_size, num_prompts=len(self.blocks), seed=self.seed + _SEED_OFFSET
        )
        return numbers[number::count]

    def batch(self, numbers: list[int], device: Any) -> Batch:
        """Return blocks as one answer each: every token after the first is learnt."""
        blocks = [list(self.blocks[number]["input_ids"]) for number in numbers]
        return pad_answers([ids[:1] for ids in blocks], [ids[1:] for ids in blocks], pad_id=self.pad_id, device=device)

    def loss(self, logps_N: Tensor, num_tokens: int) -> Tensor:
        """Return this micro batch's part of coef times the mean loss of the step's tokens."""
        return -self.coef * logps_N.sum() / num_tokens

    def count_tokens(self, step: int) -> int:
        """Return the learnt tokens of a whole step."""
        numbers = self.micro_batches(step, 0, 1)
        return sum(len(self.blocks[number]["input_ids"]) - 1 for number in numbers)
