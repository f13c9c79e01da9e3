"""What every measured tool runs in: a process of its own that answers commands, one JSON object a line, until its input ends.

Nothing but the standard library is imported here, so that the same loop serves every interpreter. The tool's own output goes
to the log (stderr): a library that prints cannot disturb the answers.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["processor_name", "serve"]


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answer {"command", "arguments"} with {"result"} or {"error": traceback}, in the order of arrival."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"result": commands[request["command"]](**request["arguments"])}
            except Exception:  # whatever a peer raises is its answer; the driver names it and goes on with the others
                answer = {"error": traceback.format_exc()}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def processor_name() -> str:
    """The processor's name as Linux gives it, else the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else os.uname().machine
