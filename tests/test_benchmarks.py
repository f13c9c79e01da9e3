"""The benchmark's driver on made-up numbers: the form of its JSON, its table, its page, its figure, its options."""

import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks.run import TOPICS, main
from benchmarks.suite.context import Trained
from benchmarks.suite.report import block, number, plot, table, write_block
from benchmarks.suite.rows import KEYS, Row, check_rows, merge_rows, read_rows, skipped, write_rows
from benchmarks.suite.training import loss_at, time_to
from benchmarks.suite.workers import ROOT, Worker, WorkerError

RATE = Row(
    name="training: spline", values=[31_000.0, 33_000.0, 30_000.0], unit="rows/s", peer="sbi, nsf", peer_values=[4_000.0, 3_100.0],
    device="a processor, 2 threads", versions={"torch": "2.13.0"}, note="71 000 weights", load=0.5,
)  # fmt: skip
LOSS = Row(name="training: loss", values=[-0.25], unit="nats", peer="sbi, nsf", peer_values=[-0.2], device=RATE.device)


def test_a_row_is_medians_and_their_ratio():
    row = RATE.to_dict()
    assert tuple(row) == KEYS
    assert (row["value"], row["peer_value"]) == (31_000.0, 3_550.0)
    assert row["ratio"] == pytest.approx(31_000 / 3_550)
    assert LOSS.ratio is None  # of losses the difference counts
    assert Row(name="step: a", values=[1.0], unit="ms").to_dict()["peer"] is None


def test_written_rows_come_back(tmp_path):
    out = tmp_path / "results" / "latest.json"
    write_rows(out, [RATE, LOSS, skipped("streaming: all", "not built")])
    rows = json.loads(out.read_text())
    check_rows(rows)
    assert [row["name"] for row in rows] == ["training: spline", "training: loss", "streaming: all"]
    assert read_rows(out)[1][0]["values"] == [31_000.0, 33_000.0, 30_000.0]
    assert sorted(p.name for p in out.parent.iterdir()) == ["latest.json", "latest_runs.json"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"value": "fast"}, "finite number"),
        ({"value": math.nan}, "finite number"),
        ({"ratio": True}, "finite number"),
        ({"name": "spline"}, "topic: what"),
        ({"unit": None}, "unit"),
        ({"peer": 3}, "peer"),
        ({"versions": ["torch"]}, "versions"),
        ({"spread": 1.0}, "keys"),
    ],
)
def test_a_malformed_row_is_named(change, word):
    with pytest.raises(ValueError, match=word):
        check_rows([RATE.to_dict(), RATE.to_dict() | change])


def test_a_file_keeps_other_topics_and_devices():
    def row(name: str, device: str, value: float) -> dict[str, object]:
        return Row(name=name, values=[value], unit="s", device=device).to_dict()

    old = [row("step: a", "cpu", 1), row("step: a", "gpu", 2), row("growth: b", "cpu", 3), row("step: skipped", "", 4)]
    new = [row("step: c", "cpu", 5)]
    assert [r["value"] for r in merge_rows(old, new)] == [2, 3, 5]


def test_table_and_block_hold_every_row_and_why_one_is_missing(tmp_path):
    rows, runs = write_rows(tmp_path / "latest.json", [RATE, LOSS, skipped("streaming: all", "not built")])
    text = table(rows, runs)
    assert len(text.splitlines()) == 2 + 3
    space = "\N{NARROW NO-BREAK SPACE}"
    assert f"31{space}000 (30{space}000, 33{space}000)" in text
    assert "| 8.73 |" in text
    assert "\N{MINUS SIGN}0.050 (difference)" in text
    whole = block(rows, runs)
    assert "not built" in whole and "torch 2.13.0" in whole and "load average 0.5" in whole
    assert whole.count("### ") == 2


