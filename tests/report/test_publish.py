"""What a push uploads and what it refuses, against a real server that speaks the hub's protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from hub_server import TOKEN, Hub, serve_hub
from written_runs import SECRET, WriteRun

from alignkit.errors import RunError
from alignkit.report.card import pack
from alignkit.report.publish import publish

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


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


def test_public_is_public(write_run: WriteRun, run_alignkit: Run, hub: Hub) -> None:
    assert push(run_alignkit, write_run(), hub, "--public").returncode == 0
    assert hub.created["visibility"] == "public"


def test_refusal_of_the_hub_is_one_line(write_run: WriteRun, run_alignkit: Run, hub: Hub) -> None:
    hub.refuse = 403
    done = push(run_alignkit, write_run(), hub)
    assert done.returncode == 8
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: me/demo: the hub refused (403: ") and error.endswith("the right to write there?")


def test_a_hub_that_is_not_there_is_one_line(write_run: WriteRun, run_alignkit: Run) -> None:
    done = push(run_alignkit, write_run(), Hub(url="http://127.0.0.1:9"))
    assert done.returncode == 8
    assert done.stderr.splitlines()[-1].startswith("error: me/demo: the hub cannot be reached (")


def test_without_token_or_network_nothing_is_tried(write_run: WriteRun, run_alignkit: Run, hub: Hub) -> None:
    run = write_run()
    done = push(run_alignkit, run, hub, token="")
    assert (done.returncode, "needs a token" in done.stderr) == (8, True)
    done = run_alignkit("report", str(run), "--push", "me/demo")
    assert (done.returncode, "HF_HUB_OFFLINE is set" in done.stderr) == (8, True)
    assert hub.tokens == set()


def test_an_adapter_of_a_local_base_is_refused(write_run: WriteRun) -> None:
    run = write_run()
    (run / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/srv/models/llama"}))
    with pytest.raises(RunError, match=r"belongs to a base on this machine \(llama\).*alignkit merge"):
        pack(run, "me/demo")
    (run / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "meta-llama/Llama-3.2-1B"})
    )
    assert "adapter_config.json" in pack(run, "me/demo")[0]


def test_a_secret_in_a_configuration_is_refused(write_run: WriteRun) -> None:
    run = write_run()
    (run / "model" / "config.json").write_text(json.dumps({"note": SECRET}))
    with pytest.raises(RunError, match=r"config\.json: holds something that looks like a secret"):
        pack(run, "me/demo")


def test_an_unfinished_run_and_a_bad_name_are_refused_together(write_run: WriteRun) -> None:
    with pytest.raises(RunError) as caught:
        pack(write_run(finished=False), "no such name")
    assert len(caught.value.problems) == 2


def test_only_a_run_can_be_pushed(write_run: WriteRun, run_alignkit: Run) -> None:
    run = write_run()
    done = run_alignkit("report", str(run.parent), "--push", "me/demo")
    assert (done.returncode, "uploads the model of one run" in done.stderr) == (2, True)
    done = run_alignkit("report", str(run), "--public")
    assert (done.returncode, "--public has no effect without --push" in done.stderr) == (2, True)


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
