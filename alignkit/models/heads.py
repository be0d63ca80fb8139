"""Classifiers as GPT-1 makes them: a linear head on a decoder's last token, task formats, auxiliary language modelling.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", sections 3.2 and 3.3. B rows, S
sequences of them (one or two a row, or one an answer), T tokens, C labels, K answers, V tokens of the vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

from alignkit.errors import ModelError
from alignkit.models.chat import TASK_TOKENS, Chat, Encoded
from alignkit.models.logprobs import pad
from alignkit.models.template import Written

_STD = 0.02  # of new embeddings and of a new head, as of all weights of GPT-1


def write_task(prompt: str, completions: Sequence[str]) -> list[Written]:
    """Write what `arrange` puts together: the task's tokens, then a row's texts, its prompt first if it has one."""
    return [Written("".join(TASK_TOKENS), plain=True), *map(Written, (*([prompt] if prompt else []), *completions))]


def arrange(objective: str, encoded: Sequence[Encoded], limit: int | None = None) -> tuple[list[list[int]], bool]:
    """Arrange the texts of a row (`write_task`) as its task reads them, and tell whether any was cut to `limit` tokens.
    A text, or a pair with the delimiter between them, is one sequence; similarity has no order, so that both are read;
    of a choice each answer is read after the context. The longest text of a sequence is the one that is cut."""
    head, texts = encoded[0].ids, [text.ids for text in encoded[1:]]
    (start, delimiter, extract), prefix = head[-3:], head[:-3]  # the prefix is the BOS of tokenizers that write one
    orders = [texts]
    if objective == "similarity":
        orders = [texts, texts[::-1]]
    elif objective == "multiple_choice":
        orders = [[texts[0], answer] for answer in texts[1:]]
    sequences, cut = [], False
    for order in orders:
        sizes = list(map(len, order))
        room = (limit or math.inf) - len(prefix) - 1 - len(order)
        while sum(sizes) > room and max(sizes) > 1:
            sizes[sizes.index(max(sizes))] -= 1
            cut = True
        ids = [*prefix, start]
        for text, size in zip(order, sizes, strict=True):
            ids += [*text[:size], delimiter]
        sequences.append([*ids[:-1], extract])
    return sequences, cut


def row_logits(objective: str, logits_SC: Tensor, row_of_S: Tensor) -> Tensor:
    """Add up the logits of a row's sequences, (S, C) -> (B, C); of a choice put them side by side, (B, K)."""
    if objective == "multiple_choice":
        return pad_groups(logits_SC.squeeze(-1), row_of_S)
    return logits_SC.new_zeros(int(row_of_S[-1]) + 1, logits_SC.size(1)).index_add(0, row_of_S, logits_SC)


def pad_groups(scores_S: Tensor, row_of_S: Tensor) -> Tensor:
    """Put the scores of each row beside each other, (S,) -> (B, K), with -inf where a row has fewer than K."""
    sizes_B = torch.bincount(row_of_S)
    place_S = torch.arange(len(scores_S), device=scores_S.device) - (sizes_B.cumsum(0) - sizes_B)[row_of_S]
    scores_BK = scores_S.new_full((len(sizes_B), int(sizes_B.max())), -math.inf)
    return scores_BK.index_put((row_of_S, place_S), scores_S)


def language_losses(logits_STV: Tensor, labels_ST: Tensor) -> Tensor:
    """The auxiliary loss of each sequence, (S,): the mean over its tokens but the first, -100 left out (equation 1)."""
    losses_ST = F.cross_entropy(logits_STV[:, :-1].float().transpose(1, 2), labels_ST[:, 1:], reduction="none")
    return losses_ST.sum(dim=1) / (labels_ST[:, 1:] != -100).sum(dim=1)


