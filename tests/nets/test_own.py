"""Networks of the user's own: built from a name with the seed alone, guarded by layer, in files by name, arguments and weights."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sbi_phys as sp
from sbi_phys.core.errors import ModelFileError, NonFiniteError, SettingError, ShapeError
from sbi_phys.nets.embedding_vector import EmbeddingConfig, ResidualMLP, build_embedding
from sbi_phys.nets.own import guarded

PRIOR = sp.BoxPrior([sp.Parameter("a", -1, 1)])
QUICK = sp.TrainConfig(max_epochs=2)
HERE = __name__


class CNN(nn.Module):
    """Images (n, 6, 6) -> (n, 2 channels)."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, channels, 3), nn.ReLU(), nn.Conv2d(channels, 2 * channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None]).mean(dim=(2, 3))


class Broken(nn.Module):
    """Fails in the way that is asked for."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.ModuleDict({"first": nn.Linear(36, 4), "second": nn.Linear(5, 4)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.body["first"](x.flatten(1))
        if self.how == "shape of a layer":
            return self.body["second"](h)
        if self.how == "its own code":
            raise KeyError("lost")
        if self.how == "output":
            return h[:, 0]
        return torch.log(h - 1e6) if self.how == "NaN" else h


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x - 1e6)


class NotAModule:
    def __init__(self) -> None:
        raise AssertionError("called before it was checked")


def images(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    theta = PRIOR.sample(n, rng)
    return theta, theta[:, :, None] + 0.3 * rng.standard_normal((n, 6, 6))


def make(embedding: object, **settings: object) -> sp.NPE:
    given = {"seed": 4, "flow": sp.FlowConfig(n_layers=1, hidden=8), "config": QUICK, "device": "cpu"} | settings
    return sp.NPE(PRIOR, embedding=embedding, **given)


def weights(npe: sp.NPE) -> Tensor:
    net = npe._new_net(type("S", (), {"shape": (6, 6)}), 11)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


SPEC = f"{HERE}:CNN"


@pytest.mark.parametrize("embedding", [SPEC, CNN, EmbeddingConfig(spec=SPEC, settings={"channels": 3})], ids=["name", "class", "config"])
def test_the_seed_covers_the_weights(embedding: object) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = weights(make(embedding))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.randn(17)
    assert torch.equal(weights(make(embedding)), first)
    torch.manual_seed(2)
    assert torch.equal(weights(make(SPEC)), first)
    net = make(embedding)._new_net(type("S", (), {"shape": (6, 6)}), 12)
    assert not torch.equal(torch.cat([p.detach().flatten() for p in net.parameters()]), first)


def test_arguments_reach_the_class() -> None:
    module, n_features = build_embedding(EmbeddingConfig(spec=SPEC, settings={"channels": 5}), (6, 6))
    assert n_features == 10 and isinstance(module, CNN) and type(module).__name__ == "CNN"
    with pytest.raises(SettingError, match=r"CNN takes \(channels: int = 3\).*got \{'chanels': 5\}"):
        build_embedding(EmbeddingConfig(spec=SPEC, settings={"chanels": 5}), (6, 6))


def test_a_model_with_a_named_network_is_saved_and_read(tmp_path: Path) -> None:
    theta, x = images(200)
    npe = make(EmbeddingConfig(spec=SPEC, settings={"channels": 2}), n_ensemble=2).fit(theta, x)
    npe.save(tmp_path / "m.pt")
    again = sp.load(tmp_path / "m.pt", device="cpu")
    np.testing.assert_array_equal(again.sample(x[0], 20), npe.sample(x[0], 20))
    assert again.embedding == npe.embedding and "spec='tests.nets.test_own:CNN'" in repr(again)
    for given in (CNN(2), f"{HERE}:CNN"):
        np.testing.assert_array_equal(sp.load(tmp_path / "m.pt", embedding=given, device="cpu").log_prob(theta, x), npe.log_prob(theta, x))
    with pytest.raises(ModelFileError, match="does not describe a model"):
        sp.load(tmp_path / "m.pt", embedding=CNN(4))


@pytest.mark.parametrize("estimator", [sp.NRE, sp.NLE])
def test_other_estimators_take_a_name(estimator: type[sp.Estimator], tmp_path: Path) -> None:
    theta, x = images(100)
    x, settings = x[:, 0, :3], {"in_features": 1 if estimator is sp.NLE else 3, "out_features": 4}
    embedding = EmbeddingConfig(spec="torch.nn:Linear", settings=settings)
    model = estimator(PRIOR, embedding=embedding, config=QUICK, device="cpu").fit(theta, x)
    model.save(tmp_path / "m.pt")
    again = sp.load(tmp_path / "m.pt", device="cpu")
    ask = "log_likelihood" if estimator is sp.NLE else "log_ratio"
    np.testing.assert_array_equal(getattr(again, ask)(x[:5], theta[:5]), getattr(model, ask)(x[:5], theta[:5]))


def test_a_file_imports_nothing_without_permission(tmp_path: Path) -> None:
    """In a fresh process: the name is shown, nothing is imported, and with permission the model gives the same numbers."""
    module = "import torch\nprint('imported')\nclass Net(torch.nn.Linear):\n    pass\n"
    (tmp_path / "my_nets_7.py").write_text(module)
    make_it = (
        "import numpy as np, sbi_phys as sp\n"
        "p = sp.NormalPrior([sp.Parameter('m')]); t = p.sample(60, np.random.default_rng(0))\n"
        "e = sp.EmbeddingConfig(spec='my_nets_7:Net', settings={'in_features': 1, 'out_features': 3})\n"
        "m = sp.NPE(p, embedding=e, config=sp.TrainConfig(max_epochs=1), device='cpu').fit(t, t + 0.1)\n"
        "m.save('m.pt'); print(m.sample([0.3], 2).tolist())\n"
    )
    read_it = (
        "import sbi_phys as sp\n"
        "try:\n    sp.load('m.pt')\nexcept sp.SbiPhysError as err:\n    print(type(err).__name__, err)\n"
        "print(sp.load('m.pt', allow_import=True, device='cpu').sample([0.3], 2).tolist())\n"
    )

    def run(code: str) -> list[str]:
        env = {"PYTHONPATH": f"{tmp_path}:{Path(sp.__file__).parents[1]}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    first, said = run(make_it), run(read_it)
    assert first[0] == "imported"
    assert said[0].startswith("ModelFileError m.pt: embedding is 'my_nets_7:Net', and the module my_nets_7 has not been imported")
    assert "allow_import=True" in said[0]
    assert said[1:] == ["imported", first[1]]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("shape of a layer", SettingError, r"embedding Broken fails in layer body\.second = Linear\(in_features=5.*which got \(2, 4\)"),
        ("its own code", SettingError, r"fails in its forward, which got x of shape \(2, 6, 6\): KeyError: 'lost'"),
        ("output", ShapeError, r"embedding Broken maps x of shape \(2, 6, 6\) to \(2,\); expected \(2, n_features\)"),
        ("NaN", NonFiniteError, "embedding Broken gives NaN or Inf in its forward"),
    ],
)
def test_failures_name_the_layer(how: str, error: type[Exception], message: str) -> None:
    for embedding in (Broken(how), EmbeddingConfig(spec=f"{HERE}:Broken", settings={"how": how})):
        with pytest.raises(error, match=message):
            make(embedding).fit(*images(40))


def test_the_first_layer_that_gives_nan_is_named() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), Logarithm(), nn.Linear(3, 2))
    with pytest.raises(NonFiniteError, match=r"in layer 2 = Logarithm\(\), which got \(2, 3\)"):
        make(module).fit(*images(40))


def test_a_guard_changes_neither_weights_nor_names_and_leaves_weights_that_diverged_to_the_training() -> None:
    module = CNN()
    names, x = list(module.state_dict()), torch.ones(3, 6, 6)
    out = module(x)
    assert guarded(module, "embedding") is module and isinstance(module, CNN)
    assert list(module.state_dict()) == names and torch.equal(module(x), out)
    assert type(guarded(module, "embedding")).__mro__.count(CNN) == 1
    with torch.no_grad():
        module.conv[0].weight.fill_(torch.nan)
    assert module(x).isnan().all()
    assert type(guarded(ResidualMLP(2, EmbeddingConfig(hidden=2)), "embedding")) is ResidualMLP


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        ("subprocess:Popen", "standard library"),
        (f"{HERE}:NotAModule", "a class, but none of Module; expected a subclass of torch.nn"),
        ("no_module_here:Net", "there is no module 'no_module_here'"),
        ("CNN", "expected 'package.module:Class'"),
        (NotAModule, "the class NotAModule; expected a subclass of torch.nn.Module"),
        (7, "embedding is a int; expected an EmbeddingConfig"),
    ],
)
def test_other_things_are_refused_before_training(embedding: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make(embedding)


def test_a_class_that_no_file_can_name_and_settings_that_contradict() -> None:
    class Local(CNN):
        pass

    with pytest.raises(SettingError, match="Local of a function, which no file can name; expected one at the top"):
        make(Local)
    with pytest.raises(SettingError, match="embedding hidden is 7, of the perceptron, beside spec"):
        EmbeddingConfig(hidden=7, spec=SPEC)
    with pytest.raises(SettingError, match="no spec"):
        EmbeddingConfig(settings={"channels": 1})
    with pytest.raises(SettingError, match="embedding is tests.nets.test_own:CNN; expected None or the EmbeddingConfig"):
        sp.SALLY(embedding=SPEC)
