import numpy as np
import pytest
from scipy.stats import chi2

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.plotting.corner import corner_figure, display_ranges, marginal_density, mass_levels
from sbi_phys.plotting.style import COLOURS
from sbi_phys.priors import Parameter
from tests.report.demo_data import PARAMETERS, PUBLISHED, draws


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    return {"flow": draws(4000, rng), "exact MCMC": draws(4000, rng), "amortised": draws(2000, rng, 1.3)}


@pytest.fixture(scope="module")
def nine(sets):
    return corner_figure(sets, PARAMETERS, published=PUBLISHED)


def legend_texts(fig):
    return [t.get_text() for t in fig.legends[0].get_texts()]


def test_nine_parameters_have_45_panels_with_labels_on_the_rim(nine):
    assert len(nine.axes) == 45
    assert [ax.get_xlabel() for ax in nine.axes if ax.get_xlabel()] == [p.label for p in PARAMETERS]
    assert [ax.get_ylabel() for ax in nine.axes if ax.get_ylabel()] == [p.label for p in PARAMETERS[1:]]
    assert all(np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all() for ax in nine.axes)
    assert legend_texts(nine) == ["flow (68, 95 %)", "exact MCMC", "amortised", "CTG 1st", "far away"]


def test_every_panel_holds_filled_regions_and_two_line_sets(nine):
    panels = [ax for ax in nine.axes if not ax.get_title()]
    assert len(panels) == 36
    for ax in panels:
        contours = [c for c in ax.collections if type(c).__name__ == "QuadContourSet"]
        assert [c.filled for c in contours] == [True, False, False]
        assert all(len(c.get_paths()) == 2 and any(len(p.vertices) for p in c.get_paths()) for c in contours)


def test_frames_stay_within_the_prior_and_fractions_touch_their_edge(nine, sets):
    limits = display_ranges(sets, PARAMETERS)
    assert all(p.low <= low < high <= p.high for p, (low, high) in zip(PARAMETERS, limits, strict=True))
    assert limits[6][0] == 0.0
    assert nine.axes[-1].get_xlim() == pytest.approx(limits[8])


def test_a_fit_outside_the_frame_is_an_arrow_head_and_no_point(nine):
    diagonal, panel = nine.axes[0], nine.axes[1]
    published = [line for line in diagonal.lines if line.get_color() == COLOURS["published"]]
    assert [line.get_marker() for line in published] == ["None", "*", ">"]
    assert [line.get_marker() for line in panel.lines if line.get_color() == COLOURS["published"]] == ["*"]


def test_title_is_median_and_interval_of_the_first_set(nine):
    assert nine.axes[0].get_title().startswith("$") and "^{+" in nine.axes[0].get_title()


@pytest.mark.parametrize("d", [1, 2, 3])
def test_truth_crosses_every_panel(sets, d):
    fig = corner_figure({"a": sets["flow"][:, :d]}, PARAMETERS[:d], truth=sets["flow"][0, :d])
    assert len(fig.axes) == d * (d + 1) // 2
    crosses = [sum(line.get_color() == COLOURS["truth"] for line in ax.lines) for ax in fig.axes]
    assert sum(crosses) == d + 2 * (d * (d - 1) // 2)
    assert legend_texts(fig)[-1] == "truth"


def test_truth_by_name_leaves_the_others_out(sets):
    fig = corner_figure({"a": sets["flow"][:, :2]}, PARAMETERS[:2], truth={"lg_rcut": 18.2})
    assert [sum(line.get_color() == COLOURS["truth"] for line in ax.lines) for ax in fig.axes] == [0, 1, 1]


def test_regions_hold_the_mass_they_name():
    draw = np.random.default_rng(3).normal(size=(200_000, 2))
    density, x, y = np.histogram2d(draw[:, 0], draw[:, 1], bins=60, range=[(-4, 4), (-4, 4)])
    low, high = mass_levels(density, (0.95, 0.68))
    inside = density[np.clip(np.digitize(draw[:, 0], x) - 1, 0, 59), np.clip(np.digitize(draw[:, 1], y) - 1, 0, 59)]
    for level, mass in ((low, 0.95), (high, 0.68)):
        assert np.mean(inside >= level) == pytest.approx(mass, abs=0.01)
        # the density of a Gaussian on the region's border is exp(-r^2 / 2) of the top, r^2 the chi2 quantile
        assert level / density.max() == pytest.approx(np.exp(-chi2.ppf(mass, 2) / 2), abs=0.06)


def test_drawn_contours_hold_the_mass_they_name():
    draw = np.random.default_rng(4).normal(size=(50_000, 2))
    fig = corner_figure({"a": draw, "b": draw}, [Parameter("a"), Parameter("b")])
    lines = next(c for c in fig.axes[1].collections if type(c).__name__ == "QuadContourSet" and not c.filled)
    for path, mass in zip(lines.get_paths(), (0.95, 0.68), strict=True):
        polygon = max(path.to_polygons(), key=len)
        radius = np.hypot(*np.asarray(polygon).T).mean()
        assert radius == pytest.approx(np.sqrt(chi2.ppf(mass, 2)), rel=0.05)


def test_marginal_keeps_its_mass_at_an_edge():
    values = np.abs(np.random.default_rng(5).normal(size=20_000))
    grid, density = marginal_density(values, (0.0, 5.0))
    assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=0.01)
    assert density[0] == pytest.approx(np.sqrt(2 / np.pi), rel=0.08)


