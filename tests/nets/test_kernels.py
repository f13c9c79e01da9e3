"""The kernels in C, and the layer built on them, against torch's own operations: values, gradients, second derivatives."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sbi_phys.core.errors import ShapeError
from sbi_phys.estimators.npe import NPE
from sbi_phys.nets import _kernels, spline
from sbi_phys.nets._kernels import silu_layer
from sbi_phys.nets.spline import arithmetic, n_spline_parameters, rational_quadratic_spline, spline_map, spline_operator
from sbi_phys.priors import NormalPrior, Parameter
from sbi_phys.training.loop import TrainConfig

BOUND = 5.0
needs_kernels = pytest.mark.skipif(_kernels.available() is None, reason="no C compiler for the kernels, or SBI_PHYS_NATIVE=0")


def _case(rows: int, columns: int, n_bins: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, columns, generator=rng), 2 * torch.randn(rows, columns, n_spline_parameters(n_bins), generator=rng)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(((got - want).abs() / (1 + want.abs())).max())


def _spread(got: torch.Tensor, want: torch.Tensor) -> float:
    """The error that one value in ten exceeds; a few fall into the neighbouring bin, where log f' has another slope."""
    return float(((got - want).abs() / (1 + want.abs())).flatten().quantile(0.9))


@needs_kernels
@pytest.mark.parametrize("n_bins", [2, 8, 10, 33, 128])
def test_values_and_gradients_are_as_exact_as_torch_s_in_single_precision(n_bins: int) -> None:
    x, parameters = _case(1003, 2, n_bins, n_bins)
    up, along = torch.randn(2, 1003, 2, generator=torch.Generator().manual_seed(1))
    exact_in = x.double().requires_grad_(), parameters.double().requires_grad_()
    exact = spline_map(*exact_in, bound=BOUND)
    exact_gradients = torch.autograd.grad(exact, exact_in, (up.double(), along.double()))
    plain_in = x.clone().requires_grad_(), parameters.clone().requires_grad_()
    plain = spline._Spline.apply(*plain_in, BOUND)
    plain_gradients = torch.autograd.grad(plain, plain_in, (up, along))
    constants = spline._constants(BOUND)
    got = _kernels.spline_map(x, parameters, constants, inverse=False)
    gradients = _kernels.spline_gradient(x, parameters, up, along, constants)
    for a, b, c in zip((*got, *gradients), (*plain, *plain_gradients), (*exact, *exact_gradients), strict=True):
        assert _spread(a, c.detach()) <= 3 * _spread(b.detach(), c.detach()) + 1e-6
        assert _spread(a, c.detach()) < 2e-3


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 50), columns=st.integers(1, 3), n_bins=st.sampled_from([2, 3, 8, 33]), seed=st.integers(0, 10**6))
def test_a_row_does_not_depend_on_its_neighbours_or_their_number(rows: int, columns: int, n_bins: int, seed: int) -> None:
    x, parameters = _case(64, columns, n_bins, seed)
    up, along = torch.randn(2, 64, columns, generator=torch.Generator().manual_seed(seed + 1))
    constants = spline._constants(BOUND)
    for inverse in (False, True):
        whole, part = (_kernels.spline_map(x[:n], parameters[:n], constants, inverse=inverse) for n in (64, rows))
        assert all(torch.equal(a[:rows], b) for a, b in zip(whole, part, strict=True))
    whole, part = (_kernels.spline_gradient(x[:n], parameters[:n], up[:n], along[:n], constants) for n in (64, rows))
    assert all(torch.equal(a[:rows], b) for a, b in zip(whole, part, strict=True))


@needs_kernels
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), n_bins=st.sampled_from([2, 8, 20]), seed=st.integers(0, 10**6))
def test_the_inverse_undoes_the_map(rows: int, n_bins: int, seed: int) -> None:
    x, parameters = _case(rows, 1, n_bins, seed)
    y, log_slope = _kernels.spline_map(x, parameters, spline._constants(BOUND), inverse=False)
    again, back = _kernels.spline_map(y, parameters, spline._constants(BOUND), inverse=True)
    # an error of one part in 1e6 in y is amplified where the map is flat
    allowed = 2e-5 * BOUND * (1 + (-log_slope).exp())
    assert bool(((again - x).abs() <= allowed).all())
    assert _relative(back, -log_slope) < 2e-2