def test_two_peers_of_one_name_keep_their_own_runs(tmp_path):
    def row(peer: str, value: float) -> Row:
        return Row(name="sbc: 9 x 9", values=[value], unit="s", peer=peer, peer_values=[2 * value, 4 * value], device="cpu")

    text = table(*write_rows(tmp_path / "latest.json", [row("one", 1.0), row("two", 10.0)]))
    assert "3.00 (2.00, 4.00)" in text and "30.0 (20.0, 40.0)" in text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, "", "\N{EN DASH}"), (0.0, "", "0"), (12.345, "ms", "12.3"), (0.01234, "s", "0.0123"), (-0.1234, "nats", "\N{MINUS SIGN}0.123")],
)
def test_number(value, unit, text):
    assert number(value, unit) == text


def test_the_page_changes_between_the_marks_only(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text("# Title\n\nby hand: 0.222\n")
    write_block(page, "first")
    assert page.read_text().startswith("# Title\n\nby hand: 0.222\n") and "first" in page.read_text()
    page.write_text(page.read_text() + "\n## After\n")
    write_block(page, "second \\1", figure="![f](f.png)")
    text = page.read_text()
    assert "first" not in text and "second \\1" in text and "![f](f.png)" in text
    assert text.endswith("\n## After\n") and text.count("benchmarks: begin") == 1


def test_the_shipped_page_has_the_marks_once():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text.count("<!-- benchmarks: begin") == text.count("<!-- benchmarks: end -->") == 1


def test_the_shipped_numbers_have_the_form():
    path = ROOT / "benchmarks" / "results" / "latest.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    check_rows(rows)
    assert rows


def test_plot(tmp_path):
    curves = {"sbi_phys, equal": [(1.0, 0.5), (2.0, -0.2)], "sbi, nsf": [(10.0, 0.6), (20.0, -0.1)]}
    path = plot(tmp_path / "benchmarks.png", [RATE.to_dict(), LOSS.to_dict()], curves)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    assert plot(tmp_path / "none.png", [LOSS.to_dict()], {}) is None


def test_a_curve_is_the_held_out_loss_against_all_of_the_wall_time():
    done = Trained(wall=10.0, n_train=900, epoch_seconds=[4.0, 2.0, 2.0], valid=[3.0, 1.0, 2.0], held_out=-1.0, weights=1, keeps_best=True)
    assert done.curve() == [(6.0, 1.0), (8.0, -1.0), (10.0, -1.0)]
    assert done.rate == pytest.approx(900 * 2 / 4.0)
    assert time_to(done.curve(), 0.0) == 8.0 and time_to(done.curve(), -1.5) is None
    assert loss_at(done.curve(), 7.0) == 1.0 and loss_at(done.curve(), 0.5) == 1.0 and loss_at(done.curve(), 99.0) == -1.0
    last = Trained(wall=8.0, n_train=900, epoch_seconds=[4.0, 4.0], valid=[1.0, 2.0], held_out=0.0, weights=1, keeps_best=False)
    assert last.curve() == [(4.0, -1.0), (8.0, 0.0)]


@pytest.mark.parametrize("arguments", [["--only", "stpe"], ["--only", "step,stpe"], ["--threads", "0"], ["--repeats", "-1"]])
def test_a_wrong_option_is_a_clear_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert arguments[0] in said and "expected" in said
    if arguments[0] == "--only":
        assert "stpe" in said and all(name in said for name in TOPICS)


def test_a_worker_answers_fails_by_name_and_ends(tmp_path):
    worker = Worker(Path(sys.executable), "tests.bench_worker", threads=1, log=tmp_path / "log")
    try:
        assert worker.call("double", value=21) == 42
        with pytest.raises(WorkerError, match="ValueError: no such thing"):
            worker.call("fail")
        assert worker.call("double", value=1) == 2
        with pytest.raises(WorkerError, match=r"ended during leave"):
            worker.call("leave")
    finally:
        worker.close()
    assert "printed by a library" in (tmp_path / "log").read_text()