def task_losses(
    logits_BC: Tensor, label_B: Tensor, language_S: Tensor | None, row_of_S: Tensor, lm_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    """L3 = L2 + lm_coef L1 (equation 5) as means over rows, and its two parts; of a row's sequences L1 is the mean."""
    task = F.cross_entropy(logits_BC, label_B)
    if language_S is None:
        return task, task, torch.zeros_like(task)
    language = (language_S / torch.bincount(row_of_S)[row_of_S]).sum() / len(label_B)
    return task + lm_coef * language, task, language


class ScoreHead(nn.Linear):
    """A head of scores or values, which computes in float32 whatever autocast and the model's weights round to."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class _DoubleHeads:
    """Mixin over a causal language model of transformers: its own head, and a score head on the last token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.score = nn.Linear(self.get_output_embeddings().weight.shape[1], config.num_labels, bias=False)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """Logits of the labels, (S, C), and with `labels`, the tokens, the losses of language modelling, (S,)."""
        inputs, losses_S = {**kwargs, "input_ids": input_ids, "attention_mask": attention_mask}, None
        if labels is None:
            hidden_STH = self.base_model(**inputs).last_hidden_state  # type: ignore[attr-defined]
        else:
            outputs = super().forward(**{**inputs, "output_hidden_states": True})  # type: ignore[misc]
            hidden_STH, losses_S = outputs.hidden_states[-1], language_losses(outputs.logits, labels)
        last_S = attention_mask.sum(dim=1) - 1
        last_SH = hidden_STH[torch.arange(len(last_S), device=last_S.device), last_S]
        return SequenceClassifierOutput(loss=losses_S, logits=self.score(last_SH))


def double_heads(config: Any) -> type[PreTrainedModel]:
    """Make the class of a model with both heads; saved, it is the classifier that transformers has of this kind."""
    causal: Any = AutoModelForCausalLM._model_mapping[type(config)]
    name = causal.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    made: type[PreTrainedModel] = type(name, (_DoubleHeads, causal), {"__module__": causal.__module__})
    return made


def grow_vocabulary(model: PreTrainedModel, num_tokens: int) -> None:
    """Make room for tokens that the tokenizer has and the model has not; they begin as the mean of the others."""
    before = model.get_input_embeddings().num_embeddings
    if num_tokens <= before:
        return
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        layer.weight.data[before:] = layer.weight.data[:before].float().mean(dim=0).to(layer.weight)


def prepare_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int, of_task: bool) -> None:
    """Set the pad token, behind which no score is read, and draw the score head where it is new.
    A reward's head comes from N(0, 1/sqrt(d + 1)) (Ziegler et al. 2019, arXiv 1909.08593), that of a task and the
    embeddings of its tokens from N(0, 0.02). Raises ModelError for an architecture without such a head."""
    model.config.pad_token_id = tokenizer.pad_token_id
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or not (of_task or head.out_features == 1):
        kind, use = ("score", "classifier") if of_task else ("scalar score", "reward model")
        raise ModelError(f"a {model.config.model_type} model has no {kind} head; it cannot be a {use}")
    if not getattr(model, "score_is_new", False):
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.randn(head.weight.shape, generator=generator)
        head.weight.copy_(drawn * _STD if of_task else drawn / (head.in_features + 1) ** 0.5)
        if head.bias is not None:
            head.bias.zero_()
        ids = tokenizer.convert_tokens_to_ids(list(TASK_TOKENS))
        layers = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
        for weight in {id(layer.weight): layer.weight for layer in layers if of_task}.values():
            weight[ids] = (torch.randn(len(ids), weight.size(1), generator=generator) * _STD).to(weight)


@torch.no_grad()
def predict(
    model: Any, rows: Sequence[Sequence[Sequence[int]]], objective: str, *, pad_id: int, batch_size: int = 16
) -> list[list[float]]:
    """Probabilities of the labels, or of the answers of a choice, for rows of sequences, as `arrange` gives them."""
    device, found = next(model.parameters()).device, [list[float]() for _ in rows]
    order = sorted(range(len(rows)), key=lambda number: max(map(len, rows[number])))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        sequences = [ids for number in chosen for ids in rows[number]]
        row_of = torch.tensor([place for place, number in enumerate(chosen) for _ in rows[number]], device=device)
        ids_ST, mask_ST = pad(sequences, pad_id)
        logits_SC = model(input_ids=ids_ST.to(device), attention_mask=mask_ST.to(device)).logits.float()
        for number, values in zip(chosen, row_logits(objective, logits_SC, row_of).softmax(-1).tolist(), strict=True):
            found[number] = values[: len(rows[number])] if objective == "multiple_choice" else values
    return found


def encode_tasks(
    chat: Chat, objective: str, texts: Sequence[tuple[str, Sequence[str]]], limit: int | None = None
) -> list[list[list[int]]]:
    """Encode rows, each a prompt ("" for none) and its texts, into the sequences that `predict` reads."""
    written = [write_task(prompt, completions) for prompt, completions in texts]
    encoded = iter(chat.tokenize([piece for pieces in written for piece in pieces]))
    return [arrange(objective, [next(encoded) for _ in pieces], limit)[0] for pieces in written]
