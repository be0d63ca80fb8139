"""sft with objective: seq2seq: encoder-decoder models of transformers and our own, from rows to answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MarianConfig, T5Config

from alignkit.chat import Settings, Speaker
from alignkit.data import DataReport, Rejects, read_rows
from alignkit.errors import AlignKitError
from alignkit.evaluate.run import evaluate
from alignkit.launch.run import launch_stage
from alignkit.models.frozen import load_causal
from alignkit.preflight.check import preview_stage
from alignkit.recipe import Stage
from alignkit.recipe.schema import DataSource, EvaluateOptions
from alignkit.runs.directory import RunDir
from alignkit.train.sft import build

SMALL = "{hidden_size: 16, embedding_size: 12, alignment_size: 16, maxout_size: 8}"
RNN = f"name: t\nmodel: {{path: builtin:rnnsearch, config: {SMALL}}}\n"
TRAIN = "batch_size: 8, max_steps: 4, samples: {num: 2, max_new_tokens: 6}"
SFT = f"sft: {{objective: seq2seq, data: builtin:translation?rows=48, {TRAIN}}}\n"


def write_configs(folder: Path) -> None:
    T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64, dropout_rate=0.0
             ).save_pretrained(folder / "t5")  # fmt: skip
    MarianConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, max_position_embeddings=64, dropout=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    ).save_pretrained(folder / "marian")  # fmt: skip


@pytest.mark.parametrize(
    "model", [f"builtin:rnnencdec, config: {SMALL}", "t5, init: scratch, tokenizer: builtin:words",
              "marian, init: scratch, tokenizer: builtin:bpe"])  # fmt: skip
def test_every_encoder_decoder_learns_the_mean_over_the_target_tokens_of_a_step(
    model: str, make_stage: Callable[..., Stage], tmp_path: Path
) -> None:
    write_configs(tmp_path)
    text, trainers = f"name: t\nmodel: {{path: {model}}}\n{SFT}", []
    for size in (8, 2):
        run = RunDir(tmp_path / f"run{size}")
        run.path.mkdir()
        trainers.append(build(make_stage(text, "sft", f"sft.micro_batch_size={size}"), run).trainer)
    trainer = trainers[0]
    batch = next(iter(trainer.get_train_dataloader()))
    kept, trained = batch["labels"] != -100, trainer.model.eval()
    start = torch.full_like(batch["labels"][:, :1], trained.config.decoder_start_token_id)
    shifted = torch.cat([start, batch["labels"][:, :-1].clamp(min=0)], dim=1)
    with torch.no_grad():
        logits = trained(batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=shifted).logits
        loss = trainer.compute_loss(trained, dict(batch))
    logps = logits.log_softmax(-1)[kept].gather(1, batch["labels"][kept][:, None])
    assert float(loss) == pytest.approx(float(-logps.mean()), rel=1e-5)
    right = float((logits.argmax(-1) == batch["labels"])[kept].float().mean())
    assert trainer._metrics["eval"]["mean_token_accuracy"] == [pytest.approx(right)]
    trainer._metrics["eval"].clear()
    losses = []
    for each in trainers:  # the loss of a step is the same however it is cut into forward passes
        each.model.train()
        steps = iter(each.get_train_dataloader())
        batches = [next(steps) for _ in range(8 // each.args.train_batch_size)]
        count = each._get_num_items_in_batch(batches, torch.device("cpu"))
        with torch.no_grad():
            found = [each.compute_loss(each.model, dict(one), num_items_in_batch=count) for one in batches]
        losses.append(float(sum(found)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_is_sampled_shown_measured_and_talked_to(make_stage: Callable[..., Stage], tmp_path: Path) -> None:
    stage = make_stage(RNN + SFT, "sft")
    launch_stage(stage)
    run = RunDir(Path(stage.run_dir))
    last = json.loads(run.samples.read_text().splitlines()[-1])
    drawn = last["alignment"]
    assert (last["when"], drawn["source"]) == ("after", [*last["prompt"].split(), "</s>"])
    assert [round(sum(row), 5) for row in drawn["weights"]] == [1.0] * len(drawn["target"])
    page = (run.path / "report.html").read_text()
    assert page.count('aria-label="alignment of the answer with its source"') == 2
    assert f"{drawn['source'][0]} / {drawn['target'][0]}: {drawn['weights'][0][0]:.2f}" in page

    options = EvaluateOptions(metrics=["perplexity", "overlap"], max_rows=20, num_beams=3, max_new_tokens=8)
    figures = {(each["metric"], each["slice"]): each for each in evaluate(stage.run_dir, options)["results"]}
    bins = [each for each in figures if each[0] == "bleu" and each[1]]
    assert sum(figures[each]["n"] for each in bins) == 20 and len(bins) > 1
    assert figures["bleu", None]["settings"]["num_beams"] == 3
    speaker = Speaker("t", load_causal(stage.run_dir, encoder_decoder=True))
    for text in ("il lupa vede il pane .", "il casu ama il pane ."):
        speaker.say(text)
        answer = "".join(speaker.answer(Settings(temperature=0.0, max_new_tokens=5), None))
        assert [message["content"] for message in speaker.messages] == [text, answer]

    rows = preview_stage(stage, num_rows=1)["rows"][0]["sequences"]
    kinds = [(side["label"], [span["kind"] for span in side["spans"]]) for side in rows]
    assert kinds == [("source", ["read"]), ("target", ["learnt"])]
    assert rows[1]["spans"][0]["tokens"][-1].strip() == "</s>"


def test_parallel_files_are_rows(make_stage: Callable[..., Stage], tmp_path: Path) -> None:
    (tmp_path / "a.es").write_text("uno\ndos\n")
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "b.en").write_text("one\ntwo\nthree\n")
    (tmp_path / "c.en").write_text("one\n\n")

    def read(target: str) -> list[tuple[str, str, str]]:
        stage = make_stage(f"{RNN}sft: {{objective: seq2seq, data: {{path: a.es, target: {target}}}, {TRAIN}}}", "sft")
        found = read_rows(stage, stage.options.data, report=DataReport(), rejects=Rejects(), template=False)
        return [(row.prompt, row.completions[0], row.place) for row in found]

    assert read("a.en") == [("uno", "one", "a.es:1"), ("dos", "two", "a.es:2")]
    for target, said in (
        ("b.en", "b.en:3: has no counterpart in a.es, which ends before"),
        ("c.en", "a.es:2: completion: is empty"),
        ("d.en", "d.en: no such file (data.target)"),
    ):
        with pytest.raises(AlignKitError) as error:
            read(target)
        assert said in str(error.value)
    with pytest.raises(AlignKitError, match="is no text file, and data.target needs one"):
        list(read_rows(make_stage(RNN + SFT, "sft"), [DataSource(path="builtin:translation", target="a.en")],
                       report=DataReport(), rejects=Rejects()))  # fmt: skip
    for name, said in (("x.es", "x.es: there is no such file here, and data.target needs one"),
                       (str(tmp_path / "a.ess"), "a.ess: no such file; did you mean a.es?")):  # fmt: skip
        with pytest.raises(AlignKitError, match=said):
            list(read_rows(make_stage(RNN + SFT, "sft"), [DataSource(path=name, target="a.en")],
                           report=DataReport(), rejects=Rejects()))  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (f"name: t\nmodel: {{path: builtin:tiny-llama}}\n{SFT}",
         "recipe.yaml:3: objective: seq2seq trains an encoder-decoder model, and builtin:tiny-llama (llama) is a "
         "decoder alone; take one such as T5, Marian or builtin:rnnsearch, or leave the objective out"),
        (f"{RNN}sft: {{data: builtin:translation, {TRAIN}}}",
         "builtin:rnnsearch (rnnsearch) is an encoder-decoder model, which only sft with objective: seq2seq trains; "
         "set that, or take a decoder-only model"),
        (f"{RNN}dpo: {{data: builtin:preferences, {TRAIN}}}", "which only sft with objective: seq2seq trains"),
        (f"{RNN}sft: {{objective: seq2seq, data: builtin:reviews, {TRAIN}}}",
         "objective: seq2seq reads a prompt and writes its completion; this row has none"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_a_line(recipe: str, said: str, make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(recipe, "dpo" if "\ndpo" in recipe else "sft")
    with pytest.raises(AlignKitError) as error:
        launch_stage(stage)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (SFT.replace("}}\n", "}, packing: true}\n"),
         "sft.packing has no effect with objective: seq2seq, where the decoder "
         "learns the completion and reads the prompt as text"),
        (SFT.replace("builtin:translation?rows=48", "{path: builtin:translation, separator: x}"),
         "sft.data has a separator, which nothing reads with objective: seq2seq; take it out"),
        (SFT + "evaluate: {num_beams: 2, metrics: [kl]}",
         "evaluate.num_beams has no effect without the metric overlap, which alone searches with beams"),
        (SFT + "evaluate: {num_beams: 2, generation: {engine: continuous}}",
         "evaluate.num_beams cannot be searched by generation.engine: continuous; use transformers"),
    ],
)  # fmt: skip
def test_keys_without_effect_are_refused(recipe: str, said: str, make_stage: Callable[..., Stage]) -> None:
    with pytest.raises(AlignKitError) as error:
        make_stage(RNN + recipe, "sft")
    assert said in str(error.value)


def test_learnt_tokenizers_are_for_random_weights(make_stage: Callable[..., Stage]) -> None:
    for tokenizer, said in (
        ("builtin:words", "is learnt from the rows, and pretrained weights do not know it; set init: scratch"),
        ("builtin:wrods", "is builtin:wrods; it must be builtin:words or builtin:bpe, or a directory"),
    ):
        with pytest.raises(AlignKitError) as error:
            make_stage(f"name: t\nmodel: {{path: x/y, tokenizer: {tokenizer}}}\n{SFT}", "sft")
        assert said in str(error.value)
