"""sft with objective: distill: the divergence, who teaches, context before it, and the student's own answers."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.errors import JudgeError, ModelError, UsageError
from alignkit.launch.run import launch_stage
from alignkit.models.frozen import load_causal
from alignkit.preflight.check import check_recipe
from alignkit.recipe import Stage, load_recipe, resolve
from alignkit.runs.directory import RunDir
from alignkit.train.sft import build, divergence, with_rest

ROWS = [{"prompt": f"{word} is", "completion": f" {word} and {word}."} for word in ("red", "blue", "green", "dark")]
TRAIN = "batch_size: 4, max_steps: 4, samples: {num: 0}, learning_rate: 0.01"
BIG = "{num_hidden_layers: 1, hidden_size: 32, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that the tests distil from, with the tokenizer of builtin:tiny-llama."""
    folder = tmp_path_factory.mktemp("teacher")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "recipe.yaml").write_text(
        f"name: t\nruns_dir: {folder}/runs\nmodel: {{path: builtin:tiny-llama, config: {BIG}}}\n"
        f"big: {{method: sft, data: {rows}, {TRAIN}}}\n"
    )
    stage = resolve(load_recipe(folder / "recipe.yaml"), "big")
    launch_stage(stage)
    return Path(stage.run_dir) / "model"


@pytest.fixture
def open_trainer(make_stage: Callable[..., Stage], write_rows: Callable[..., Path], tmp_path: Path) -> Callable:
    def make(model: str, keys: str, *overrides: str, rows: list[dict] = ROWS) -> Any:
        write_rows(rows)
        text = f"name: t\nmodel: {model}\nsft: {{objective: distill, data: rows.jsonl, {TRAIN}, {keys}}}\n"
        stage = make_stage(text, "sft", *overrides)
        run = RunDir(tmp_path / f"run{len(list(tmp_path.glob('run*')))}")
        run.path.mkdir()
        return build(stage, run).trainer

    return make


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_divergence_by_hand() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    mixed = [0.25 * a + 0.75 * b for a, b in zip(p, q, strict=True)]
    teacher, student = torch.tensor([p]).log(), torch.tensor([q]).log()
    for beta, expected in ((0.0, kl(p, q)), (1.0, kl(q, p)), (0.25, 0.25 * kl(p, mixed) + 0.75 * kl(q, mixed))):
        assert float(divergence(student, teacher, beta)) == pytest.approx(expected, rel=1e-6)
    # The two likeliest of four tokens, 0.5 and 0.3, and the rest; the student gives those 0.4 and 0.4.
    found = divergence(with_rest(torch.tensor([[0.4, 0.4]]).log()), with_rest(torch.tensor([[0.5, 0.3]]).log()), 0.0)
    by_hand = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4) + 0.2 * math.log(0.2 / 0.2)
    assert float(found) == pytest.approx(by_hand, rel=1e-5) and by_hand == pytest.approx(0.02526716, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("top_k", [None, 3])
def test_loss_is_the_mean_over_learnt_tokens(beta: float, top_k: int | None, teacher: Path, open_trainer: Any) -> None:
    keys = f"{{model: {teacher}, beta: {beta}, temperature: 2.0" + (f", top_k: {top_k}}}" if top_k else "}")
    trainer = open_trainer("{path: builtin:tiny-llama}", f"teacher: {keys}")
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        trainer.model.eval()
        loss = float(trainer.compute_loss(trainer.model, dict(batch)))
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        student, own = (
            (model(**inputs).logits[:, :-1] / 2).log_softmax(-1) for model in (trainer.model, trainer.teacher.model)
        )
    total, count = 0.0, 0
    for row, place in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        p, q = own[row, place].exp(), student[row, place].exp()
        if top_k:
            kept = p.topk(top_k).indices
            p, q = (torch.cat([each[kept], 1 - each[kept].sum()[None]]) for each in (p, q))
        p, q = p.double(), q.double()
        m = beta * p + (1 - beta) * q
        sums = {0.0: (p, q), 1.0: (q, p)}
        pairs = [(1.0, *sums[beta])] if beta in sums else [(beta, p, m), (1 - beta, q, m)]
        total += sum(float((w * a * (a / b).log()).sum()) for w, a, b in pairs)
        count += 1
    assert loss == pytest.approx(total / count, rel=2e-4) and loss > 1e-5


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher: Path, open_trainer: Any) -> None:
    plain = f"{{path: {teacher}}}"
    for keys in ("", ", top_k: 5", ", beta: 0.5"):
        trainer = open_trainer(plain, f"teacher: {{model: {teacher}{keys}}}")
        loss = trainer.compute_loss(trainer.model.eval(), dict(next(iter(trainer.get_train_dataloader()))))
        loss.backward()
        gradient = max(float(p.grad.abs().max()) for p in trainer.model.parameters() if p.grad is not None)
        assert abs(float(loss.detach())) < 1e-6 and gradient < 1e-6, keys
    # An adapter on the teacher's own weights: one base is held, and read with the adapter off.
    trainer = open_trainer(plain + "\nlora: {r: 2}", f"teacher: {teacher}", "sft.learning_rate=0.1")
    assert trainer.teacher.model is None
    batch = dict(next(iter(trainer.get_train_dataloader())))
    assert abs(float(trainer.compute_loss(trainer.model, dict(batch)).detach())) < 1e-6
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    moved = trainer.compute_loss(trainer.model, dict(batch))
    moved.backward()
    moved = moved.detach()
    assert float(moved) > 1e-4 and trainer.model.active_adapters == ["default"]
    other = load_causal(str(teacher)).model
    with torch.no_grad():
        places = batch["labels"][:, 1:] != -100
        own, theirs = (
            model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][places].log_softmax(-1)
            for model in (trainer.model.eval(), other)
        )
    assert float(moved) == pytest.approx(float(divergence(own, theirs, 0.0).mean()), rel=1e-4)


