"""Which code made a file: version of this package and, where it runs from a checkout, the commit. Nothing of the machine."""

import functools
import json
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["__version__", "git_commit", "git_state", "package_version"]

__version__ = "0.2.0"


def package_version() -> str:
    """Version of this package, as it stands in files."""
    return __version__


@functools.cache
def git_commit() -> str:
    """Commit of the code, '' where it is not known.

    Read from the files of the checkout, once a process: a worker on a machine without git must write the same bytes.
    """
    root = Path(__file__).resolve().parents[2]
    return _commit(root) if (root / ".git").exists() else _installed_commit()


def git_state() -> str:
    """Commit of the code, with '+' behind it where the package's own files differ from that commit (asked of git, if it is there)."""
    commit, folder = git_commit(), Path(__file__).resolve().parents[1]
    if not commit or not (folder.parent / ".git").exists():
        return commit
    command = ["git", "--no-optional-locks", "-C", str(folder), "status", "--porcelain", "--untracked-files=no", "--", "."]
    try:
        found = subprocess.run(command, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git here, or a folder that belongs to another user
        return commit
    return commit + ("+" if found.stdout.strip() else "")


def _commit(root: Path) -> str:
    """Commit that HEAD of a checkout points to; also where .git is a file, as in a linked working tree."""
    try:
        git = root / ".git"
        if git.is_file():
            git = (root / git.read_text().partition(":")[2].strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.partition(":")[2].strip()
        common = git / "commondir"
        folders = [git, (git / common.read_text().strip()).resolve()] if common.is_file() else [git]
        for folder in folders:
            if (folder / name).is_file():
                return (folder / name).read_text().strip()
        lines = (folders[-1] / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in lines if line.endswith(" " + name)), "")
    except OSError:
        return ""


def _installed_commit() -> str:
    """Commit that pip installed from, where that was a repository."""
    try:
        text = metadata.distribution("sbi_phys").read_text("direct_url.json")
        return str(json.loads(text or "{}").get("vcs_info", {}).get("commit_id", ""))
    except (metadata.PackageNotFoundError, ValueError):
        return ""
