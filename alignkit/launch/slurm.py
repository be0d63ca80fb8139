"""A stage as a Slurm batch job: the sbatch script beside the run, submitted on request, chained where stages follow.
The job uses this interpreter, this directory and the variables of the shell that submits it."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from alignkit.errors import EnvironmentProblem, RecipeError, RunError
from alignkit.launch.placement import Command
from alignkit.preflight.requirements import list_needs, require_ready
from alignkit.recipe.schema import SlurmOptions
from alignkit.recipe.stage import check_batch
from alignkit.runs.directory import MANIFEST, RunDir, open_run, refuse_foreign
from alignkit.runs.files import disk_failures, write_text


def write_jobs(
    commands: Sequence[Command], *, submit: bool, dry_run: bool, force: bool = False
) -> list[dict[str, Any]]:
    """Write `<run dir>/launch/job.sbatch` for each stage and, with `submit`, hand them to sbatch in this order; tell of
    each what it is, what it waits for (`depends_on`), and the command that submits it, in which `$job_N` stands for the
    N-th job's id until that is known. With `force` an existing run is moved aside now, not at each start of the job."""
    if submit and not dry_run and shutil.which("sbatch") is None:
        what = "submit on a machine of the cluster, or take --submit away to write the script"
        raise EnvironmentProblem(f"sbatch is not on PATH here; {what}")
    jobs: dict[str, dict[str, Any]] = {}
    for command in commands:
        stage = command.stage
        refuse_foreign(Path(stage.run_dir))
        needs = dict.fromkeys(need.stage for need in list_needs(stage))
        if not dry_run:
            require_ready(stage, coming=[*jobs, *(() if submit else needs)])
        path = str(RunDir(Path(stage.run_dir)).launch / "job.sbatch")
        after = [name for name in needs if name in jobs]
        ids = [f"$job_{list(jobs).index(name) + 1}" for name in after]
        jobs[stage.name] = {
            "stage": stage.name, "path": path, "script": build_script(command), "depends_on": after,
            "submit": _order(ids, path), "job_id": None}  # fmt: skip
    if dry_run:
        return list(jobs.values())
    for command, job in zip(commands, jobs.values(), strict=True):
        run, lock = open_run(Path(command.stage.run_dir), force=force)
        with closing(lock), disk_failures(run.path, "the batch script"):
            run.launch.mkdir(exist_ok=True)
            write_text(Path(job["path"]), job["script"])
    for job in jobs.values() if submit else ():
        job["submit"] = _order([jobs[name]["job_id"] for name in job["depends_on"]], job["path"])
        done = subprocess.run(job["submit"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [f"sbatch refuses {job['path']}: {' '.join(done.stderr.split())}"]
            said += [f"{name} is submitted as job {each['job_id']}" for name, each in jobs.items() if each["job_id"]]
            raise EnvironmentProblem("; ".join(said))
        job["job_id"] = done.stdout.strip().split(";")[0]  # `--parsable` prints id, or id;cluster
    return list(jobs.values())


def _order(ids: Sequence[str], path: str) -> list[str]:
    """Make the command that submits a script; it waits for other jobs, and is cancelled when one of them fails."""
    after = [f"--dependency=afterok:{':'.join(ids)}", "--kill-on-invalid-dep=yes"] if ids else []
    return ["sbatch", "--parsable", *after, path]


def build_script(command: Command) -> str:
    stage = command.stage
    launch, slurm = stage.launch, stage.launch.slurm or SlurmOptions()
    given = slurm.gpus_per_node
    if launch.processes == "auto" and not given:
        what = "launch.processes is auto, and the devices here say nothing of the cluster's; --slurm needs a number "
        raise RecipeError(f"{what}there or in launch.slurm.gpus_per_node", where=stage.where("launch.processes"))
    processes = given or 1 if launch.processes == "auto" else launch.processes
    wanted = 0 if launch.device == "cpu" else processes  # one for each process unless it trains on the CPU
    if given is not None and 0 < given < wanted:
        what = f"launch.slurm.gpus_per_node is {given}, but launch.processes is {wanted}, one a GPU; make them equal"
        raise RecipeError(what, where=stage.where("launch.slurm.gpus_per_node"))
    gpus = wanted if given is None else given
    run = RunDir(Path(stage.run_dir))
    seconds = read_time(slurm.time) if slurm.time else 0
    if seconds and seconds <= slurm.signal_seconds + 60:  # Slurm signals up to 60 s early
        what = f"launch.slurm.time is {slurm.time}, and launch.slurm.signal_seconds stops the job "
        what += f"{slurm.signal_seconds} to 60 more seconds before that; raise the one or lower the other"
        raise RecipeError(what, where=stage.where("launch.slurm.time"))
    if problem := check_batch(stage, launch.nodes * processes):
        raise RecipeError(problem)
    cpus = slurm.cpus_per_process * processes
    options = {
        "job-name": f"{stage.recipe_name}-{stage.name}", "nodes": launch.nodes, "ntasks-per-node": 1,
        "cpus-per-task": cpus, "gpus-per-node": gpus or None, "mem": slurm.memory,
        **{name: getattr(slurm, name) for name in ("time", "partition", "account", "qos", "constraint")},
        **slurm.options, "output": f"{str(run.launch).replace('%', '%%')}/slurm-%j.log", "open-mode": "append",
        "requeue": "", "signal": f"B:USR1@{slurm.signal_seconds}"}  # fmt: skip
    directives = [f"#SBATCH --{name}{quote(value)}" for name, value in options.items() if value is not None]
    script = Path(__file__).with_name("job.sh.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(script).render(
        directives="\n".join(directives), directory=shlex.quote(os.getcwd()), run=shlex.quote(str(run.path)),
        manifest=MANIFEST, several_nodes=launch.nodes > 1, max_requeues=slurm.max_requeues, cpus=cpus,
        command=shlex.join(command.argv()))  # fmt: skip


def read_time(text: str) -> int:
    """Read the seconds of M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 means no limit."""
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = 0, parts[0], sum(parts[1:])
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def quote(value: object) -> str:
    """Write `=value` as sbatch reads a directive: quotes keep blanks together, a backslash takes one character as is.
    sbatch does not read a backslash inside quotes as a shell does, so that no character is both."""
    text = str(value)
    if not text:
        return ""
    if not text.isprintable():
        raise RunError(f"{text!r} cannot stand in a batch script; choose another directory with --out")
    if re.fullmatch(r"[\w.,:@%+=/-]+", text, flags=re.ASCII):
        return f"={text}"
    parts = (part for part in re.split(r"([\"'\\])", text) if part)
    return "=" + "".join(f"\\{part}" if part in "\"'\\" else f'"{part}"' for part in parts)
