r"""A process that ends the programs of another process when that one dies, whatever it dies of.

    python -I -S _watcher.py   < lines of JSON: [number, mark, folder, group], and [number] after the program has ended

The watched process holds the other end of the standard input; kill -9 closes it as an ordinary end does. The programs that are still
registered then are killed with all processes that they started, and their working folders are removed. A process belongs to a program
if it is in its process group, or, on Linux, if its environment has the program's mark: the second also finds processes that moved to
another session, and a program that was started just before its group could be registered.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time

_ROUNDS = 20  # a process that starts others while they are looked for is found in one of the next rounds


def end_program(mark: str, group: int | None) -> None:
    """Kill a process group, and all processes of this user whose environment contains `mark`."""
    for attempt in range(_ROUNDS):
        if group is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        found = marked(mark)
        if not found:
            return
        for process in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.002 * attempt)


def marked(mark: str) -> list[int]:
    """Processes whose environment contains `mark` and that have not ended; empty on systems without /proc."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as file:
                    if mark.encode() in file.read():
                        found.append(int(entry))
    return found


def main() -> None:
    """Read until the watched process closes its end, then end what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    programs: dict[int, list[object]] = {}
    for line in sys.stdin:
        with contextlib.suppress(ValueError):
            number, *rest = json.loads(line)
            if rest:
                programs[number] = rest
            else:
                programs.pop(number, None)
    for mark, folder, group in programs.values():
        if not isinstance(group, int):
            time.sleep(0.1)  # it may not have got its environment yet
        end_program(str(mark), group if isinstance(group, int) else None)
        shutil.rmtree(str(folder), ignore_errors=True)


if __name__ == "__main__":
    main()
