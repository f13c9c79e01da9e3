"""The guide to campaigns: its commands, settings and links exist, its cluster file is one, its tables are those of the benchmarks."""

import re
import tomllib
from pathlib import Path

from benchmarks.campaigns import PARTS
from benchmarks.scheduler_load import tables
from benchmarks.suite.table import fill, table
from sbi_phys.simulation.clusters import ClusterFile

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_the_cluster_file_is_one():
    (text,) = re.findall(r"^```toml\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
    assert ClusterFile(**tomllib.loads(text)).jobs == 200


def test_options_that_are_named_exist():
    source = "".join(p.read_text(encoding="utf-8") for p in [*ROOT.glob("sbi_phys/workflow/cli*.py"), *ROOT.glob("benchmarks/*.py")])
    named = set(re.findall(r"--(?:scheduler|cluster|shards|watch|page|workers|out)\b", GUIDE))
    assert len(named) == 7
    assert all(f'"{option}"' in source or f"{option[2:]}: " in source for option in named)


def test_tables_are_written_between_their_marks(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(GUIDE, encoding="utf-8")
    row = {"name": "killed workers: kills", "value": 8.0, "asked": ">= 3", "met": False}
    fill(page, "campaigns", table([row]))
    fill(page, "campaigns", table([row]))
    text = page.read_text(encoding="utf-8")
    assert text.count("| killed workers: kills | 8 | >= 3 **missed** |") == 1
    assert re.sub(r"(?s)<!-- campaigns: begin.*campaigns: end -->", "", text) == re.sub(
        r"(?s)<!-- campaigns: begin.*campaigns: end -->", "", GUIDE
    )
    assert capsys.readouterr().out.count("killed workers") == 2


def test_the_tables_hold_what_was_measured():
    text = tables({"folder of 9 shards: s to list": 0.5, "Dask: ms a shard, two workers": 4.25, "Dask: shards": 9.0})
    assert "| 9 shards: s to list | 0.5 |" in text
    assert "| Dask | 9 | 4.25 |" in text
    assert set(PARTS) == {"kills", "parents", "disk", "failures", "batches", "dask", "pool"}