def test_degenerate_samples_still_give_a_picture(tmp_path):
    fig = corner_figure({"a": np.zeros((50, 2))}, [Parameter("a", 0, 1), Parameter("b", 0, 1)])
    fig.savefig(tmp_path / "a.png")
    assert all(np.isfinite(ax.get_xlim()).all() for ax in fig.axes)


def test_ranges_are_obeyed_and_checked(sets):
    two = {"a": sets["flow"][:, :2]}
    assert corner_figure(two, PARAMETERS[:2], ranges={"gamma": (-2, 2)}).axes[0].get_xlim() == (-2, 2)
    with pytest.raises(SettingError, match="unknown parameters"):
        corner_figure(two, PARAMETERS[:2], ranges={"gama": (-2, 2)})
    with pytest.raises(SettingError, match="finite low < high"):
        corner_figure(two, PARAMETERS[:2], ranges={"gamma": (2, -2)})


def test_bad_input_is_named(sets):
    with pytest.raises(DataError, match="samples is empty"):
        corner_figure({}, PARAMETERS)
    with pytest.raises(ShapeError, match=r"samples\['flow'\] has shape"):
        corner_figure({"flow": sets["flow"][:, :4]}, PARAMETERS)
    with pytest.raises(NonFiniteError):
        corner_figure({"flow": np.where(sets["flow"] > 18, np.nan, sets["flow"])}, PARAMETERS)
    with pytest.raises(DataError, match="at least 10"):
        corner_figure({"flow": sets["flow"][:3]}, PARAMETERS)
    with pytest.raises(SettingError, match="at most 4"):
        corner_figure({str(k): sets["flow"] for k in range(5)}, PARAMETERS)
    with pytest.raises(ShapeError, match="truth has shape"):
        corner_figure({"flow": sets["flow"]}, PARAMETERS, truth=[1.0])


def test_no_figure_is_left_with_pyplot(sets):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    fig = corner_figure({"a": sets["flow"][:, :2]}, PARAMETERS[:2])
    assert pyplot.get_fignums() == before and fig.canvas.manager is None


def test_a_log_axis_shows_the_density_of_the_logarithm():
    rng = np.random.default_rng(5)
    parameters = [Parameter("flux", 1e-3, 1e3), Parameter("index", 0, 5)]
    theta = np.column_stack([10 ** rng.normal(0, 0.5, 20_000), rng.normal(2.5, 0.3, 20_000)])
    fig = corner_figure({"posterior": theta}, parameters, truth={"flux": 1.0}, log=["flux"])
    diagonal, panel, other = fig.axes
    assert (diagonal.get_xscale(), panel.get_xscale(), panel.get_yscale(), other.get_xscale()) == ("log", "log", "linear", "linear")
    grid, density = diagonal.lines[0].get_data()
    assert grid[np.argmax(density)] == pytest.approx(1.0, rel=0.5)
    decades = np.log10(grid)
    assert np.sum(0.5 * (density[1:] + density[:-1]) * np.diff(decades)) == pytest.approx(1, abs=0.02)  # per decade
    # symmetric in the logarithm: the mass below the median is half of it
    assert np.interp(0.0, decades, density) == pytest.approx(1 / (0.5 * np.sqrt(2 * np.pi)), rel=0.08)
    with pytest.raises(SettingError, match="log has unknown parameters"):
        corner_figure({"posterior": theta}, parameters, log=["fluxes"])
    with pytest.raises(DataError, match="expected values > 0 on a logarithmic axis"):
        corner_figure({"posterior": theta - 1}, parameters, log=["flux"])
