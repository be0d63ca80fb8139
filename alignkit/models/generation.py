"""Answers of a model: greedy for samples and checks, sampled for feedback, token by token for a person who reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from alignkit.console import Meter
from alignkit.models.logprobs import keep_likeliest, pad

_BATCH = 16
_TAIL = 24  # new tokens that are looked at for an end
_HELD_BACK = "\ufffd"  # what half of a character decodes to


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


def generate_greedy(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_ids: Sequence[int], pad_id: int,
    num_beams: int = 1,
) -> list[list[int]]:  # fmt: skip
    """Write the new tokens of each prompt, the stop token included when one came; with several beams, search for them.

    Prompts are padded on the left; one too long for the model's positions loses its beginning. The model's mode is
    put back.
    """
    kept, new_tokens = _fit(model, prompts, max_new_tokens)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=list(eos_ids), pad_token_id=pad_id, use_cache=True,
        # The sum of log-probabilities is searched for, as the papers have it.
        num_beams=num_beams, length_penalty=0.0 if num_beams > 1 else None,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    try:
        answers: list[list[int]] = []
        for start in range(0, len(kept), _BATCH):
            answers += _generate_batch(model, kept[start : start + _BATCH], settings)
        return answers
    finally:
        model.train(was_training)


def _fit(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[list[list[int]], int]:
    """Cut prompts and answers to the model's positions; each half of an encoder-decoder has some of its own."""
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    new_tokens = min(max_new_tokens, max(positions - 1, 1))
    halves = model.config.is_encoder_decoder
    return [list(ids)[:positions] if halves else list(ids)[-(positions - new_tokens) :] for ids in prompts], new_tokens


def usual_length(chat: Any, positions: int | None, *, short: int) -> int:
    """How long answers may get where nobody says: a model that chats needs more room than the toy has."""
    return 256 if chat.has_template and (positions or 1024) >= 1024 else short


def generate_answers(
    model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, temperature: float, top_p: float = 1.0,
    top_k: int = 0, is_over: Callable[[list[int]], bool] | None = None, **settings: Any,
) -> list[list[int]]:  # fmt: skip
    """Write an answer to each prompt of a batch, as `generate_greedy` does with temperature 0, else sampled.

    Every row draws from a generator of its own seed, so that the same seed gives the same answer in any batch (up to
    the rounding of padded batches). `is_over` tells from a row's last new tokens that it has said enough. The model is
    in eval mode; a prompt that is too long loses its beginning.
    """
    if temperature == 0 and is_over is None:  # the only one that knows num_beams
        return generate_greedy(model, prompts, **settings)
    rows, new_tokens = _fit(model, prompts, settings["max_new_tokens"])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=list(settings["eos_ids"]),
        pad_token_id=settings["pad_id"], use_cache=True,
    )  # fmt: skip
    criteria = stop_when(is_over, width=max(map(len, rows)))
    sampled = gumbel(seeds, temperature, next(model.parameters()).device, top_p, top_k) if temperature else None
    processors = LogitsProcessorList([sampled] if sampled else [])
    return _generate_batch(model, rows, config, logits_processor=processors, stopping_criteria=criteria)


def stop_when(is_over: Callable[[list[int]], bool] | None, *, width: int) -> StoppingCriteriaList:
    """End an answer once `is_over` says so of its last new tokens; `width` is that of the padded prompts."""

    def end(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = input_ids[:, max(width, input_ids.shape[1] - _TAIL) :].tolist()
        return torch.tensor([is_over is not None and is_over(row) for row in new], device=input_ids.device)

    return StoppingCriteriaList([end] if is_over else [])


def gumbel(seeds: Sequence[int], temperature: float, device: torch.device, top_p: float = 1.0, top_k: int = 0) -> Any:
    """Make greedy search sample: the largest of logits / T + Gumbel noise is a draw from softmax(logits / T).

    Maddison et al. 2014 (arXiv 1411.0030), section 2.
    """
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        waits_BV = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in enumerate(generators):
            waits_BV[row].exponential_(generator=generator)
        scores = scores.float() / temperature
        if top_p < 1 or top_k:
            scores = keep_likeliest(scores, top_p=top_p, top_k=top_k)
        return scores - waits_BV.clamp_min(1e-30).log()

    return process


def _generate_batch(model: Any, prompts: list[list[int]], settings: GenerationConfig, **hooks: Any) -> list[list[int]]:
    device = next(model.parameters()).device
    halves = model.config.is_encoder_decoder
    ids_BT, mask_BT = pad(prompts, settings.pad_token_id, left=not halves)
    with torch.no_grad(), plainly(model), Meter("tokens written", settings.max_new_tokens) as meter:

        def count(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            meter.advance()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        hooks["stopping_criteria"] = StoppingCriteriaList([*hooks.get("stopping_criteria", ()), count])
        output = model.generate(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=settings, **hooks
        )
    answers = output[:, 1 if halves else ids_BT.size(1) :].tolist()  # a decoder begins with its start token
    ends = [next((at for at, token in enumerate(row) if token in settings.eos_token_id), len(row)) for row in answers]
    return [row[: end + 1] for row, end in zip(answers, ends, strict=True)]


def stream_tokens(
    model: Any, prompt: Sequence[int], *, temperature: float, max_new_tokens: int, eos_ids: Sequence[int],
    top_p: float = 1.0, top_k: int = 0, generator: torch.Generator | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yield new tokens until a stop token (not yielded), `max_new_tokens`, or the end of the model's positions.

    Temperature 0 takes the likeliest token. The model is in eval mode; `generator` lies on the CPU.
    """
    if model.config.is_encoder_decoder:  # the whole answer at once
        seed = int(torch.randint(2**62, (1,), generator=generator))
        settings: Any = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, "pad_id": int(model.config.pad_token_id)}
        settings |= {"top_p": top_p, "top_k": top_k}
        (answer,) = generate_answers(model, [prompt], [seed], temperature=temperature, **settings)
        yield from (token for token in answer if token not in eos_ids)
        return
    device = next(model.parameters()).device
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    positions = getattr(inner.config.get_text_config(), "max_position_embeddings", None) or 10**9
    ids_1T = torch.tensor([list(prompt)], device=device)
    past = None
    for _ in range(min(max_new_tokens, positions - len(prompt))):
        with torch.no_grad():
            output = model(input_ids=ids_1T, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits_V = output.logits[0, -1].float().cpu()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            logits_1V = logits_V[None] / temperature
            if top_p < 1 or top_k:
                logits_1V = keep_likeliest(logits_1V, top_p=top_p, top_k=top_k)
            token = int(torch.multinomial(logits_1V[0].softmax(dim=-1), 1, generator=generator))
        if token in eos_ids:
            return
        yield token
        ids_1T = torch.tensor([[token]], device=device)


def stream_text(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text that each token adds; half of a character waits for its other half."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith(_HELD_BACK) and len(text) - len(text.rstrip(_HELD_BACK)) < 4:
            continue
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest
