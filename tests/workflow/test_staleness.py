"""What is recorded of a stage's inputs, and how differences are named."""

import re

import numpy as np
import pytest

import sbi_phys as sp
from sbi_phys.workflow.staleness import changes, digest_of, digest_of_array, store_digest
from tests.toys import LinearGaussian

BASE = {
    "settings": {"train.max_epochs": 6, "flow.hidden": 16},
    "observation": {"source": "crab.csv", "sha256": "a"},
    "code": {"sha256": "c", "parts": {"mysim": "1", "helper": "2"}},
    "files": {"model.pt": "m"},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"train.max_epochs": 7, "flow.hidden": 16}}, "train.max_epochs was 6 and is 7"),
        ({"settings": {"train.max_epochs": 6}}, "flow.hidden was 16 and is null"),
        ({"observation": {"source": "crab.csv", "sha256": "b"}}, "the observation crab.csv has other values than before"),
        ({"observation": {"source": "vela.csv", "sha256": "b"}}, "the observation was crab.csv and is vela.csv"),
        ({"observation": {}}, "there is no observation now"),
        ({"code": {"sha256": "d", "parts": {"mysim": "1", "helper": "3"}}}, "the code of the simulator differs: .*helper"),
        ({"files": {"model.pt": "n"}}, "model.pt differs"),
    ],
)
def test_each_difference_is_named(change, words):
    found = changes(BASE, BASE | change)
    assert len(found) == 1
    assert re.search(words, found[0])


def test_the_same_is_the_same_also_after_json():
    assert changes(BASE, BASE) == []
    assert changes({"settings": {"a": [1, 2]}}, {"settings": {"a": (1, 2)}}) == []
    # another file with the same values is the same observation
    assert changes(BASE, BASE | {"observation": {"source": "copy.csv", "sha256": "a"}}) == []


def test_digests_follow_the_content(tmp_path):
    path = tmp_path / "x"
    assert digest_of(path) == "absent" and digest_of(tmp_path) == "absent"
    path.write_bytes(b"one")
    first = digest_of(path)
    path.write_bytes(b"two")
    assert digest_of(path) != first
    path.write_bytes(b"one")
    assert digest_of(path) == first
    assert digest_of_array(np.zeros(4)) != digest_of_array(np.zeros((2, 2))) != digest_of_array(np.ones((2, 2)))


def test_the_digest_of_the_first_rows_stays_when_a_store_grows(tmp_path):
    sp.simulate(LinearGaussian(), 200, tmp_path / "s", seed=0, shard_size=100, workers=1)
    whole, first = store_digest(tmp_path / "s"), store_digest(tmp_path / "s", 100)
    sp.simulate(LinearGaussian(), 300, tmp_path / "s", seed=0, shard_size=100, workers=1)
    assert store_digest(tmp_path / "s") != whole == store_digest(tmp_path / "s", 200)
    assert store_digest(tmp_path / "s", 100) == first == store_digest(tmp_path / "s", 60)
    sp.simulate(LinearGaussian(), 300, tmp_path / "t", seed=1, shard_size=100, workers=1)
    assert store_digest(tmp_path / "t") != store_digest(tmp_path / "s")
    (tmp_path / "s" / "shard-00000.h5").unlink()
    assert store_digest(tmp_path / "s") == "absent" == digest_of(tmp_path / "s")
