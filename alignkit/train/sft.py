"""Supervised fine-tuning on TRL's SFTTrainer: language models, encoder-decoders, students, and classifiers, which learn
labels, with language modelling as auxiliary loss (GPT-1, section 3.2).

Legend of distillation: B sequences, L tokens of the longest, N learnt tokens in all, V vocabulary, K likeliest tokens.
"""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from trl import SFTConfig, SFTTrainer

from alignkit.data import Row
from alignkit.data.load import streams
from alignkit.errors import DataError, ModelError
from alignkit.models.adapters import START
from alignkit.models.frozen import load_causal, require_same_tokens
from alignkit.models.generation import generate_answers
from alignkit.models.heads import encode_tasks, predict, row_logits, task_losses
from alignkit.models.load import load_policy
from alignkit.models.start import is_same_model
from alignkit.recipe import Stage
from alignkit.recipe.methods import SftOptions
from alignkit.runs.directory import RunDir
from alignkit.train.encode import IGNORED, longest_sequence, name_label
from alignkit.train.fit import fit
from alignkit.train.setup import Setup, build_config, collator_for, open_rows
from alignkit.train.tables import Stream, token_batches
from alignkit.train.trainer import Guarded

# The tables carry their labels; with these two TRL would look for columns that are no longer there.
_LABELLED = {"assistant_only_loss": False, "completion_only_loss": False}
_COIN = 2**32  # seeds of draws of its own: which steps learn from the student's answers
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


class Sft(Guarded, SFTTrainer):
    """TRL's SFTTrainer behind our guard; TRL still packs when `packing:` asks for it."""

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        return dict.fromkeys(("loss", "entropy", "mean_token_accuracy"), tokens)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *others: Any) -> Any:
        if not packing:
            return dataset
        tokens = dataset.select_columns(["input_ids", "labels"])
        return SFTTrainer._prepare_dataset(self, tokens, processing_class, args, packing, *others)


