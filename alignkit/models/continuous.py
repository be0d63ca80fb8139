"""Answers by transformers' continuous batching: an answer that ends makes room for the next prompt at once.

It draws by the same numbers as `generation.generate_batch`, so that both give the same answers up to rounding.
Upstream references are transformers 5.23.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import cb_logits_processors as upstream

from alignkit.console import Meter
from alignkit.errors import ModelError
from alignkit.models.hub import quiet_transformers


class _Draw(upstream.ContinuousBatchingLogitsProcessor):
    """An `InverseTransform` for rows that come and go: a request's numbers are looked up by its name and its turn."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, draw: Any, settings: GenerationConfig, device: torch.device) -> None:
        self.draw, self.least, self.turns = draw, settings.min_new_tokens or 0, dict[str, int]()
        self.stops = torch.tensor(settings.eos_token_id, dtype=torch.long, device=device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """The number of each request's next token; one below 0 is less by 1 and says that it may not be a stop."""
        numbers = []
        for name in (request.state.request_id for request in requests_with_new_token):
            turn, row = self.turns.get(name, 0), int(name.rpartition("_")[2]) if name.startswith("req_") else 0
            self.turns[name] = turn + 1
            last = self.draw.uniforms_BT.size(1) - 1  # more may be asked for than are written
            numbers.append(float(self.draw.uniforms_BT[row, min(turn, last)]) - (turn < self.least))
        return torch.tensor(numbers, dtype=torch.float32).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        numbers_B = tensor_arg[: scores.size(0)].view(torch.float32)
        scores[:, self.stops] = scores[:, self.stops].masked_fill((numbers_B < 0)[:, None], -torch.inf)
        return self.draw.choose(scores, numbers_B % 1)


def generate_continuous(
    model: Any, prompts: Sequence[list[int]], settings: GenerationConfig, *, draw: Any, batch_size: int
) -> list[list[int]]:  # fmt: skip
    """Write new tokens after each prompt, `batch_size` at a time and as an `InverseTransform` draws them.

    Raises ModelError where a model cannot.
    The cache holds as many answers of the longest length, in pages.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    device, was_training, answers = next(model.parameters()).device, model.training, dict[str, list[int]]()
    page, most = (256, 2**14) if device.type == "cuda" else (32, 512)  # FlashAttention's tables want pages of 256
    longest = max(map(len, prompts)) + settings.max_new_tokens
    config = ContinuousBatchingConfig(
        page_size=page, num_blocks=min(batch_size, len(prompts)) * (-(-longest // page) + 1), seed=0,
        max_requests_per_batch=batch_size, max_batch_tokens=max(longest, most), auto_switch_to_flash=False,
    )  # fmt: skip
    manager = None
    with (
        torch.random.fork_rng(),
        quiet_transformers(),
        Meter("answers written", len(prompts)) as meter,
    ):  # it sets seeds
        try:
            manager = base.init_continuous_batching(generation_config=settings, continuous_batching_config=config)
            # No argument takes a processor; the list is read when the thread starts.
            processors = LogitsProcessorList([_Draw(draw, settings, device)])
            manager.logit_processor = upstream.ContinuousBatchingLogitsProcessorList(processors)
            manager.logit_processor.tensors_required = 1
            manager.start()
            names = manager.add_requests([list(ids) for ids in prompts], max_new_tokens=settings.max_new_tokens)
            while len(answers) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is None and manager.is_running():
                    continue
                if result is None or result.error:
                    raise ValueError(result.error if result else "its thread has ended")
                answers[result.request_id] = list(result.generated_tokens)
                meter.advance()
        except (ValueError, AttributeError, NotImplementedError, MemoryError) as error:
            what = f"continuous batching cannot run a {base.config.model_type} model: {error}; use engine: transformers"
            raise ModelError(what) from error
        finally:
            if manager is not None:
                manager.stop(block=True)
                manager.destroy()
            model.train(was_training)
    return [answers[name] for name in names]
