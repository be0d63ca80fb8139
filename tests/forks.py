"""Command lines as forks of one process that has imported the libraries.

A start of Python with torch and trl takes six seconds of a core, a fork milliseconds. Arguments, environment,
directory, streams, signals and exit code are those of a process of its own; only what the imports do is not seen.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

# tqdm's own lock is a semaphore that forks share: one that is killed while it draws a bar would stop all others.
tqdm.set_lock(threading.RLock())


class Forks:
    """The process that is forked: started by the first use, ended by `close`."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, *processes: dict[str, Any], timeout: float = 600) -> list[int]:
        """Run processes beside each other and return their exit codes; if one fails the others are killed.

        Each has `main` ("module:function"), `argv`, `cwd`, `env`, and `stdout` and `stderr`, which are paths.
        """
        if self._server is None:
            places = os.pathsep.join(map(str, Path(__file__).parents[:2]))
            self._server = subprocess.Popen(
                [sys.executable, __file__], stdin=-1, stdout=-1, text=True, start_new_session=True,
                env=os.environ | {"PYTHONPATH": places, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(processes) + "\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], timeout)[0]:
            os.killpg(self._server.pid, signal.SIGKILL)
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()


def serve() -> None:
    from alignkit.cli import quiet_libraries

    given = os.environ.copy()
    quiet_libraries()
    import alignkit.evaluate.run
    import alignkit.preflight.check
    import alignkit.train.dpo
    import alignkit.train.ppo
    import alignkit.train.rm
    import alignkit.train.sft  # noqa: F401

    os.environ.clear()
    os.environ.update(given)
    for line in sys.stdin:
        left, codes = {}, {}
        for number, process in enumerate(json.loads(line)):
            if not (pid := os.fork()):
                become(process)
            left[pid] = number
        while left:
            pid, status = os.wait()
            codes[left.pop(pid)] = code = os.waitstatus_to_exitcode(status)
            for other in left if code else ():
                os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[number] for number in sorted(codes)]), flush=True)
    os._exit(0)  # without the collection at exit, which walks all of torch


def become(process: dict[str, Any]) -> None:
    """Be the process; does not return."""
    code = 1
    try:
        os.chdir(process["cwd"])
        os.environ.clear()
        os.environ.update(process["env"])
        for number, path in enumerate((os.devnull, process["stdout"], process["stderr"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rww"[n], 1) for n in range(3))
        sys.argv[:], sys.path[:1] = process["argv"], [process["cwd"]]
        module, name = process["main"].split(":")
        code = getattr(__import__(module, fromlist=[name]), name)() or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_code() -> None:
    """As `python -c CODE ARGUMENTS` does."""
    code = sys.argv.pop(1)
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    serve()
