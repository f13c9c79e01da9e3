"""TOML in and out; a typo is an error that suggests the right word."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbi_phys.core.errors import SettingError
from sbi_phys.workflow.settings import Config, LimitsSettings, UnfoldSettings, describe, parse_override


def test_defaults_survive_the_way_through_toml(tmp_path):
    config = Config().override(
        {"simulator.spec": "some.module:Thing", "simulator.settings": {"bins": 3, "names": ["a", "b"], "deep": {"x": 1.5}}}
    )
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert Config.read(path) == config
    assert config.first_difference(Config.read(path)) is None


@given(
    n=st.integers(1, 10**9),
    seed=st.integers(0, 2**40),
    rate=st.floats(1e-8, 1.0),
    title=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
)
def test_any_value_survives_the_way_through_toml(tmp_path_factory, n, seed, rate, title):
    config = Config().override({"simulate.n": n, "run.seed": seed, "train.learning_rate": rate, "run.title": title})
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.read(path) == config


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[train]\nlearning_rte = 1e-3", r"\[train\] has an unknown key 'learning_rte'.*did you mean 'learning_rate'"),
        ("[trian]\n", "unknown key 'trian'.*did you mean 'train'"),
        ("[simulate]\nn = 'many'", "simulate.n is 'many' .str.; expected an integer"),
        ("[simulate]\nn = true", "simulate.n is True .bool.; expected an integer"),
        ("[simulate]\nn = 1.5", "simulate.n is 1.5"),
        ("[simulate]\nn = 0", "simulate.n is 0; expected"),
        ("[simulate]\ncompression = 'zip'", "compression is 'zip'; expected '', 'lzf'"),
        ("[simulate]\ndtype = 'int8'", "simulate.dtype is 'int8'"),
        ("[simulate.dtypes]\ncounts = 'int8'", "dtype of counts is 'int8'"),
        ("[flow]\nkind = 'spilne'", "flow kind is 'spilne'.*did you mean 'spline'"),
        ("[reference]\nmethod = 'nuts'", "expected one of emcee, none"),
        ("[run]\ntitle = 3", "run.title is 3 .int.; expected str"),
        ("[simulator]\nsettings = 3", "simulator.settings is 3 .int.; expected dict"),
        ("[simulator]\nspec = 'no_colon'", "expected 'package.module:Class'"),
        ("train = 3", r"expected a table \[train\]"),
        ("[train\n", "is not TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, complaint):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(SettingError, match=complaint) as caught:
        Config.read(path)
    assert "run.toml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingError, match="absent.toml.*No such file.*expected a TOML file"):
        Config.read(tmp_path / "absent.toml")


def test_override_changes_one_value_and_leaves_the_original():
    config = Config()
    changed = config.override({"train.patience": 3, "simulator.settings.bins": 7})
    assert (changed.train.patience, changed.simulator.settings) == (3, {"bins": 7})
    assert config == Config()
    assert changed.override({"simulator.settings.cuts": [1, 2]}).simulator.settings == {"bins": 7, "cuts": [1, 2]}


@pytest.mark.parametrize(
    ("key", "complaint"), [("patience", "names no table"), ("tarin.patience", "'train'"), ("train.patienec", "'patience'")]
)
def test_override_of_an_unknown_key(key, complaint):
    with pytest.raises(SettingError, match=complaint):
        Config().override({key: 3})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("simulate.n=10", ("simulate.n", 10)),
        ("flow.kind=affine", ("flow.kind", "affine")),
        ('run.title="a = b"', ("run.title", "a = b")),
        ("run.title=a = b", ("run.title", "a = b")),
        ("simulator.settings.bins = [1, 2]", ("simulator.settings.bins", [1, 2])),
    ],
)
def test_parse_override(text, expected):
    assert parse_override(text) == expected


def test_parse_override_without_value():
    with pytest.raises(SettingError, match="expected table.key=value"):
        parse_override("simulate.n")


def test_quick_only_ever_cuts_down():
    full = Config().override({"simulate.n": 500_000, "rounds.n_rounds": 3, "calibrate.n": 60})
    quick, before = full.quick().flat(), full.flat()
    assert quick["calibrate.n"] == 60 and quick["rounds.n_rounds"] == 1
    assert quick["train.max_epochs"] == Config.QUICK["train.max_epochs"]  # 0, the automatic choice, counts as many
    assert all(quick[key] == before[key] for key in before if key not in Config.QUICK)
    assert full.quick().quick() == full.quick()
    assert Config().quick().rounds.n_rounds == 0  # what is switched off stays off
    assert set(Config.QUICK) <= set(before)


def test_first_difference_names_key_and_values_but_not_device_or_workers():
    config = Config()
    assert config.first_difference(config.override({"run.device": "cuda", "run.workers": 7})) is None
    assert config.first_difference(config.override({"train.patience": 2})) == ("train.patience", config.train.patience, 2)
    assert config.first_difference(config.override({"simulator.settings": {"bins": 2}})) == ("simulator.settings", {}, {"bins": 2})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run.seed = 3


@pytest.mark.parametrize("settings", [UnfoldSettings(seed=3, coverage=0.5), LimitsSettings(parameters=("a", "b"), levels=(0.9,), n=500)])
def test_settings_of_unfolding_and_limits_use_the_same_mechanism(tmp_path, settings):
    path = tmp_path / "settings.toml"
    path.write_text(settings.to_toml())
    again = type(settings).read(path)
    assert again == settings and again.first_difference(settings) is None
    assert settings.first_difference(settings.override({"n_toys" if isinstance(settings, UnfoldSettings) else "n": 777}))[2] == 777
    with pytest.raises(SettingError, match="unknown key 'n_toy'"):
        settings.override({"n_toy": 3})


def test_quick_unfolding_keeps_what_is_smaller_already():
    assert UnfoldSettings(validate_toys=20).quick().validate_toys == 20
    assert UnfoldSettings().quick().n_simulated == UnfoldSettings.QUICK["n_simulated"]


def test_an_embedding_of_ones_own_in_toml(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[embedding]\nspec = "my_module:MyCNN"\n[embedding.settings]\nchannels = 8\nwidths = [3, 4]\n')
    config = Config.read(path)
    assert config.embedding.spec == "my_module:MyCNN" and config.embedding.settings == {"channels": 8, "widths": [3, 4]}
    path.write_text(config.to_toml())
    assert Config.read(path) == config
    assert config.first_difference(config.override({"embedding.settings": {"channels": 9}}))[0] == "embedding.settings"
    with pytest.raises(SettingError, match="there is no module 'my_module'"):
        config.embedding.require_class()
    with pytest.raises(SettingError, match="embedding spec is 'MyCNN'; expected 'package.module:Class'"):
        Config.from_dict({"embedding": {"spec": "MyCNN"}})
    with pytest.raises(SettingError, match=r"takes .*got \{'in_features': 3\}: missing a required argument: 'out_features'"):
        Config.from_dict({"embedding": {"spec": "torch.nn:Linear", "settings": {"in_features": 3}}}).embedding.require_class()


def test_the_described_settings_are_the_settings_and_every_key_has_a_meaning(tmp_path):
    config = Config().override({"simulator.settings": {"n": 3, "names": ["a", "b"], "deep": {"x": 0.5}}, "methods.nle_layers": 2})
    config = config.override({"networks": {"wide": {"flow": {"hidden": 128}}}, "observations": {"crab": "crab.csv"}})
    path = tmp_path / "all.toml"
    for each in (Config(), config):
        path.write_text(describe(each))
        assert Config.read(path) == each
    lines = describe(Config()).splitlines()
    for before, line in itertools.pairwise(lines):
        if " = " in line and not line.startswith("#"):
            assert before.startswith("# ") and len(before) > 6, line


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"networks": {"a/b": {}}}, "networks has the name 'a/b'; expected letters, digits"),
        ({"networks": {"a": {"folw": {}}}}, r"\[networks.a\].*'folw'.*did you mean 'flow'"),
        ({"networks": {"a": {"flow": {"hiden": 3}}}}, "networks.a: .*'hiden'.*did you mean 'hidden'"),
        ({"networks": {"a": {"flow": 3}}}, "networks.a is .*; expected tables such as"),
        ({"observations": {"a": 3}}, "observations.a is 3; expected text"),
        ({"observations": {"a": "simulated:x"}}, "has the seed 'x'; expected a whole number"),
        ({"infer.observation": "x.csv#0"}, "asks for row 0; expected a row from 1"),
    ],
)
def test_wrong_networks_and_observations_are_named(changes, complaint):
    with pytest.raises(SettingError, match=complaint):
        Config().override(changes)
