"""Version of this package and, in a checkout, the commit, as they are recorded in files."""

import functools
import json
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["git_commit", "git_state"]


@functools.cache
def git_commit() -> str:
    """Return the commit of the code, '' where it is not known.

    Read from the files of the checkout, not by the program git, so that a worker without git writes the same bytes.
    """
    root = Path(__file__).resolve().parents[2]
    return _commit(root) if (root / ".git").exists() else _installed_commit()


def git_state() -> str:
    """Return the commit of the code, followed by '+' where git finds that files of the package differ from it."""
    commit, folder = git_commit(), Path(__file__).resolve().parents[1]
    if not commit or not (folder.parent / ".git").exists():
        return commit
    command = ["git", "--no-optional-locks", "-C", str(folder), "status", "--porcelain", "--untracked-files=no", "--", "."]
    try:
        found = subprocess.run(command, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # git is not installed, or the folder belongs to another user
        return commit
    return commit + ("+" if found.stdout.strip() else "")


def _commit(root: Path) -> str:
    """Return the commit of HEAD of a checkout, also where .git is a file, as in a linked working tree."""
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
    """Return the commit that pip installed from, '' if it was not a repository."""
    try:
        text = metadata.distribution("sbi_phys").read_text("direct_url.json")
        return str(json.loads(text or "{}").get("vcs_info", {}).get("commit_id", ""))
    except (metadata.PackageNotFoundError, ValueError):
        return ""