@needs_kernels
def test_not_a_number_comes_out_as_one() -> None:
    x, parameters = _case(20, 1, 8, 0)
    x[3], x[7] = torch.nan, 1.0
    parameters[7, 0, 2] = torch.nan
    y, log_slope = _kernels.spline_map(x, parameters, spline._constants(BOUND), inverse=False)
    bad = torch.isnan(y).flatten()
    assert bad[3] and bool(torch.isnan(y[7]) | torch.isnan(log_slope[7]))
    assert int(bad.sum()) + int(torch.isnan(log_slope[7])) <= 3
    z = torch.tensor([[1.0, torch.nan, -200.0, 200.0]])
    out = _kernels.silu_map(z.clone(), torch.zeros(4), None)
    assert torch.isnan(out[0, 1]) and out[0, [0, 2, 3]].tolist() == pytest.approx([0.7310586, 0.0, 200.0], abs=1e-6)


@needs_kernels
def test_tails_are_the_identity_far_out_and_at_the_edges() -> None:
    _, parameters = _case(6, 1, 8, 1)
    x = torch.tensor([[-1e6], [-BOUND], [BOUND], [BOUND + 1e-3], [1e6], [torch.inf]])
    y, log_slope = _kernels.spline_map(x, parameters, spline._constants(BOUND), inverse=False)
    assert torch.allclose(y, x, atol=2e-5, rtol=0)
    assert log_slope[[0, 3, 4, 5]].abs().max() == 0
    g_x, g_p = _kernels.spline_gradient(x, parameters, torch.ones(6, 1), torch.ones(6, 1), spline._constants(BOUND))
    assert g_x[[0, 3, 4]].flatten().tolist() == [1, 1, 1] and g_p[[0, 3, 4]].abs().max() == 0


