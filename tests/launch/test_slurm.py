"""The batch script: what it asks for, that nothing in it can run by itself, and what its body does with every ending.

`srun`, `scontrol`, `squeue` and `sbatch` are small programs of this test that record their arguments; the cluster
test beside this one uses Slurm's own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from alignkit.errors import AlignKitError, DataError, EnvironmentProblem, RecipeError, RunError
from alignkit.launch.job import build_script, quote, read_time, write_jobs
from alignkit.launch.placement import Command
from alignkit.recipe import load_recipe, resolve
from alignkit.runs.directory import open_run, refuse_foreign

MODEL = "model: {path: builtin:tiny-llama}\n"
STAGES = """\
sft: {data: builtin:instructions}
rm: {start_from: sft, data: builtin:preferences}
dpo: {start_from: sft, data: builtin:preferences}
"""

# Like srun it hands a signal to every process of the step; unlike srun it runs $TASK in place of alignkit.
SRUN = """\
printf '%s\\n' "$@" >"$RECORD/srun"
while [[ $1 == --* ]]; do shift; done
setsid "$1" "$2" "$3" "$4" bash "$TASK" & step=$!
trap 'kill -USR1 -- -$step' USR1
while :; do wait $step; code=$?; kill -0 $step 2>/dev/null || break; done
wait $step; exit $?
"""
FAKES = {
    "srun": SRUN,
    "squeue": 'echo "$STATE"\n',
    # Slurm ends the script of a job that is requeued.
    "scontrol": 'if [[ $1 == show ]]; then printf "n7\\nn8\\n"; exit; fi\n'
    'echo "$@" >>"$RECORD/scontrol"; (sleep 0.2; kill -TERM $PPID) &\n',
    "sbatch": 'echo "$@" >>"$RECORD/sbatch"; echo $((100 + $(wc -l <"$RECORD/sbatch")))\n',
}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory jobs are submitted from, outside any Slurm job."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in Slurm's place, first on PATH; returns the directory of their records."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path))
    return tmp_path


def job(launch: str = "{}", *overrides: str, name: str = "sft", out: Path | None = None) -> Command:
    """Write a recipe with this launch section and return the command of a stage of it."""
    Path("r.yaml").write_text(f"{MODEL}launch: {launch}\n{STAGES}")
    return Command(resolve(load_recipe("r.yaml", overrides=overrides), name, out=out), overrides, out=out)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_the_script_asks_for_what_the_recipe_says(directory: Path) -> None:
    slurm = "{partition: a100, account: nlp, qos: high, time: '24:00:00', memory: 480G, constraint: 'a|b', "
    slurm += "cpus_per_process: 12, signal_seconds: 300, options: {nodelist: 'n[1-4]'}}"
    launch = f"{{nodes: 4, processes: 8, strategy: fsdp, slurm: {slurm}}}"
    with pytest.raises(RecipeError, match="which 32 processes cannot divide"):
        build_script(job(launch))
    script = build_script(job(launch, "sft.batch_size=64"))
    assert directives(script) == [
        "job-name=r-sft",
        "nodes=4",
        "ntasks-per-node=1",
        "cpus-per-task=96",
        "gpus-per-node=8",
        "mem=480G",
        "time=24:00:00",
        "partition=a100",
        "account=nlp",
        "qos=high",
        'constraint="a|b"',
        'nodelist="n[1-4]"',
        f"output={directory}/runs/r/sft/launch/slurm-%j.log",
        "open-mode=append",
        "requeue",
        "signal=B:USR1@300",
    ]
    assert "MASTER_ADDR=$(scontrol show hostnames" in script
    assert "--cpus-per-task=96 bash" in script  # since 22.05 srun does not take it over from sbatch


def test_cores_and_gpus_are_those_of_the_processes() -> None:
    script = build_script(job("{device: cpu}"))
    assert "cpus-per-task=8" in directives(script)
    assert not [line for line in directives(script) if line.startswith(("gpus", "mem", "time", "partition"))]
    assert "scontrol show hostnames" not in script  # one node needs no meeting place
    for launch, expected in (
        ("{processes: 4}", {"gpus-per-node=4"}),
        ("{processes: 4, slurm: {gpus_per_node: 8}}", {"gpus-per-node=8"}),
        ("{processes: auto, slurm: {gpus_per_node: 8, cpus_per_process: 4}}", {"gpus-per-node=8", "cpus-per-task=32"}),
        ("{slurm: {time: '3:01'}}", {"time=3:01"}),
        ("{slurm: {time: '0'}}", {"time=0"}),
    ):
        assert expected <= set(directives(build_script(job(launch))))


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ("{processes: 4, slurm: {gpus_per_node: 2}}",
         r"^r\.yaml:2: .*gpus_per_node is 2, but launch\.processes is 4, one a GPU; make them equal"),
        ("{processes: auto}", r"^r\.yaml:2: launch\.processes is auto, .* launch\.slurm\.gpus_per_node$"),
        ("{slurm: {time: '3:00'}}", r"^r\.yaml:2: launch\.slurm\.time is 3:00, and launch\.slurm\.signal_sec"),
    ],
)  # fmt: skip
def test_what_slurm_could_not_honour_is_refused(launch: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build_script(job(launch))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:05", 7205), ("1-0", 86400), ("1-2:30", 95400), ("1-0:0:1", 86401), ("0", 0)],
)
def test_time_is_read_as_sbatch_reads_it(text: str, seconds: int) -> None:
    assert read_time(text) == seconds


HOSTILE_VALUES = [
    ("partition", "a; touch canary"), ("partition", "a\n#SBATCH --wrap=id"), ("partition", "a\n"), ("account", "$(id)"),
    ("qos", "`id`"), ("constraint", "a'b"), ("constraint", "a b"), ("time", "1:00\n"), ("memory", "1G\nid"),
    ("options", {"wrap": "id"}), ("options", {"export": "ALL,LD_PRELOAD=/tmp/a.so"}), ("options", {"output": "/etc/x"}),
    ("options", {"comment\nid": "x"}), ("options", {"nodelist": "n1 --wrap=id"}), ("options", {"chdir": "/tmp"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), HOSTILE_VALUES, ids=lambda value: repr(value)[:24])
def test_a_recipe_cannot_put_anything_else_into_the_script(key: str, value: object) -> None:
    recipe = f"{MODEL}launch: {{slurm: {{{key}: {json.dumps(value)}}}}}\n{STAGES}"
    Path("r.yaml").write_text(recipe)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    message = str(caught.value)
    assert message.startswith((f"r.yaml:2: launch.slurm.{key}", f'r.yaml:2: "launch.slurm.{key}'))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("value", "written"),
    [("a.b-c/%%u", "=a.b-c/%%u"), ("a b", '="a b"'), ("a\"b'c\\d e", '="a"\\""b"\\\'"c"\\\\"d e"'), ("", "")],
)
def test_directives_are_quoted_for_sbatch(value: str, written: str) -> None:
    assert quote(value) == written


def test_a_path_with_a_newline_cannot_stand_in_a_script(directory: Path) -> None:
    with pytest.raises(RunError, match="choose another directory with --out"):
        build_script(job(out=directory / "a\nb"))


def test_a_written_script_is_no_foreign_file_and_no_started_run(directory: Path) -> None:
    written = write_jobs([job()], submit=True, dry_run=True)[0]
    assert written["script"].startswith("#!/bin/bash\n#SBATCH") and os.listdir(directory) == ["r.yaml"]
    assert write_jobs([job()], submit=False, dry_run=False)[0] == written
    run = directory / "runs/r/sft"
    assert written["path"] == str(run / "launch/job.sbatch") and Path(written["path"]).read_text() == written["script"]
    refuse_foreign(run)
    opened, lock = open_run(run, force=True)  # nothing to move aside: nothing was started
    lock.close()
    assert not opened.stage.exists() and (run / "launch/job.sbatch").exists()
    (directory / "mine").mkdir()
    (directory / "mine/thesis.tex").write_text("")
    with pytest.raises(RunError, match="holds no run"):
        write_jobs([job(out=directory / "mine")], submit=False, dry_run=False)
    assert os.listdir(directory / "mine") == ["thesis.tex"]


def test_force_moves_the_old_run_aside_now(directory: Path) -> None:
    (directory / "runs/r/sft").mkdir(parents=True)
    (directory / "runs/r/sft/stage.json").write_text("{}")
    write_jobs([job()], submit=False, dry_run=False, force=True)
    assert not (directory / "runs/r/sft/stage.json").exists()
    assert len(list((directory / "runs/r").glob("sft.old-*/stage.json"))) == 1


def test_stages_of_a_chain_wait_for_the_one_they_start_from(fakes: Path, directory: Path) -> None:
    chain = [job(name=name) for name in ("sft", "rm", "dpo")]
    written = write_jobs(chain, submit=True, dry_run=False)
    assert [(job["stage"], job["job_id"], job["depends_on"]) for job in written] == [
        ("sft", "101", []), ("rm", "102", ["sft"]), ("dpo", "103", ["sft"]),
    ]  # fmt: skip
    run = directory / "runs/r"
    assert (fakes / "sbatch").read_text().splitlines() == [
        f"--parsable {run}/sft/launch/job.sbatch",
        f"--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {run}/rm/launch/job.sbatch",
        f"--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {run}/dpo/launch/job.sbatch",
    ]


def test_a_stage_whose_start_is_not_trained_is_not_submitted_alone(fakes: Path) -> None:
    with pytest.raises(RunError, match=r"^r\.yaml:5: dpo starts from sft, which has not been trained"):
        write_jobs([job(name="dpo")], submit=True, dry_run=False)
    assert not (fakes / "sbatch").exists()
    write_jobs([job(name="dpo")], submit=False, dry_run=False)


@pytest.mark.parametrize("submit", [True, False])
def test_what_can_be_checked_is_checked_before_a_job_waits_in_a_queue(fakes: Path, submit: bool) -> None:
    with pytest.raises(DataError, match=r"sft\.data: absent\.jsonl: no such file"):
        write_jobs([job("{}", "sft.data=./absent.jsonl")], submit=submit, dry_run=False)
    assert not (fakes / "sbatch").exists() and not Path("runs").exists()


def test_without_sbatch_submit_says_so_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("PATH", str(directory))
    with pytest.raises(EnvironmentProblem, match="^sbatch is not on PATH here; submit on a machine of the cluster"):
        write_jobs([job()], submit=True, dry_run=False)
    assert not (directory / "runs").exists()


def test_what_sbatch_refuses_is_said_with_what_was_submitted_before(fakes: Path) -> None:
    refuse = '#!/bin/bash\n[[ $* == *rm/* ]] && { echo "sbatch: error: invalid account" >&2; exit 1; }; echo 5\n'
    (fakes / "bin/sbatch").write_text(refuse)
    with pytest.raises(EnvironmentProblem) as caught:
        write_jobs([job(name="sft"), job(name="rm")], submit=True, dry_run=False)
    assert str(caught.value).endswith("job.sbatch: sbatch: error: invalid account; sft is submitted as job 5")


def test_the_printed_commands_can_be_given_to_a_shell(run_alignkit: Callable, fakes: Path, directory: Path) -> None:
    job()
    shutil.copy("r.yaml", fakes)
    shown = run_alignkit("run", "-r", "r.yaml", "--slurm", PATH=os.environ["PATH"])
    assert shown.returncode == 0, shown.stderr
    subprocess.run(["bash", "-eu", "-c", shown.stdout], check=True, cwd=fakes)
    dependencies = [line.split()[1] for line in (fakes / "sbatch").read_text().splitlines()[1:]]
    assert dependencies == ["--dependency=afterok:101", "--dependency=afterok:101"]
    assert run_alignkit("run", "-r", "r.yaml", "--slurm", "--retries", "1").stderr == (
        "error: --retries: a Slurm job requeues itself; set launch.slurm.max_requeues\n"
    )


@dataclass
class Ended:
    code: int
    stderr: str
    requeued: bool


class Body:
    """A batch script as Slurm would run it, with a task in alignkit's place."""

    def __init__(self, record: Path, script: Path, *, state: str = "RUNNING", sitting: int = 0) -> None:
        self.record = record
        restarts = {"SLURM_RESTART_COUNT": str(sitting)} if sitting else {}
        self.process = subprocess.Popen(
            ["bash", str(script)],
            env={**os.environ, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[7-8]", "STATE": state, **restarts}
            | {"TASK": str(record / "task"), "RANK": "5"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def send(self, number: int) -> Body:
        """Send a signal to the batch shell alone, once the task listens."""
        until = time.monotonic() + 20
        while not (self.record / "ready").exists():
            assert time.monotonic() < until and self.process.poll() is None
            time.sleep(0.02)
        self.process.send_signal(number)
        return self

    def end(self) -> Ended:
        self.process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what is left of the step, as Slurm does
        _, stderr = self.process.communicate()
        calls = self.record / "scontrol"
        if not calls.exists():
            return Ended(self.process.returncode, stderr, False)
        assert calls.read_text() == "requeue 77\n" and self.process.returncode == -signal.SIGTERM
        said = re.search(r"alignkit: ended with code (\d+); requeued, the next sitting", stderr)
        assert said, stderr
        return Ended(int(said[1]), stderr, True)


@pytest.fixture
def start(fakes: Path) -> Callable[..., Body]:
    """Return a function that writes a task and the script of a one-node job, and starts the script."""

    def start(task: str, *, state: str = "RUNNING", sitting: int = 0, launch: str = "{device: cpu}") -> Body:
        script = Path(write_jobs([job(launch)], submit=False, dry_run=False)[0]["path"])
        subprocess.run(["bash", "-n", str(script)], check=True)
        (fakes / "task").write_text(f"RUN={script.parents[1]}\n{task}\n")
        return Body(fakes, script, state=state, sitting=sitting)

    return start


SAVES = "mkdir -p $RUN/checkpoints/checkpoint-3; touch $RUN/checkpoints/checkpoint-3/alignkit_manifest.json; "


@pytest.mark.parametrize(
    ("task", "state", "sitting", "code", "requeued"),
    [
        *((f"exit {code}", "RUNNING", 0, code, False) for code in (0, 1, 2, 3, 4, 5, 130)),
        ("exit 143", "RUNNING", 0, 143, True),  # preempted: the processes had SIGTERM from Slurm
        ("exit 143", "CANCELLED", 0, 143, False),  # scancel is final
        ("exit 143", "", 0, 143, False),
        ("kill -USR1 $$", "RUNNING", 0, 138, True),
        ("exit 143", "RUNNING", 19, 143, True),
        ("exit 143", "RUNNING", 20, 143, False),
        ("exit 6", "RUNNING", 0, 6, True),
        ("exit 6", "RUNNING", 1, 6, False),  # died twice without a new checkpoint
        (f"{SAVES} exit 6", "RUNNING", 1, 6, True),
        ("kill -KILL $$", "RUNNING", 0, 137, True),
        ("kill -KILL $$", "RUNNING", 5, 137, False),
    ],
)
def test_only_endings_that_resuming_helps_are_requeued(
    task: str, state: str, sitting: int, code: int, requeued: bool, start: Callable[..., Body]
) -> None:
    ended = start(task, state=state, sitting=sitting).end()
    assert (ended.code, ended.requeued) == (code, requeued), ended.stderr
    assert ("(launch.slurm.max_requeues)" in ended.stderr) == (sitting == 20)


LISTENS = "trap 'echo got >>$RECORD/got; sleep 0.3; exit 143' USR1; touch $RECORD/ready; while :; do sleep 0.1; done"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_task_once_and_the_job_is_requeued(number: int, start: Callable, fakes: Path) -> None:
    ended = start(LISTENS).send(number).end()
    assert (ended.code, ended.requeued) == (143, True), ended.stderr
    assert (fakes / "got").read_text() == "got\n"


def test_a_crash_after_usr1_is_requeued_even_without_progress(start: Callable[..., Body]) -> None:
    task = LISTENS.replace("exit 143", "exit 6")
    assert start(task, sitting=3).send(signal.SIGUSR1).end().requeued


def test_term_from_a_cancelled_job_is_not_passed_on_twice(start: Callable[..., Body], fakes: Path) -> None:
    body = start(f"(sleep 1; kill -USR1 $$) & {LISTENS}", state="CANCELLED").send(signal.SIGTERM)
    time.sleep(0.5)
    assert not (fakes / "got").exists()
    ended = body.end()
    assert (ended.code, ended.requeued) == (143, False)


def test_the_first_node_to_fail_tells_the_code(start: Callable[..., Body], fakes: Path) -> None:
    """srun ends with the highest code: node 0 finds a mistake, and node 1 is terminated because of that."""
    srun = 'while [[ $1 == --* ]]; do shift; done\nNODE=0 "$1" "$2" "$3" "$4" bash "$TASK"\n'
    (fakes / "bin/srun").write_text(f'#!/bin/bash\n{srun}NODE=1 "$1" "$2" "$3" "$4" bash "$TASK"; exit 143\n')
    ended = start("[ $NODE = 0 ] && exit 2; exit 143", launch="{device: cpu, nodes: 2}").end()
    assert (ended.code, ended.requeued) == (2, False)
    assert not list(Path("runs/r/sft/launch").glob("ended-*"))


def test_several_nodes_meet_at_the_first_and_foreign_ranks_are_forgotten(start: Callable, fakes: Path) -> None:
    task = 'echo "$MASTER_ADDR $MASTER_PORT ${RANK:-none} $PWD" >$RECORD/seen'
    assert start(task, launch="{device: cpu, nodes: 2}").end().code == 0
    assert (fakes / "seen").read_text() == f"n7 12077 none {Path.cwd()}\n"


@pytest.mark.parametrize(
    "name", ["a b", "a'b", 'a"b', "$(touch canary)", "a`touch canary`", "a;touch canary", "a%u\\n"]
)
def test_a_hostile_directory_stays_a_directory(name: str, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(name).mkdir()
    monkeypatch.chdir(name)
    command = job("{device: cpu}", f"sft.run_name={name}", out=Path.cwd() / name)
    try:
        script = Path(write_jobs([command], submit=False, dry_run=False)[0]["path"])
    except AlignKitError as error:
        pytest.fail(str(error))
    subprocess.run(["bash", "-n", str(script)], check=True)
    (fakes / "task").write_text("exit 143\n")
    ended = Body(fakes, script).end()
    assert (ended.code, ended.requeued) == (143, True), ended.stderr
    arguments = (fakes / "srun").read_text().split("\n' \n")[-1]
    assert f"\n--set\nsft.run_name={name}\n--out\n{Path.cwd() / name}\n" in arguments
    assert not list(fakes.rglob("canary"))
