"""What a push uploads and what it refuses, against a real server that speaks the hub's protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from hub_server import TOKEN, Hub, serve_hub
from written_runs import SECRET, WriteRun

from alignkit.errors import RunError
from alignkit.report.publish import pack, publish

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def run_alignkit(run_python: Run) -> Run:
    """A process of its own: the library of the hub reads its variables as it is imported."""
    return partial(run_python, "-m", "alignkit")


def push(run_alignkit: Run, run: Path, hub: Hub, *more: str, token: str = TOKEN) -> CompletedProcess[str]:
    return run_alignkit(
        "report", str(run), "--push", "me/demo", *more,
        HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url, HF_TOKEN=token, HF_HUB_DISABLE_XET="1", HF_HOME=str(run / "no-home"),
    )  # fmt: skip


def test_weights_and_card_arrive_in_one_commit_in_a_private_repository(
    write_run: WriteRun, run_alignkit: Run, hub: Hub
) -> None:
    run = write_run()
    (run / "model" / "critic").mkdir()
    (run / "model" / "critic" / "model.safetensors").write_bytes(b"critic")
    (run / "model" / "alignkit.json").write_text(
        json.dumps({"lineage": [{"role": "model", "path": "/home/ann/runs/demo/pretrain/model"}], "dtype": "float32"})
    )
    (run / "model" / "training_args.bin").write_bytes(b"pickle")
    done = push(run_alignkit, run, hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"pushed: {hub.url}/me/demo"
    assert "not uploaded: training_args.bin" in done.stderr
    assert (hub.created["name"], hub.created["organization"], hub.created["visibility"]) == ("demo", "me", "private")
    assert set(hub.files) == {
        "README.md", "alignkit.json", "chat_template.jinja", "config.json", "critic/model.safetensors",
        "model.safetensors",
    }  # fmt: skip
    assert hub.files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert hub.files["critic/model.safetensors"] == b"critic"
    assert json.loads(hub.files["alignkit.json"])["lineage"] == [{"role": "model", "path": "pretrain"}]
    assert 'from_pretrained("me/demo")' in hub.files["README.md"].decode()
    assert hub.summary.startswith("demo/sft, by alignkit")
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr + (run / "report.html").read_text()


def test_public_is_public_and_a_refusal_of_the_hub_is_one_line(
    write_run: WriteRun, run_alignkit: Run, hub: Hub
) -> None:
    run = write_run()
    assert push(run_alignkit, run, hub, "--public").returncode == 0
    assert hub.created["visibility"] == "public"
    hub.refuse = 403
    nowhere = Hub(url="http://127.0.0.1:9")
    for server, said in ((hub, r"the hub refused \(403: .*the right to write there\?$"),
                         (nowhere, r"the hub cannot be reached \(")):  # fmt: skip
        done = push(run_alignkit, run, server)
        assert done.returncode == 8
        assert re.match(f"error: me/demo: {said}", done.stderr.splitlines()[-1])


def test_without_token_or_network_nothing_is_tried(write_run: WriteRun, run_alignkit: Run, hub: Hub) -> None:
    run = write_run()
    done = push(run_alignkit, run, hub, token="")
    assert (done.returncode, "needs a token" in done.stderr) == (8, True)
    for arguments, code, said in (
        ((str(run), "--push", "me/demo"), 8, "HF_HUB_OFFLINE is set"),
        ((str(run.parent), "--push", "me/demo"), 2, "uploads the model of one run"),
        ((str(run), "--public"), 2, "--public has no effect without --push"),
    ):
        done = run_alignkit("report", *arguments)
        assert (done.returncode, said in done.stderr) == (code, True)
    assert hub.tokens == set()


def test_what_may_not_leave_is_refused_all_at_once(write_run: WriteRun) -> None:
    run = write_run()
    adapter = run / "model" / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": "/srv/models/llama"}))
    (run / "model" / "config.json").write_text(json.dumps({"note": SECRET}))
    with pytest.raises(RunError) as caught:
        pack(run, "no such name")
    name, base, secret = map(str, caught.value.problems)
    assert name.startswith("no such name is no repository name")
    assert re.search(r"belongs to a base on this machine \(llama\).*alignkit merge", base)
    assert secret.endswith("config.json: holds something that looks like a secret; take it out before pushing")
    adapter.write_text(json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}))
    (run / "model" / "config.json").write_text("{}")
    assert "adapter_config.json" in pack(run, "me/demo")[0]
    with pytest.raises(RunError) as caught:
        pack(write_run("dpo", finished=False), "no such name")
    assert len(caught.value.problems) == 2


def test_a_record_of_another_shape_is_refused_with_what_to_do(write_run: WriteRun) -> None:
    """Each value of result.json and stage.json in turn becomes a list: the page is drawn, or the run refused."""
    run = write_run()
    refused = 0
    for name in ("result.json", "stage.json"):
        path = run / name
        whole = path.read_text()
        for key in json.loads(whole):
            path.write_text(json.dumps(json.loads(whole) | {key: [1, None]}))
            try:
                publish(run)
            except RunError as error:
                refused += 1
                assert str(run) in str(error), key
        path.write_text(whole)
    assert refused
    publish(run)


RECIPE = """
name: pushed
model: {path: builtin:tiny-gpt2}
sft:
  data: {path: builtin:instructions, max_rows: 24}
  batch_size: 4
  save_steps: 1
  keep_checkpoints: 1
  samples: {num: 0}
  push_to: me/demo
  push_every: 2
"""


def test_a_run_pushes_its_checkpoints_and_its_model_and_survives_a_hub_that_is_gone(
    tmp_path: Path, run_alignkit: Run, hub: Hub
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    where = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}

    def train(name: str, **variables: str) -> CompletedProcess[str]:
        return run_alignkit("sft", str(recipe), "--out", str(tmp_path / name), **(where | variables))

    offline = train("offline", HF_HUB_OFFLINE="1")
    assert offline.returncode == 8 and "HF_HUB_OFFLINE is set, so nothing can be pushed" in offline.stderr
    done = train("run", HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert hub.created["visibility"] == "private"
    assert hub.commits[0][0].startswith("run at step 2, by alignkit") and len(hub.commits) >= 2
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.commits[0][1]
    assert not {name for name in hub.commits[0][1] if name.endswith((".pt", ".bin")) or "state" in name}
    assert "README.md" in hub.commits[-1][1]
    weights = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert hub.files["model.safetensors"] == weights and f"the model is pushed to {hub.url}/me/demo" in done.stderr
    hub.refuse = 403
    refused = train("refused", HF_HUB_OFFLINE="0")
    assert refused.returncode == 0 and (tmp_path / "refused/result.json").is_file()
    assert "checkpoint-2 could not be pushed: me/demo: the hub refused (403" in refused.stderr