@needs_kernels
def test_second_derivatives_go_through_the_recorded_map() -> None:
    x, parameters = _case(5, 1, 4, 2)

    def bend(x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(rational_quadratic_spline(x, parameters, bound=BOUND)[0].sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        return second

    assert torch.allclose(bend(x, parameters).double(), bend(x.double(), parameters.double()), rtol=1e-2, atol=1e-4)


@needs_kernels
def test_the_operator_for_compiled_graphs_keeps_torch_s_rules() -> None:
    x, parameters = _case(20, 2, 4, 3)
    args = (x.requires_grad_(), parameters.requires_grad_(), list(spline._constants(BOUND)))
    torch.library.opcheck(
        torch.ops.sbi_phys.spline.default, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
    y, log_slope = spline_operator(x, parameters, spline._constants(BOUND))
    got = torch.autograd.grad(y.sum() + 2 * log_slope.sum(), (x, parameters))
    want = _kernels.spline_gradient(x.detach(), parameters.detach(), torch.ones(20, 2), torch.full((20, 2), 2.0), spline._constants(BOUND))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _kernels.available.cache_clear()
    yield tmp_path
    _kernels.available.cache_clear()


@needs_kernels
def test_the_library_is_built_once_into_the_cache_folder(fresh: Path) -> None:
    (fresh / "sbi_phys").mkdir()
    (fresh / "sbi_phys").chmod(0o777)
    assert _kernels.available() is not None
    assert (fresh / "sbi_phys").stat().st_mode & 0o777 == 0o700  # closed to others
    (built,) = (fresh / "sbi_phys").iterdir()
    before = built.stat().st_mtime_ns
    _kernels.available.cache_clear()
    assert _kernels.available() is not None
    assert built.stat().st_mtime_ns == before


@needs_kernels
def test_without_a_compiler_or_when_switched_off_the_same_map_is_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, parameters = _case(30, 1, 8, 4)
    fast = rational_quadratic_spline(x, parameters, bound=BOUND)
    _kernels.available.cache_clear()
    monkeypatch.setenv("SBI_PHYS_NATIVE", "0")
    assert _kernels.available() is None and not _kernels.usable(x)
    plain = rational_quadratic_spline(x, parameters, bound=BOUND)
    assert all(_relative(a, b) < 3e-4 for a, b in zip(fast, plain, strict=True))
    _kernels.available.cache_clear()
    monkeypatch.setenv("SBI_PHYS_NATIVE", "1")
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert _kernels.available() is None


@needs_kernels
def test_a_compiler_that_fails_leaves_nothing_behind(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "bin" / "cc"
    broken.parent.mkdir()
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent))
    monkeypatch.setenv("CC", str(broken))
    assert _kernels.available() is None
    assert list((fresh / "sbi_phys").iterdir()) == []


@needs_kernels
@pytest.mark.skipif(os.geteuid() == 0 or shutil.which("cc") is None, reason="root may write everywhere; or no cc")
def test_a_cache_folder_that_cannot_be_written_is_passed_over(fresh: Path) -> None:
    fresh.chmod(0o500)
    assert _kernels.available() is not None


@needs_kernels
def test_float64_other_devices_and_odd_shapes_take_the_other_way() -> None:
    x, parameters = _case(4, 1, 8, 5)
    assert _kernels.usable(x, parameters) and not _kernels.usable(x.double()) and not _kernels.usable(x.to("meta"))
    shared = parameters[:1].expand(4, 1, -1)
    assert spline._fits(x, shared)  # a view: made contiguous on the way
    assert torch.equal(rational_quadratic_spline(x, shared, bound=BOUND)[0], rational_quadratic_spline(x, shared.clone(), bound=BOUND)[0])
    assert not spline._fits(x, parameters[:1])  # not one row of parameters for each value


def _exact(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, skip: bool) -> torch.Tensor:
    hidden = F.silu(x @ weight.t() + shift)
    return x + hidden if skip else hidden


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 20), skip=st.booleans(), per_row=st.booleans(), seed=st.integers(0, 10**6))
def test_values_and_gradients_of_the_layer(rows: int, width: int, skip: bool, per_row: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    n_in = width if skip else 3
    x, weight = torch.randn(rows, n_in, generator=rng), torch.randn(width, n_in, generator=rng)
    # rows of a wider tensor, as the shares of a context are
    wide = torch.randn(rows, width + 5, generator=rng)
    shift, grad = wide[:, 2 : 2 + width] if per_row else wide[0, :width], torch.randn(rows, width, generator=rng)
    inputs = [t.detach().clone() if t is not shift else t.detach() for t in (x, weight, shift)]
    for t in inputs:
        t.requires_grad_()
    out = silu_layer(*inputs, skip=skip)
    got = torch.autograd.grad(out, inputs, grad)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    want_out = _exact(doubles[0], doubles[1], doubles[2], skip)
    want = torch.autograd.grad(want_out, doubles, grad.double())
    assert torch.allclose(out.double(), want_out, rtol=1e-5, atol=2e-5)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and torch.allclose(a.double(), b, rtol=1e-4, atol=2e-4)
    with torch.no_grad():
        assert torch.allclose(silu_layer(*inputs, skip=skip), out, rtol=1e-6, atol=1e-6)


def test_only_the_gradients_of_the_layer_that_are_wanted_are_made() -> None:
    x, weight, shift = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True), torch.randn(2)
    silu_layer(x, weight, shift).sum().backward()
    assert weight.grad is not None and x.grad is None and shift.grad is None


