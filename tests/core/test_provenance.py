import subprocess

import pytest

import sbi_phys
from sbi_phys.core import provenance
from sbi_phys.core.provenance import git_commit, git_state
from sbi_phys.core.version import __version__

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkout(root, head):
    (root / ".git" / "refs" / "heads").mkdir(parents=True)
    (root / ".git" / "HEAD").write_text(head + "\n")
    return root


def test_the_version_is_that_of_the_package():
    assert __version__ == sbi_phys.__version__


def test_commit_and_state_of_this_code():
    assert git_commit() == "" or len(git_commit()) == 40
    assert git_state() in (git_commit(), git_commit() + "+")


def test_a_detached_head(tmp_path):
    assert provenance._commit(checkout(tmp_path, COMMIT)) == COMMIT


def test_a_branch(tmp_path):
    root = checkout(tmp_path, "ref: refs/heads/main")
    (root / ".git" / "refs" / "heads" / "main").write_text(COMMIT + "\n")
    assert provenance._commit(root) == COMMIT


def test_a_packed_branch(tmp_path):
    root = checkout(tmp_path, "ref: refs/heads/main")
    (root / ".git" / "packed-refs").write_text(f"# pack-refs with: peeled\n{COMMIT[::-1]} refs/heads/domain\n{COMMIT} refs/heads/main\n")
    assert provenance._commit(root) == COMMIT


def test_a_linked_working_tree(tmp_path):
    root = checkout(tmp_path / "main", "ref: refs/heads/main")
    (root / ".git" / "refs" / "heads" / "work").write_text(COMMIT + "\n")
    linked = root / ".git" / "worktrees" / "work"
    linked.mkdir(parents=True)
    (linked / "HEAD").write_text("ref: refs/heads/work\n")
    (linked / "commondir").write_text("../..\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {linked}\n")
    assert provenance._commit(tree) == COMMIT


def test_a_checkout_without_commits_and_a_broken_one(tmp_path):
    assert provenance._commit(tmp_path) == ""
    assert provenance._commit(checkout(tmp_path / "a", "ref: refs/heads/main")) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, ""), ("{}", ""), ("not json", ""), (f'{{"vcs_info": {{"commit_id": "{COMMIT}"}}}}', COMMIT)],
)
def test_the_commit_of_an_installed_package(monkeypatch, text, expected):
    class Distribution:
        def read_text(self, name):
            return text

    monkeypatch.setattr(provenance.metadata, "distribution", lambda name: Distribution())
    assert provenance._installed_commit() == expected


@pytest.mark.parametrize(("output", "mark"), [(b"", ""), (b" M sbi_phys/core/rng.py\n", "+")])
def test_changed_files_are_marked(monkeypatch, tmp_path, output, mark):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "sbi_phys" / "core" / "provenance.py"))
    monkeypatch.setattr(provenance, "git_commit", lambda: COMMIT)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, output))
    assert git_state() == COMMIT + mark


def test_without_git_the_commit_alone_is_known(monkeypatch, tmp_path):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "sbi_phys" / "core" / "provenance.py"))
    monkeypatch.setattr(provenance, "git_commit", lambda: COMMIT)
    monkeypatch.setattr(subprocess, "run", missing)
    assert git_state() == COMMIT
