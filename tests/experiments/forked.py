"""Stands in for ``subprocess`` in the runner: commands of this project run in children of one warm process.

Importing torch costs more than a run of a few steps. The server imports it once and has no threads yet, so that each
command begins as a fork of it.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import IO

DEVNULL, STDOUT, TimeoutExpired = subprocess.DEVNULL, subprocess.STDOUT, subprocess.TimeoutExpired

_WARM = [
    "torch._dynamo",  # which building a model on the meta device imports
    "switchmamba.cli.train",
    "switchmamba.training.trainer",
    "switchmamba.experiments.analysis",
]


class Popen:
    """What the runner asks of a process: PROGRAM… is left out, ARGUMENTS go to ``switchmamba.cli.main``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: int,
        env: Mapping[str, str],
        start_new_session: bool,
    ) -> None:
        assert list(command[1:3]) == ["-m", "switchmamba"]
        assert (stdin, stderr, start_new_session) == (DEVNULL, STDOUT, True)
        context = get_context("forkserver")
        context.set_forkserver_preload(_WARM)
        self._process = context.Process(target=_run, args=(list(command[3:]), stdout.name, dict(env)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired("switchmamba", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    with Path(log).open("ab") as output, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from switchmamba.cli import main

    sys.exit(main(arguments))