class Seq2Seq(Sft):
    """The same for an encoder-decoder model: the mean loss over all target tokens of a step, none of them shifted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, False  # how transformers counts the tokens

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict.fromkeys(("loss", "entropy", "mean_token_accuracy"), (inputs["labels"] != IGNORED).sum())

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, use_cache=False)
        labels_N, logits_NV = inputs["labels"].flatten(), outputs.logits.flatten(0, 1).float()
        kept_N = labels_N != IGNORED
        total = cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=self.args.label_smoothing_factor)
        with torch.no_grad():
            logps_NV = logits_NV[kept_N].log_softmax(dim=-1)
            right_N, entropy_N = logps_NV.argmax(dim=-1) == labels_N[kept_N], -(logps_NV.exp() * logps_NV).sum(dim=-1)
        tokens = inputs["attention_mask"].sum() + inputs["decoder_attention_mask"].sum()
        self.note_metrics({"entropy": entropy_N, "mean_token_accuracy": right_N}, num_tokens=tokens)
        loss = self.average(total, kept_N.sum(), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def average(self, total: Tensor, count: Tensor, num_items: Any) -> Tensor:
        """Make a batch's sum over tokens its part of the mean over those of the step; ranks' gradients are averaged."""
        if num_items is None:
            return total / count
        return total / num_items * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)


class Distill(Seq2Seq):
    """The same for a student: the mean divergence from its teacher over all learnt tokens of a step."""

    def __init__(self, *args: Any, teacher: Teacher, stop_ids: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.stop_ids, self._loss_shifts_labels = teacher, stop_ids, True

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict.fromkeys(("loss", "entropy"), (inputs["labels"][:, 1:] != IGNORED).sum())

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Let the student answer the prompts of a share of the steps, which seed and step alone choose."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        step, options = self.state.global_step, self.teacher.options
        if np.random.default_rng((self.args.seed, _COIN, step)).random() >= options.on_policy:
            return batches, num_items
        batches = [self._answer(batch, (self.args.seed, step, number)) for number, batch in enumerate(batches)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _answer(self, batch: dict[str, Tensor], key: tuple[int, ...]) -> dict[str, Tensor]:
        """Put answers of the student in the place of the last ones of a batch, behind both prompts."""
        options, prompts = self.teacher.options, dict[str, list[list[int]]]()
        sides = ["", "teacher_"] if "teacher_input_ids" in batch else [""]
        for side in sides:  # a prompt is what comes before the last stretch that is learnt
            places_BL = _read_places(batch[f"{side}labels"])
            begins_BL = places_BL & ~pad(places_BL[:, :-1], (1, 0))
            starts_B = (begins_BL * torch.arange(begins_BL.size(1), device=begins_BL.device)).amax(dim=1).tolist()
            rows = zip(batch[f"{side}input_ids"].tolist(), starts_B, strict=True)
            prompts[side] = [ids[: start + 1] for ids, start in rows]
        own = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        ends = ((own, sides[0]), (self.teacher.positions, sides[-1]))
        room = [positions - max(map(len, prompts[side])) for positions, side in ends if positions]
        draws = np.random.default_rng((*key, self.args.process_index)).integers(2**62, size=len(prompts[""]))
        model = self.accelerator.unwrap_model(self.model).eval()
        answers = generate_answers(
            model, prompts[""], draws.tolist(), temperature=options.temperature, eos_ids=self.stop_ids,
            max_new_tokens=max(1, min(options.max_new_tokens, *room)), pad_id=self.processing_class.pad_token_id,
        )  # fmt: skip
        model.train()
        found: list[dict[str, Any]] = [{} for _ in answers]
        for side in sides:
            for row, prompt, answer in zip(found, prompts[side], answers, strict=True):
                row |= {f"{side}input_ids": prompt + answer, f"{side}labels": [IGNORED] * len(prompt) + answer}
        return {name: column.to(self.args.device) for name, column in self.data_collator(found).items()}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        sides = [
            (inputs[f"{side}input_ids"], inputs[f"{side}attention_mask"], _read_places(inputs[f"{side}labels"]))
            for side in ("", "teacher_") if f"{side}input_ids" in inputs
        ]  # fmt: skip
        taught, (input_ids, mask, places) = self.teacher.read(model, *sides[-1]), sides[0]
        logits_BLV = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        losses_N, entropy_N = self.teacher.compare(logits_BLV[places], taught)
        self.note_metrics({"entropy": entropy_N}, num_tokens=mask.sum())
        loss = self.average(losses_N.sum(), places.sum(), num_items_in_batch)
        return (loss, {}) if return_outputs else loss


def _read_places(labels_BL: Tensor) -> Tensor:
    """Mark the positions that predict a learnt token, (B, L)."""
    return pad(labels_BL[:, 1:] != IGNORED, (0, 1))


class Classifier(Guarded, SFTTrainer):
    """TRL's SFTTrainer with the losses of GPT-1."""

    def __init__(self, *args: Any, objective: str, lm_coef: float, **kwargs: Any) -> None:
        self.objective, self.lm_coef = objective, lm_coef
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over rows, whatever number of tokens they have

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        learnt = {"labels": inputs["labels"]} if self.lm_coef else {}
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**tokens, **learnt, use_cache=False)
        logits_BC = row_logits(self.objective, outputs.logits.float(), inputs["row_of"])
        lm_loss = outputs.loss if learnt else None
        losses = task_losses(logits_BC, inputs["label"], lm_loss, inputs["row_of"], self.lm_coef)
        found = {"accuracy": logits_BC.argmax(dim=-1) == inputs["label"]}
        found |= {"task_loss": losses[1], "lm_loss": losses[2]} if learnt else {}
        self.note_metrics(found, num_tokens=inputs["attention_mask"].sum())
        return (losses[0], outputs) if return_outputs else losses[0]


