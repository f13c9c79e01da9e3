"""Processes that run the measured tools, one for each, kept alive so that runs of different tools can alternate."""

import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["Worker", "WorkerError", "worker_environment"]

ROOT = Path(__file__).resolve().parents[2]


class WorkerError(RuntimeError):
    """A measuring process failed; the message is its last line."""


def worker_environment(threads: int) -> dict[str, str]:
    """Environment in which every tool has the same threads, none of which spins while it waits."""
    counts = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "TORCH")}
    return {**os.environ, **counts, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


class Worker:
    """A process that runs `python -m module` and answers commands (see `benchmarks/peers/worker.py`).

    Args: python: interpreter. module: dotted name under the repository root. threads: for all its libraries.
    log: file that takes what the tool prints. settings: further environment variables.   Raises: WorkerError.
    """

    def __init__(self, python: Path, module: str, *, threads: int, log: Path, settings: dict[str, str] | None = None) -> None:
        self.module, self.log = module, log
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [str(python), "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                cwd=log.parent,  # some peers write logs into the working directory, which must not be the repository
                env={**worker_environment(threads), "PYTHONPATH": str(ROOT), **(settings or {})},
                text=True,
            )

    def call(self, command: str, *, timeout: float = 1500.0, **arguments: Any) -> Any:
        """Run one command in the process and wait for its result.   Raises: WorkerError (it failed, died, or took too long)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"{self.module} ended before {command}: {self._last_words()}") from None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            self._process.kill()
            raise WorkerError(f"{self.module} gave no answer to {command} within {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.module} ended during {command}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(answer["error"])
            raise WorkerError(f"{self.module}, {command}: {answer['error'].strip().splitlines()[-1]}")
        return answer["result"]

    def close(self) -> None:
        """End the process by closing its input."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.poll()}"