def test_context_is_read_by_the_teacher_alone(teacher: Path, open_trainer: Any) -> None:
    say = "teacher: {model: %s, context: 'Be kind. '}"
    chat = [{"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "red. blue."}]}]
    text = [{"text": "red is blue and green."}]
    for rows, keys, before, after in (
        (ROWS, "chat: false", "Be kind. red is", "red is"),
        (chat, "chat: true", "system\nBe kind. <|im_end|>", "Hi?"),
        (text, "chat: auto", "Be kind. red", "red"),
    ):
        model = "{path: builtin:tiny-llama, chat_template: chatml}"
        trainer = open_trainer(model, f"{say % teacher}, {keys}", "sft.batch_size=1", rows=rows)
        row, decode = trainer.train_dataset[0], trainer.processing_class.decode
        assert before in decode(row["teacher_input_ids"]) and "kind" not in decode(row["input_ids"])
        learnt = [[label for label in row[name][1:] if label != -100] for name in ("labels", "teacher_labels")]
        assert learnt[0] == learnt[1] and after in decode(row["input_ids"])
        batch = dict(next(iter(trainer.get_train_dataloader())))
        with torch.no_grad():
            loss = float(trainer.compute_loss(trainer.model.eval(), dict(batch)))
            logps = [
                each(batch[f"{side}input_ids"]).logits[:, :-1][batch[f"{side}labels"][:, 1:] != -100].log_softmax(-1)
                for side, each in (("", trainer.model), ("teacher_", trainer.teacher.model))
            ]
        assert loss == pytest.approx(float(divergence(*logps, 0.0).mean()), rel=1e-4) and loss > 1e-5


def test_own_answers_are_those_of_the_step(teacher: Path, open_trainer: Any) -> None:
    keys = f"teacher: {{model: {teacher}, on_policy: 1, max_new_tokens: 6, context: 'Be kind. '}}, chat: false"
    trainer = open_trainer("{path: builtin:tiny-llama}", keys, "sft.micro_batch_size=2")
    device = torch.device("cpu")
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, device)
    again, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, device)
    trainer.state.global_step = 1
    later, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, device)
    assert [b["input_ids"].tolist() for b in batches] == [b["input_ids"].tolist() for b in again]
    assert [b["input_ids"].tolist() for b in batches] != [b["input_ids"].tolist() for b in later]
    assert num_items == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        for side, start in (("", ""), ("teacher_", "Be kind. ")):
            texts = trainer.processing_class.batch_decode(batch[f"{side}input_ids"])
            assert all(any(f"{start}{row['prompt']}" in text for row in ROWS) for text in texts)
        answers = [[row[row != -100].tolist() for row in batch[f"{side}labels"]] for side in ("", "teacher_")]
        assert answers[0] == answers[1] and all(1 <= len(answer) <= 6 for answer in answers[0])


def test_a_stopped_run_goes_on_to_the_same_weights(
    teacher: Path, make_stage: Callable[..., Stage], write_rows: Callable[..., Path], resume_exactly: Callable
) -> None:
    write_rows(ROWS)
    recipe = (
        "name: t\nmodel: {path: builtin:tiny-llama}\nsft: {objective: distill, data: rows.jsonl, save_steps: 2, "
        f"{TRAIN}, teacher: {{model: {teacher}, on_policy: 0.5, max_new_tokens: 6}}}}\n"
    )
    run = RunDir(resume_exactly(make_stage(recipe, "sft")))
    assert "teacher_weights" in json.loads(run.stage.read_text())["fingerprint"]
    assert "taught by " in (run.path / "model" / "README.md").read_text()