def build(stage: Stage, run: RunDir) -> Setup:
    """Load model and rows and make a trainer that has not trained yet."""
    stage.expect(SftOptions)
    setup = open_rows(stage, run)
    if stage.task is not None:
        return _build_classifier(setup)
    setup.load()
    recomputes = setup.loaded.model.supports_gradient_checkpointing
    if stage.trainer.get("gradient_checkpointing") and not recomputes:
        key = f"{stage.name}.gradient_checkpointing"
        what = f"{key} is true, and this architecture has nothing to recompute; take it out"
        raise ModelError(what, where=stage.where(key))
    packs = stage.trainer.get("packing") or stage.trainer.get("eval_packing")
    fixed = _LABELLED if recomputes else {**_LABELLED, "gradient_checkpointing": False}
    most = stage.trainer.get("max_length") if packs else None
    arguments = setup.arguments(build_config(stage, SFTConfig, run.checkpoints, max_length=most, **fixed))
    trainer: type[Sft] = Sft
    if stage.objective == "seq2seq":
        trainer, arguments["data_collator"] = Seq2Seq, collator_for(stage, setup.chat.tokenizer)
    if stage.objective == "distill":
        teacher = Teacher(stage, setup.loaded.model, setup.chat.tokenizer)
        setup.record["teacher"] = teacher.options.name or teacher.options.model
        arguments |= {"teacher": teacher, "stop_ids": setup.chat.stop_ids}
        trainer, arguments["data_collator"] = Distill, collator_for(stage, setup.chat.tokenizer)
    setup.trainer = trainer(**arguments)
    if (budget := stage.expect(SftOptions).batch_tokens) is not None:
        table, collate = setup.tables.train, setup.trainer.data_collator
        batches = token_batches(table.with_format("numpy")["length"][:], num_tokens=budget, seed=stage.seed)
        grouped = table.from_dict({"rows": [rows.tolist() for rows in batches]})
        setup.trainer.train_dataset = grouped.with_transform(
            lambda items: {"rows": [[table[row] for row in rows] for rows in items["rows"]]}
        )
        # Held-out rows come one by one.
        setup.trainer.data_collator = lambda items: collate([row for item in items for row in item.get("rows", [item])])
    if streams(stage):
        setup.trainer.train_dataset = Stream(stage, setup.chat)  # TRL's constructor takes a Dataset alone
    return setup


def _build_classifier(setup: Setup) -> Setup:
    stage = setup.stage
    options, task = stage.expect(SftOptions), str(stage.task)
    found, held_out = (set(table.unique("label") if table else ()) for table in (setup.tables.train, setup.tables.eval))
    labels = list[str]()  # in the order of their numbers; none of a choice, whose labels are numbers
    numbers = {name: int(name) for name in found | held_out} if task == "multiple_choice" else {}
    if task != "multiple_choice":
        if len(found) < 2:
            what = f"all rows have the label {found.pop()}; a classifier needs rows of two labels or more"
            raise DataError(what, where=stage.where(f"{stage.name}.data"))
        if (strange := held_out - found) and options.labels is None:
            what = f"held-out rows have labels that no training row has: {', '.join(sorted(strange))}"
            raise DataError(f"{what}; mend them, or set {stage.name}.labels", where=stage.where(f"{stage.name}.eval"))
        labels = options.labels or sorted(found, key=lambda name: (int(name) if name.isdecimal() else -1, name))
        numbers = {name: number for number, name in enumerate(labels)}
    setup.load(partial(load_policy, reward=True, labels=labels))
    setup.head = {"objective": task, "labels": labels, "num_tokens": len(setup.chat.tokenizer)}
    collator = collator_for(stage, setup.chat.tokenizer, numbers)
    config = build_config(stage, SFTConfig, setup.run.checkpoints, max_length=None, **_LABELLED)
    arguments = {**setup.arguments(config), "objective": task, "lm_coef": options.lm_coef}
    setup.trainer = Classifier(**arguments, data_collator=collator)
    setup.record["labels"], setup.is_reward = labels, True

    def answer_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Say of rows what they are taken for, how surely, and what they are."""
        texts = [(str(row.prompt), list(map(str, row.completions))) for row in rows]
        sequences = encode_tasks(setup.chat, task, texts, longest_sequence(stage))
        found = predict(setup.trainer.model, sequences, task, pad_id=setup.chat.tokenizer.pad_token_id)
        fields = []
        for row, (prompt, given), shares in zip(rows, texts, found, strict=True):
            best = int(torch.tensor(shares).argmax())
            if task == "multiple_choice":
                answer, reference = given[best], given[int(row.answer)]
            else:
                prompt, answer, reference = "\n".join(given), labels[best], name_label(stage, row)
            fields.append({"prompt": prompt, "answer": answer, "reference": reference, "probability": shares[best]})
        return fields

    setup.answer_rows = answer_rows
    return setup


run = partial(fit, build)
