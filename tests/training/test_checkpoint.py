"""Model files: complete or not there, and never code."""

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
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


def zip_with(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], compression: int = zipfile.ZIP_STORED) -> None:
    """The archive anew, with other entries and valid checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in change(entries).items():
            archive.writestr(name, content)


def test_every_changed_byte_of_an_entry_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    write_file(path, "model", 1, CONTENT | {"edge": 1.0, "weights": torch.arange(600.0)})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        places = {entry.filename: (entry.header_offset, entry.file_size) for entry in archive.infolist()}
    for name, (start, size) in places.items():
        start = whole.index(name.encode(), start) + len(name)
        start += int.from_bytes(whole[start - len(name) - 2 : start - len(name)], "little")
        for at in range(start, start + size, max(1, size // 20)):
            damaged = bytearray(whole)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ModelFileError, match=r"m\.pt"):
                read_file(path, "model", 1)


@pytest.mark.parametrize("seed", range(3))
def test_damage_anywhere_gives_the_same_content_or_the_one_error(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "m.pt"
    write_file(path, "model", 1, CONTENT)
    whole, rng, same = path.read_bytes(), np.random.default_rng(seed), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with suppress(ModelFileError):
            again = read_file(path, "model", 1)
            assert torch.equal(again.pop("weights"), CONTENT["weights"]) and again == {k: CONTENT[k] for k in again}
            same += 1
    assert same > 0  # padding between the entries


def test_archives_that_are_made_to_deceive(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"

    def refused(message: str) -> None:
        with pytest.raises(ModelFileError, match=message):
            read_file(path, "model", 1)

    write_file(path, "model", 1, CONTENT)
    zip_with(path, lambda entries: entries, zipfile.ZIP_DEFLATED)
    refused("compressed")
    write_file(path, "model", 1, CONTENT)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"other")
    refused("twice")
    torch.save([1, 2], path)
    refused("not written by sbi_phys")
    for content in (
        torch.zeros(1).expand(10**12),
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        {"a": [torch.zeros(1).expand(9)]},
    ):
        torch.save({"format": "sbi_phys", "kind": "model", "version": 1, "content": {"x": content}}, path)
        refused("expected tensors with their own values, numbers, text, lists and dicts")
    for version, content in ((1.5, {}), ("1", {}), (None, {}), (1, [1]), (1, None)):
        torch.save({"format": "sbi_phys", "kind": "model", "version": version, "content": content}, path)
        refused("expected a number and a dict")
