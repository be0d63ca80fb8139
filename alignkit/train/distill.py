"""The teacher of an sft stage with objective: distill, and how far a student's next-token distributions are from its.

Legend: B sequences, L tokens of the longest, N learnt tokens in all, V vocabulary, K likeliest tokens.
"""

import threading
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.errors import ModelError
from alignkit.models.adapters import START
from alignkit.models.frozen import load_causal, load_tokenizer_of
from alignkit.models.start import is_same_model
from alignkit.recipe import Stage
from alignkit.recipe.methods import SftOptions

_TILE = 512  # tokens whose probabilities are held at a time


def divergence(student_NK: Tensor, teacher_NK: Tensor, beta: float) -> Tensor:
    """GKD's divergence of two distributions over K classes, given as log-probabilities: (N,) nats.
    KL(teacher || student) for beta 0, KL(student || teacher) for 1, else beta KL(teacher || M) + (1 - beta)
    KL(student || M) with M = beta teacher + (1 - beta) student. Source: Agarwal et al. 2024 (arXiv 2306.13649), eq. 1.
    """

    def kl(p_NK: Tensor, q_NK: Tensor) -> Tensor:
        return (p_NK.exp() * (p_NK - q_NK)).sum(dim=-1)

    if beta in (0, 1):
        return kl(student_NK, teacher_NK) if beta else kl(teacher_NK, student_NK)
    mixed_NK = (beta * teacher_NK.exp() + (1 - beta) * student_NK.exp()).log()
    return beta * kl(teacher_NK, mixed_NK) + (1 - beta) * kl(student_NK, mixed_NK)


def with_rest(logps_NK: Tensor) -> Tensor:
    """Add the log-probability of all other tokens as one more class, (N, K + 1)."""
    # Rounding may leave the rest nothing, whose logarithm would end in 0 times infinity.
    rest_N1 = torch.log1p(-logps_NK.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([logps_NK, rest_N1], dim=-1)


class Teacher:
    """A frozen model of its own, the student's base with its adapter off, or a model behind a server."""

    def __init__(self, stage: Stage, student: Any, tokenizer: Any) -> None:
        """Load or find the teacher and compare its vocabulary with the student's."""
        options = stage.expect(SftOptions).teacher
        assert options is not None
        self.options, self.positions = options, None
        self.model: Any = None
        self.server: Any = None
        require_same_tokens(stage, tokenizer)
        base = student.get_base_model() if isinstance(student, PeftModel) and START not in student.peft_config else None
        if options.url is not None:
            from alignkit.feedback.server import Endpoint
            from alignkit.feedback.writer import Spending

            source = options.model_copy(update={"api": "completions"})
            self.server = Endpoint(source, spending=Spending(options), stop=threading.Event())
            ids = tokenizer("The teacher reads what the student reads: 1, 2, 3.", add_special_tokens=False).input_ids
            for place in filter(None, self.server.read_prompts([ids], options.top_k)[0]):
                for number, entry in place.items():
                    said, own = entry.get("decoded_token"), tokenizer.decode([int(number)])
                    if said and "\ufffd" not in said + own and said.strip() != own.strip():
                        what = f"its token {number} is {said!r} and the student's {own!r}"
                        raise ModelError(f"{self.server.place} has another vocabulary than the student: {what}")
        elif base is not None and is_same_model(base.name_or_path, str(options.model)):
            self.positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        else:
            loaded = load_causal(str(options.model), device=student.device.type, trust_code=stage.trust_code)
            self.model, self.positions = loaded.model.to(student.device), loaded.positions

    @torch.no_grad()
    def read(self, student: Any, input_ids: Tensor, mask: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        """Logits of what comes next at `places` (B, L), or with top_k the likeliest tokens and their log-probabilities.
        `student` may be the wrapper of a model that shares its base."""
        if self.server is not None:
            return self._ask(input_ids, mask, places)
        model, training, top_k = student if self.model is None else self.model, student.training, self.options.top_k
        model.eval()
        plain = model.module if hasattr(model, "module") else model
        with plain.disable_adapter() if self.model is None else nullcontext():
            logits_NV = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[places]
        student.train(training)
        if top_k is None:
            return (logits_NV,)
        likeliest = (logits_NV.float() / self.options.temperature).log_softmax(dim=-1)
        logps_NK, ids_NK = likeliest.topk(min(top_k, likeliest.size(1)))
        return ids_NK, logps_NK

    def compare(self, logits_NV: Tensor, taught: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The student's divergence from what `read` found at each token, and its entropy there, both (N,)."""
        beta, temperature = self.options.beta, self.options.temperature

        def read(own_MV: Tensor, *theirs: Tensor) -> tuple[Tensor, Tensor]:
            size = min(own_MV.size(1), theirs[0].size(1)) if len(theirs) == 1 else own_MV.size(1)
            # What lies beyond the tokenizer differs between sizes of one family.
            own_MV = (own_MV[:, :size].float() / temperature).log_softmax(dim=-1)
            entropy_M = -(own_MV.detach().exp() * own_MV.detach()).sum(dim=-1)
            if len(theirs) == 1:
                teacher_MV = (theirs[0][:, :size].float() / temperature).log_softmax(dim=-1)
                return divergence(own_MV, teacher_MV, beta), entropy_M
            return divergence(with_rest(own_MV.gather(1, theirs[0])), with_rest(theirs[1]), beta), entropy_M

        parts = zip(*(column.split(_TILE) for column in (logits_NV, *taught)), strict=True)
        tiles = [checkpoint(read, *tile, use_reentrant=False) for tile in parts]  # probabilities are computed twice
        return tuple(map(torch.cat, zip(*tiles, strict=True)))

    def _ask(self, input_ids: Tensor, mask: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        rows = [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, mask, strict=True)]
        num = self.options.top_k or 0
        answers = self.server.read_prompts(rows, num)
        said = [answers[row][place + 1] for row, place in places.nonzero().tolist()]
        found = [sorted(((v["logprob"], int(k)) for k, v in each.items()), reverse=True)[:num] for each in said]
        logps_NK, ids_NK = torch.tensor(found, dtype=torch.float64, device=input_ids.device).unbind(dim=-1)
        return ids_NK.long(), logps_NK.float()


def require_same_tokens(stage: Stage, tokenizer: Any) -> None:
    """Raise ModelError unless a teacher on this machine has the student's tokens under the same numbers."""
    source = getattr(stage.expect(SftOptions).teacher, "model", None)
    if source is None:
        return
    own, theirs = tokenizer.get_vocab(), load_tokenizer_of(source, trust_code=stage.trust_code).get_vocab()
    differing = sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token))
    if differing:
        what = f"{len(differing)} tokens differ, first {differing[0]!r}: number {theirs.get(differing[0])} in the "
        what += f"teacher, {own.get(differing[0])} in the student"
        where = stage.where(f"{stage.name}.teacher")
        raise ModelError(f"{source} has another vocabulary than the student: {what}", where=where)
