"""A measuring process for tests/test_benchmarks.py: prints, fails and dies on command."""

import os

from benchmarks.peers.worker import serve


def double(*, value: int) -> int:
    print("printed by a library")
    return 2 * value


def fail() -> None:
    raise ValueError("no such thing")


def leave() -> None:
    os._exit(3)


if __name__ == "__main__":
    serve({"double": double, "fail": fail, "leave": leave})