@pytest.mark.parametrize("skip", [False, True])
def test_second_derivatives_of_the_layer_in_single_precision(skip: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, shift = torch.randn(3, 3, generator=rng), torch.randn(3, generator=rng)

    def bend(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(silu_layer(x, weight, shift, skip=skip).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        return second

    x = torch.randn(6, 3, generator=rng)
    assert torch.allclose(bend(x, weight, shift).double(), bend(x.double(), weight.double(), shift.double()), rtol=1e-3, atol=1e-4)


def test_the_input_is_left_as_it_was_and_autograd_sees_changes_to_it() -> None:
    x, weight, shift = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True), torch.randn(3)
    kept = x.clone()
    out = silu_layer(x, weight, shift, skip=True)
    assert torch.equal(x, kept)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("shape", [(2,), (1,), (7, 1), (1, 4), (2, 4), (3, 4)])
def test_a_shift_of_another_shape_is_never_read_past_its_end(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(7, 3), torch.randn(4, 3)
    shift = torch.randn(shape)
    try:
        want = F.silu(x @ weight.t() + shift)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            silu_layer(x, weight, shift)
    else:
        assert torch.allclose(silu_layer(x, weight, shift), want, atol=1e-6)


@needs_kernels
def test_the_kernels_refuse_arrays_whose_shapes_do_not_belong_together() -> None:
    z, constants = torch.randn(7, 4), spline._constants(BOUND)
    for bad in (torch.randn(2), torch.randn(1, 4), torch.randn(3, 4), torch.randn(8, 4)):
        with pytest.raises(ShapeError, match="expected a contiguous z"):
            _kernels.silu_map(z.clone(), bad, None)
    with pytest.raises(ShapeError, match="base"):
        _kernels.silu_map(z.clone(), torch.zeros(4), torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="equal shapes"):
        _kernels.silu_gradient(z, torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="float32"):
        _kernels.silu_map(z.clone(), torch.zeros(4).bfloat16(), None)
    x, parameters = _case(6, 2, 4, 0)
    for p in (parameters[:3], parameters[..., :-1], torch.zeros(6, 2, 3 * 129 - 1)):
        with pytest.raises(ShapeError, match="3K - 1"):
            _kernels.spline_map(x, p, constants, inverse=False)
    with pytest.raises(ShapeError, match="grad_y"):
        _kernels.spline_gradient(x, parameters, x[:3], x, constants)
    with pytest.raises(ShapeError, match="skip connection"):
        silu_layer(torch.randn(7, 3), torch.randn(4, 3), torch.zeros(4), skip=True)


def test_under_autocast_the_layer_is_torch_s() -> None:
    # the product of float32 matrices is bfloat16 there, which the kernels would read and write past its end
    x, weight, shift = torch.randn(50, 30), torch.randn(30, 30, requires_grad=True), torch.randn(30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = silu_layer(x, weight, shift, skip=True)
        assert torch.equal(out, _kernels._plain(x, weight, shift, True))
        assert arithmetic(torch.device("cpu"), "bf16") == "torch"
    assert torch.allclose(out.float(), silu_layer(x, weight, shift, skip=True), atol=0.2)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernels), False])
def test_the_gradient_beyond_the_limit_of_the_parameters_is_that_of_the_map(native: bool) -> None:
    x, parameters = _case(200, 1, 6, 6)
    parameters[::2, :, 1] = 31.0
    parameters[1::2, :, 3] = -42.0
    parameters[::3, :, 8] = 60.0
    parameters[::5, :, 0] = 30.0  # on the limit itself the gradient is that from within
    exact_in = x.double().requires_grad_(), parameters.double().requires_grad_()
    ones = torch.ones_like(x)
    want = torch.autograd.grad(spline_map(*exact_in, bound=BOUND), exact_in, (ones.double(), ones.double()))
    if native:
        got = _kernels.spline_gradient(x, parameters, ones, ones, spline._constants(BOUND))
    else:
        plain_in = x.clone().requires_grad_(), parameters.clone().requires_grad_()
        got = torch.autograd.grad(spline._Spline.apply(*plain_in, BOUND), plain_in, (ones, ones))
    beyond = parameters[..., :12].abs() > 30
    assert beyond.any() and not want[1][..., :12][beyond].any() and not got[1][..., :12][beyond].any()
    assert _spread(got[1], want[1]) < 1e-4 and _spread(got[0], want[0]) < 1e-3


@needs_kernels
@pytest.mark.parametrize("n_bins", [32, 64, 128])
@pytest.mark.parametrize("inverse", [False, True])
def test_with_many_bins_the_kernel_is_more_exact_than_sums_in_single_precision(n_bins: int, inverse: bool) -> None:
    x, parameters = _case(20_000, 1, n_bins, n_bins)
    x = x.clamp(-BOUND, BOUND)
    exact = spline_map(x.double(), parameters.double(), bound=BOUND, inverse=inverse)
    plain = spline_map(x, parameters, bound=BOUND, inverse=inverse)
    kernel = _kernels.spline_map(x, parameters, spline._constants(BOUND), inverse=inverse)
    for a, b, c in zip(kernel, plain, exact, strict=True):
        errors = [float(((t.double() - c).abs() / (1 + c.abs())).median()) for t in (a, b)]
        assert errors[0] < 0.8 * errors[1]


@needs_kernels
def test_the_self_test_accepts_the_library_and_finds_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _kernels.available()
    assert library is not None and _kernels._agrees(library)
    right = _kernels._spline_gradient
    monkeypatch.setattr(_kernels, "_spline_gradient", lambda *a: (right(*a)[0], 1.1 * right(*a)[1]))
    with pytest.warns(RuntimeWarning, match="do not give the numbers of torch"):
        assert not _kernels._agrees(library)


@needs_kernels
def test_a_library_in_the_cache_that_cannot_be_trusted_is_built_anew(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _kernels.available() is not None
    (entry,) = (fresh / "sbi_phys").iterdir()
    whole, built = entry.read_bytes(), []

    def build(handle: int, folder: Path, name: str, command: list[str]) -> bool:
        built.append(name)
        entry.unlink(missing_ok=True)
        entry.write_bytes(whole)
        entry.chmod(0o700)
        return True

    monkeypatch.setattr(_kernels, "_build", build)
    contents = {"truncated": whole[:9000], "empty": b"", "changed": whole[:-1] + b"?", "text": b"no library", "mode": whole, "link": whole}
    for number, (damage, content) in enumerate(contents.items(), start=1):
        entry.unlink()
        if damage == "link":
            (fresh / "other.so").write_bytes(content)
            entry.symlink_to(fresh / "other.so")
        else:
            entry.write_bytes(content)
            entry.chmod(0o722 if damage == "mode" else 0o700)
        _kernels.available.cache_clear()
        assert _kernels.available() is not None, damage
        assert len(built) == number, damage
    _kernels.available.cache_clear()
    assert _kernels.available() is not None and len(built) == len(contents)


@needs_kernels
def test_a_cache_folder_that_is_a_link_or_of_another_user_is_passed_over(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "elsewhere").mkdir()
    (fresh / "sbi_phys").symlink_to(fresh / "elsewhere")
    monkeypatch.setattr(tempfile, "tempdir", str(fresh / "tmp"))
    assert _kernels.available() is not None
    assert not list((fresh / "elsewhere").iterdir())
    (folder,) = (fresh / "tmp").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and len(list(folder.iterdir())) == 1
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(PermissionError, match="another user"):
        _kernels._private(folder)
    with open(next(folder.iterdir()), "rb") as file:
        assert not _kernels._trusted(file.fileno(), next(folder.iterdir()).name)


@needs_kernels
def test_code_that_this_processor_cannot_run_is_found_in_a_process_of_its_own(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "kernels.c"
    broken.write_text(_kernels._SOURCE.read_text().replace("    lane in, v, out_y,", "    __builtin_trap(); lane in, v, out_y,"))
    monkeypatch.setattr(_kernels, "_SOURCE", broken)
    assert _kernels.available() is None
    assert list((fresh / "sbi_phys").iterdir()) == []


@needs_kernels
def test_what_computed_a_training_stands_in_its_record(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = NormalPrior([Parameter("mu")])
    theta = prior.sample(60, np.random.default_rng(0))
    histories = []
    for switch in ("1", "0"):
        monkeypatch.setenv("SBI_PHYS_NATIVE", switch)
        _kernels.available.cache_clear()
        model = NPE(prior, config=TrainConfig(max_epochs=2)).fit(theta, theta)
        model.save(fresh / "model.pt")
        histories.append(NPE.load(fresh / "model.pt").history[0])
    assert [[epoch["arithmetic"] for epoch in history] for history in histories] == [["kernels"] * 2, ["torch"] * 2]