class _Vllm(BaseHTTPRequestHandler):
    """A teacher behind vLLM's protocol: a real model, its likeliest tokens of every place of a prompt."""

    model: Any = None
    tokenizer: Any = None
    knows = True

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice: dict[str, Any] = {"text": "", "finish_reason": "length"}
        if self.knows:
            ids, num = asked["prompt"], asked["prompt_logprobs"]
            with torch.no_grad():
                logps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            places: list[Any] = [None]
            for place, token in enumerate(ids[1:]):
                kept = dict.fromkeys([*logps[place].topk(num).indices.tolist(), token])
                places.append({
                    str(each): {"logprob": float(logps[place, each]), "decoded_token": self.tokenizer.decode([each])}
                    for each in kept
                })  # fmt: skip
            choice["prompt_logprobs"] = places
        body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_server_teaches_as_the_model_behind_it(teacher: Path, open_trainer: Any) -> None:
    loaded = load_causal(str(teacher))
    handler = type("Handler", (_Vllm,), {"model": loaded.model, "tokenizer": loaded.tokenizer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"url: 'http://127.0.0.1:{server.server_address[1]}/v1', name: big, retries: 0"
        trainers = [
            open_trainer("{path: builtin:tiny-llama}", f"teacher: {{{source}, top_k: 4}}")
            for source in (url, f"model: {teacher}")
        ]
        batch = next(iter(trainers[0].get_train_dataloader()))
        losses = [float(trainer.compute_loss(trainer.model.eval(), dict(batch)).detach()) for trainer in trainers]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        handler.tokenizer = type("Other", (), {"decode": lambda self, ids: f"<{ids[0]}>"})()
        with pytest.raises(ModelError, match="has another vocabulary than the student: its token"):
            open_trainer("{path: builtin:tiny-llama}", f"teacher: {{{url}, top_k: 4}}")
        handler.knows = False
        with pytest.raises(JudgeError, match=r"gives no 4 log-probabilities of each token of a prompt"):
            open_trainer("{path: builtin:tiny-llama}", f"teacher: {{{url}, top_k: 4}}")
        server.shutdown()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("objective: distill", "sft.objective is distill, which needs a teacher"),
        ("teacher: m/n", "sft.teacher has no effect without objective: distill"),
        ("objective: distill, packing: true, teacher: m/n", "sft.packing has no effect with objective: distill"),
        ("objective: distill, teacher: {url: 'http://h/v1', name: m}", "sft.teacher has a url without top_k"),
        ("objective: distill, teacher: {model: m/n, url: 'http://h/v1'}", "needs exactly one of model and url"),
        ("objective: distill, teacher: {model: m/n, max_new_tokens: 4}", "has no effect without on_policy"),
        ("objective: distill, teacher: {model: m/n, engine: vllm}", "sft.teacher.engine has no effect on a teacher"),
        ("objective: distill, teacher: sft", "sft.teacher is sft, the stage itself"),
    ],
)
def test_what_a_recipe_may_not_say(keys: str, said: str, make_stage: Callable[..., Stage]) -> None:
    with pytest.raises(UsageError) as error:
        make_stage(f"model: {{path: builtin:tiny-llama}}\nsft: {{data: builtin:reviews, {keys}}}\n", "sft")
    assert said in str(error.value)


def test_a_teacher_with_other_tokens_is_refused_before_anything_is_trained(
    teacher: Path, make_stage: Callable[..., Stage], tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    first, second = sorted(word for word, number in words.items() if number in (300, 301))
    words[first], words[second] = words[second], words[first]  # two tokens with each other's numbers
    file.write_text(json.dumps(tokenizer))
    text = f"name: t\nmodel: {{path: builtin:tiny-llama}}\nsft: {{objective: distill, data: builtin:reviews, {TRAIN}, "
    stage = make_stage(f"{text}teacher: {tmp_path}/other}}\n", "sft")
    numbers = f"2 tokens differ, first {first!r}: number {words[first]} in the teacher, {words[second]} in the student"
    with pytest.raises(ModelError, match=re.escape(f"has another vocabulary than the student: {numbers}")):
        launch_stage(stage)
    assert not list(Path(stage.run_dir).glob("checkpoints/*"))
    (check,) = check_recipe(load_recipe(Path("recipe.yaml"))).stages
    assert [problem.where for problem in check.problems] == ["recipe.yaml:3"] and numbers in str(check.problems[0])


def test_check_compares_vocabularies(teacher: Path, make_stage: Callable[..., Stage], write_rows: Callable) -> None:
    write_rows(ROWS)
    text = "name: t\nmodel: {path: %s}\nsft: {objective: distill, data: rows.jsonl, teacher: %s}\n"
    make_stage(text % ("builtin:tiny-gpt2", teacher), "sft")
    (check,) = check_recipe(load_recipe(Path("recipe.yaml"))).stages
    assert check.facts["teacher"] == str(teacher)
    same = not check.problems  # the built-in models may share a tokenizer
    assert same or "has another vocabulary than the student" in str(check.problems[0])
