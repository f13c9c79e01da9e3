import io
import re
import sys
import threading

import pytest

from sbi_phys.core.errors import SbiPhysError, SettingError
from sbi_phys.core.progress import NO_PROGRESS, LineProgress, NoProgress, Progress, RichProgress, or_none, seconds_text

SHOW, HIDE = "\x1b[?25h", "\x1b[?25l"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines(interval_s=10.0):
    stream, clock = io.StringIO(), Clock()
    return LineProgress(stream, interval_s=interval_s, clock=clock), stream, clock


def test_no_progress_prints_nothing_and_is_the_default(capsys):
    assert or_none(None) is NO_PROGRESS
    with or_none(None).task("simulate", 10) as task:
        task.advance(3, "x")
        task.update(10)
    with pytest.raises(ZeroDivisionError), NO_PROGRESS.task("simulate", None):
        raise ZeroDivisionError  # an exception passes through
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [NoProgress(), LineProgress(), RichProgress()])
def test_all_are_progress(progress):
    assert isinstance(progress, Progress)
    assert or_none(progress) is progress


@pytest.mark.parametrize("wrong", [True, "bar", RichProgress, lambda: None])
def test_something_else_is_refused(wrong):
    with pytest.raises(SettingError, match="progress is .*expected None or an object with task"):
        or_none(wrong)


@pytest.mark.parametrize("interval", [-1, float("nan"), "10"])
def test_bad_interval_is_refused(interval):
    with pytest.raises(SbiPhysError, match="interval_s"):
        LineProgress(interval_s=interval)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01"), (float("inf"), "-:--"), (-1, "0:00")]
)
def test_seconds_text(seconds, text):
    assert seconds_text(seconds) == text


def test_lines_come_one_per_interval_with_rate_and_time_left():
    progress, stream, clock = lines()
    with progress.task("simulate", 1000) as task:
        for _ in range(25):  # 10 rows a second for 25 s
            clock.now += 1
            task.advance(10, "2 failed")
    assert stream.getvalue().splitlines() == [
        "simulate: 100/1000 (10 %), 10/s, elapsed 0:10, left 1:30, 2 failed",
        "simulate: 200/1000 (20 %), 10/s, elapsed 0:20, left 1:20, 2 failed",
        "simulate: 250/1000 (25 %), 10/s, elapsed 0:25, 2 failed, done",
    ]


def test_rows_of_an_earlier_run_count_as_done_but_not_as_speed():
    progress, stream, clock = lines()
    with progress.task("simulate", 1000) as task:
        task.update(900)
        clock.now += 10
        task.advance(10)
    assert stream.getvalue().splitlines()[0] == "simulate: 910/1000 (91 %), 1/s, elapsed 0:10, left 1:30"


def test_later_updates_count_as_speed():
    progress, stream, clock = lines()
    with progress.task("train", 10) as task:
        for epoch in range(2):
            clock.now += 5
            task.update(epoch + 1)
    assert stream.getvalue().splitlines()[0] == "train: 2/10 (20 %), 0.2/s, elapsed 0:10, left 0:40"


def test_unknown_total_and_no_work():
    progress, stream, clock = lines()
    with progress.task("fit", None) as task:
        clock.now += 10
        task.advance(0, "warming up")
    assert stream.getvalue().splitlines() == ["fit: elapsed 0:10, warming up", "fit: elapsed 0:10, warming up, done"]


def test_an_exception_is_named_in_the_last_line():
    progress, stream, _ = lines()
    with pytest.raises(KeyboardInterrupt), progress.task("simulate", 10), progress.task("inner", 2):
        raise KeyboardInterrupt
    assert [line.split(":")[0] for line in stream.getvalue().splitlines()] == ["inner", "simulate"]
    assert stream.getvalue().count("stopped by KeyboardInterrupt") == 2


def test_threads_lose_no_counts():
    progress, stream, _ = lines(interval_s=0)

    def work(task):
        for _ in range(300):
            task.advance()

    with progress.task("rows", 2400) as task:
        threads = [threading.Thread(target=work, args=(task,)) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    out = stream.getvalue().splitlines()
    assert "2400/2400 (100 %)" in out[-1]
    assert len(out) == 2401 and all(line.startswith("rows: ") for line in out)


def test_rich_writes_lines_where_there_is_no_terminal(capsys):
    with RichProgress(interval_s=0).task("train", 2) as task:
        task.advance(1, "loss 0.5")
        task.update(2)
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err
    assert "train: 1/2 (50 %)" in err and "loss 0.5, done" in err


def drawn(stream):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_rich_draws_bars_on_a_terminal_and_gives_the_cursor_back():
    stream = io.StringIO()
    progress = RichProgress(stream, terminal=True)
    with progress.task("stage", 3) as stage:
        for i in range(3):
            with progress.task("epoch", 10) as epoch:
                epoch.advance(10, f"loss [red]{i}")
            stage.update(i + 1, f"{i} lost")
    assert stream.getvalue().count(HIDE) == stream.getvalue().count(SHOW) == 1
    text = drawn(stream)
    last = text[text.rindex("stage") :]
    assert "100%" in last and "2 lost" in last and "epoch" not in last  # an inner bar goes, the stage's stays
    with progress.task("next", 1) as task:  # the display starts again
        task.advance()
    assert stream.getvalue().rindex(SHOW) > stream.getvalue().rindex(HIDE)
    assert "next" in drawn(stream)


def test_rich_leaves_a_clean_terminal_after_an_exception():
    stream = io.StringIO()
    progress = RichProgress(stream, terminal=True)
    with pytest.raises(ValueError, match="boom"), progress.task("outer", 2), progress.task("inner", None) as inner:
        inner.advance(1, "[/not markup]")
        raise ValueError("boom")
    inner.advance()  # too late to show, and harmless
    assert stream.getvalue().count(HIDE) == stream.getvalue().count(SHOW) == 1
    assert "stopped by ValueError" in drawn(stream)
    assert stream.getvalue().rindex(SHOW) > stream.getvalue().rindex(HIDE)


def test_a_task_shows_nothing_before_its_block():
    stream = io.StringIO()
    task = RichProgress(stream, terminal=True).task("early", 2)
    task.advance()
    task.update(1, "text")
    assert stream.getvalue() == ""


def test_is_terminal_asks_the_stream(monkeypatch):
    assert not RichProgress(io.StringIO()).is_terminal
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    assert RichProgress().is_terminal
