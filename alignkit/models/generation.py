"""Answers of a model: greedy for samples and checks, sampled for feedback, token by token for a person who reads."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.continuous_batching import cb_logits_processors as upstream

from alignkit.console import Meter
from alignkit.errors import ModelError
from alignkit.models.hub import quiet_transformers
from alignkit.models.kernels import RoomyLayer, make_cache
from alignkit.models.logprobs import keep_likeliest, pad

_TAIL = 24  # new tokens that are looked at for an end


@contextmanager
def plainly(model: Any) -> Iterator[None]:
    """Let `model.generate` do what it is told and no more, but for the stop tokens that the model has.
    transformers fills every setting that is not given from the base's generation_config.json: a repetition penalty or
    banned n-grams would act on greedy answers, and on rollouts whose probabilities are taken without them. And the
    router's loss of a mixture of experts, which TRL has computed in training, fails once a cache makes inputs shorter.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    settings, config = base.generation_config, model.config.get_text_config()
    routes = getattr(config, "output_router_logits", False)
    kept = ("eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
    base.generation_config = GenerationConfig(**{name: getattr(settings, name) for name in kept})
    if routes:
        config.output_router_logits = False
    try:
        yield
    finally:
        base.generation_config = settings
        if routes:
            config.output_router_logits = True


def usual_length(chat: Any, positions: int | None, *, short: int) -> int:
    """How long answers may get where nobody says: a model that chats needs more room than the toy has."""
    return 256 if chat.has_template and (positions or 1024) >= 1024 else short


class InverseTransform(LogitsProcessor):
    """Choose each token where the cumulative distribution passes the answer's own number; greedy search then takes it.
    A multinomial draw would depend on which other answers are in the batch. `uniforms_BT` are numbers in [0, 1), one
    for every token that an answer may have."""

    def __init__(self, uniforms_BT: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0) -> None:
        self.uniforms_BT, self._step = uniforms_BT, 0
        self._temperature, self._top_p, self._top_k = temperature, top_p, top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._step += 1
        return self.choose(scores, self.uniforms_BT[:, self._step - 1].to(scores.device))

    def choose(self, scores: Tensor, uniforms_B: Tensor) -> Tensor:
        """Make scores, (B, vocabulary), that are 0 for the token drawn and -inf for all others."""
        logits_BV = scores.float() / self._temperature
        if self._top_p < 1 or self._top_k:
            logits_BV = keep_likeliest(logits_BV, top_p=self._top_p, top_k=self._top_k)
        cumulative_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1)
        total_B = cumulative_BV[:, -1]
        # Rounding may reach the end.
        wanted_B = torch.minimum(uniforms_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))
        tokens_B1 = torch.searchsorted(cumulative_BV, wanted_B[:, None], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B1, 0.0)


def generate_answers(
    model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int] = (), *, max_new_tokens: int,
    eos_ids: Sequence[int], pad_id: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
    num_beams: int = 1, min_new_tokens: int | None = None, uniforms_BT: Tensor | None = None,
    in_flight: int | None = None, **hooks: Any,
) -> list[list[int]]:  # fmt: skip
    """Write an answer to each prompt of a batch, greedily with temperature 0, else sampled.
    Every row draws from a generator of its own seed, or from `uniforms_BT`, so that the same seed gives the same answer
    in any batch (up to the rounding of padded batches). Prompts are padded on the left; one too long for the model's
    positions loses its beginning. The model is in eval mode. `in_flight`: that many at a time by continuous batching,
    which cannot ask `is_over`. The hooks are those of `generate_batch`."""
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    new_tokens = min(max_new_tokens, max(positions - 1, 1))
    first = slice(0, positions) if model.config.is_encoder_decoder else slice(-(positions - new_tokens), None)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=min_new_tokens, eos_token_id=list(eos_ids), pad_token_id=pad_id,
        # Beams are searched by the sum of log-probabilities, as the papers have it.
        num_beams=num_beams, length_penalty=0.0 if num_beams > 1 else None,
    )  # fmt: skip
    kept, draw = [list(ids)[first] for ids in prompts], None
    if temperature:
        if uniforms_BT is None:
            numbers = [np.random.default_rng(seed).random(new_tokens, dtype=np.float32) for seed in seeds]
            uniforms_BT = torch.from_numpy(np.stack(numbers))
        draw = InverseTransform(uniforms_BT, temperature=temperature, top_p=top_p, top_k=top_k)
    if in_flight is not None:
        likeliest = InverseTransform(torch.zeros(len(kept), new_tokens), temperature=1.0, top_k=1)
        return generate_continuous(model, kept, settings, draw=draw or likeliest, batch_size=in_flight)
    return generate_batch(model, kept, settings, draw=draw, **hooks)


