"""The loop of a worker process, which runs one measured tool and answers commands, one JSON object per line, until its input ends.

Only the standard library is imported, so that the loop runs in every interpreter. Output that a tool prints is redirected to
stderr, so that it cannot be mistaken for an answer.
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
            except Exception:  # an exception of a tool is its answer; the benchmark reports it and continues with the others
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
