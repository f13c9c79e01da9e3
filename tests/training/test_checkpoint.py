"""Model files: complete or not there, and never code."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from sbi_phys.core.errors import ModelFileError
from sbi_phys.training.checkpoint import read_file, write_file

CONTENT = {"weights": torch.arange(6.0).reshape(2, 3), "numbers": [1, 2.5, "three", None], "nested": {"a": True}}


def test_round_trip_leaves_no_litter(tmp_path: Path) -> None:
    write_file(tmp_path / "m.pt", "model", 3, CONTENT)
    again = read_file(tmp_path / "m.pt", "model", 3)
    assert torch.equal(again.pop("weights"), CONTENT["weights"])
    assert again == {k: v for k, v in CONTENT.items() if k != "weights"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": "sbi_phys", "kind": "model", "version": 1, "content": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(ModelFileError, match=name):
            read_file(tmp_path / name, "model", 1)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with pytest.raises(ModelFileError, match="is not a file"):
        read_file(path, "model", 1)
    write_file(path, "model", 2, CONTENT)
    whole = path.read_bytes()
    with pytest.raises(ModelFileError, match="version 2, expected at most 1"):
        read_file(path, "model", 1)
    with pytest.raises(ModelFileError, match="is a 'model' file; expected 'checkpoint'"):
        read_file(path, "checkpoint", 2)
    for cut in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelFileError, match=r"m\.pt"):
            read_file(path, "model", 2)
    torch.save({"other": 1}, path)
    with pytest.raises(ModelFileError, match="not written by sbi_phys"):
        read_file(path, "model", 2)


def test_a_full_disk_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    write_file(path, "model", 1, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelFileError, match="No space left.*unchanged"):
        write_file(path, "model", 1, {"a": 2})
    assert read_file(path, "model", 1) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]
    with pytest.raises(ModelFileError, match="writable folder"):
        write_file(tmp_path / "none" / "m.pt", "model", 1, {})


@pytest.mark.parametrize("version", ["2.4.1", "2.6.0+cpu", "2.9.1+cu128", "1.13.0a0+git1"])
def test_a_torch_that_a_file_can_make_run_code_reads_nothing(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "m.pt", "model", 1, {"a": 1})
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ModelFileError, match="not read: torch .* run code by a file; expected torch 2.10 or later"):
        read_file(tmp_path / "m.pt", "model", 1)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert read_file(tmp_path / "m.pt", "model", 1) == {"a": 1}