@torch.no_grad()
def generate_batch(
    model: Any, prompts: Sequence[list[int]], settings: GenerationConfig, *, draw: InverseTransform | None = None,
    is_over: Callable[[list[int]], bool] | None = None, in_step: bool = False,
) -> list[list[int]]:  # fmt: skip
    """Write new tokens after each prompt: greedily, with beams, or as `draw` says.
    A prompt that comes several times is read once, and when half of the answers of a batch have ended the others go on
    without them. `in_step`: ranks that share a model's weights take the same number of steps."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    halves, device, limit = model.config.is_encoder_decoder, next(model.parameters()).device, settings.max_new_tokens
    ids_BT, mask_BT = (tensor.to(device) for tensor in pad(prompts, settings.pad_token_id, left=not halves))
    width = 1 if halves else ids_BT.size(1)  # a decoder begins with its start token
    cache, beams = None, (settings.num_beams or 1) > 1
    if not (halves or in_step or beams) and base._supports_default_dynamic_cache():
        cache = make_cache(base)
        if any(type(layer) not in (RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            cache = None  # layers that keep more than keys and values
    answers: list[list[int]] = [[] for _ in prompts]
    rows, ends = list(range(len(prompts))), [limit] * len(prompts)
    stops = torch.tensor(settings.eos_token_id, dtype=torch.long, device=device)

    def run(ids_BT: Tensor, mask_BT: Tensor, criteria: list[Any], **changes: Any) -> Any:
        config = copy.deepcopy(settings)
        config.update(**{"do_sample": False, "use_cache": True, "return_dict_in_generate": True} | changes)
        return model.generate(
            ids_BT, attention_mask=mask_BT, generation_config=config, synced_gpus=in_step,
            logits_processor=LogitsProcessorList([draw] if draw and criteria else []),
            stopping_criteria=StoppingCriteriaList(criteria), **({} if cache is None else {"past_key_values": cache}),
        )  # fmt: skip

    with plainly(model), quiet_transformers(), Meter("tokens written", limit) as meter:

        def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            meter.advance()
            if beams:  # which end by rules of their own
                return torch.zeros(len(input_ids), dtype=torch.bool, device=device)
            ended_B = torch.isin(input_ids[:, width:], stops).any(dim=1)
            if is_over is not None:
                length = input_ids.size(1) - width
                tails = input_ids[:, width:][:, -_TAIL:].tolist()
                for row, tail in zip(rows, tails, strict=True):
                    if ends[row] > length and is_over(tail):
                        ends[row] = length
                ended_B |= torch.tensor([ends[row] <= length for row in rows], device=device)
            return ended_B | (ended_B.sum() * 2 >= len(rows)) if cache is not None and len(rows) > 2 else ended_B

        places: dict[tuple[int, ...], int] = {}
        numbers = [places.setdefault(tuple(ids), len(places)) for ids in prompts]
        if cache is not None and len(places) < len(prompts) and width > 1:
            firsts = [numbers.index(number) for number in range(len(places))]
            run(ids_BT[firsts, :-1], mask_BT[firsts, :-1], [], max_new_tokens=1, min_new_tokens=None)
            cache.reorder_cache(torch.tensor(numbers, device=device))
        written = 0
        while True:
            least = max((settings.min_new_tokens or 0) - written, 0) or None
            ids_BT = run(ids_BT, mask_BT, [stop], max_new_tokens=limit - written, min_new_tokens=least).sequences
            written, going = ids_BT.size(1) - width, []
            for place, (row, ids) in enumerate(zip(rows, ids_BT[:, width:].tolist(), strict=True)):
                end = next((at + 1 for at, token in enumerate(ids) if token in settings.eos_token_id), limit)
                ends[row] = min(ends[row], end)
                answers[row] = ids[: ends[row]]
                if written < ends[row]:
                    going.append(place)
            if cache is None or not going:
                break
            rows, ids_BT = [rows[place] for place in going], ids_BT[going]
            mask_BT = torch.nn.functional.pad(mask_BT[going], (0, ids_BT.size(1) - mask_BT.size(1)), value=1)
            cache.reorder_cache(torch.tensor(going, device=device))
            if draw is not None:
                draw.uniforms_BT = draw.uniforms_BT[going]
    return answers


class _Draw(upstream.ContinuousBatchingLogitsProcessor):
    """An `InverseTransform` for rows that come and go: a request's numbers are looked up by its name and its turn."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, draw: InverseTransform, settings: GenerationConfig, device: torch.device) -> None:
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
    model: Any, prompts: Sequence[list[int]], settings: GenerationConfig, *, draw: InverseTransform, batch_size: int
) -> list[list[int]]:  # fmt: skip
    """Write new tokens after each prompt by transformers' continuous batching, `batch_size` at a time.
    An answer that ends makes room for the next prompt at once. It draws by the same numbers as `generate_batch`, so
    that both give the same answers up to rounding. The cache holds `batch_size` answers of the longest length, in
    pages. Raises ModelError where a model cannot."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    device, was_training, answers = next(model.parameters()).device, model.training, dict[str, list[int]]()
    page, most = (256, 2**14) if device.type == "cuda" else (32, 512)  # FlashAttention's tables want pages of 256
    longest = max(map(len, prompts)) + settings.max_new_tokens
    config = ContinuousBatchingConfig(
        page_size=page, num_blocks=min(batch_size, len(prompts)) * (-(-longest // page) + 1), seed=0,
        max_requests_per_batch=batch_size, max_batch_tokens=max(longest, most), auto_switch_to_flash=False,
    )  # fmt: skip
    manager, cards = None, [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cards), quiet_transformers(), Meter("answers written", len(prompts)) as meter:
        try:
            manager = base.init_continuous_batching(generation_config=settings, continuous_batching_config=config)
            # No argument takes a processor; the list is read when the thread starts (transformers 5.23).
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


def stream_tokens(
    model: Any, prompt: Sequence[int], *, temperature: float, max_new_tokens: int, eos_ids: Sequence[int],
    top_p: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yield new tokens up to a stop token, `max_new_tokens` or the last position; temperature 0 takes the likeliest."""
    if model.config.is_encoder_decoder:  # the whole answer at once
        seed = int(torch.randint(2**62, (1,), generator=generator))
        drawn: Any = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "eos_ids": eos_ids}
        pad_id = int(model.config.pad_token_id)
        (answer,) = generate_answers(model, [prompt], [seed], max_new_tokens=max_new_tokens, pad_id=pad_id, **drawn)
        yield from (token for token in answer if token not in eos_ids)
        return
    device, past = next(model.parameters()).device, None
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    ids_1T = torch.tensor([list(prompt)], device=device)
    count = max(min(max_new_tokens, positions - len(prompt)), 0)
    numbers_1T = torch.rand(1, count, generator=generator) if temperature else torch.zeros(1, count)
    top_k = top_k if temperature else 1  # the likeliest
    draw = InverseTransform(numbers_1T, temperature=temperature or 1.0, top_p=top_p, top_k=top_k)
    for _ in range(count):
        with torch.no_grad():
            output = model(input_ids=ids_1T, past_key_values=past, use_cache=True)
        past = output.past_key_values
        token = int(draw(ids_1T, output.logits[:, -1].float().cpu()).argmax())
        if token in eos_ids:
            return
        yield token
        ids_1T = torch.tensor([[token]], device=device)


def stream_text(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text that each token adds; half of a character waits for its other half."""
    ids, shown = list[int](), ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # What half of a character decodes to.
        if text.endswith("\ufffd") and len(text) - len(text.rstrip("\ufffd")) < 4:
            continue
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    if rest := tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]:
        yield rest
