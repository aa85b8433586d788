"""The plots show the numbers they claim to show, in every style."""

import itertools
import subprocess
import sys

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

plt = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")

import keras_halo  # noqa: E402
from keras_halo import metrics, plots  # noqa: E402
from keras_halo.plots import drawing  # noqa: E402

pytestmark = pytest.mark.any_backend

STYLES = ["default", "dark_background"]


@pytest.fixture(autouse=True)
def unchanged_settings():
    before = dict(plt.rcParams)
    yield
    plt.close("all")
    assert dict(plt.rcParams) == before


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def classified(rng, num_samples=400, num_classes=5):
    labels = rng.integers(0, num_classes, num_samples)
    logits = rng.normal(size=(num_samples, num_classes))
    logits[np.arange(num_samples), labels] += 1.5
    p = np.exp(logits)
    return labels, p / p.sum(axis=-1, keepdims=True)


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_reliability_diagram_shows_bins(rng):
    labels, p = classified(rng)
    ax = plots.reliability_diagram(labels, p, num_bins=10)
    confidence, correct = p.max(axis=-1), p.argmax(axis=-1) == labels
    index = np.minimum((confidence * 10).astype(int), 9)
    expected = [
        (confidence[index == b].mean(), correct[index == b].mean())
        for b in range(10)
        if (index == b).any()
    ]
    (points,) = [c for c in ax.collections if c.get_label() == "accuracy"]
    np.testing.assert_allclose(points.get_offsets(), expected, atol=1e-12)
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(
        heights, np.bincount(index, minlength=10) / len(labels)
    )
    (gaps,) = [c for c in ax.collections if c.get_label() == "gap"]
    lengths = [abs(path[1][1] - path[0][1]) for path in gaps.get_segments()]
    shares = [height for height in heights if height]
    assert ax.get_title() == f"ECE {100 * np.dot(lengths, shares):.2g} %"
    assert ax.get_aspect() == 1.0
    for low, high in (ax.get_xlim(), ax.get_ylim()):
        assert low <= 0 and high >= 1


def test_risk_coverage_shows_the_curve_and_the_best_possible(rng):
    errors, uncertainty = rng.random(200) < 0.2, rng.random(200)
    ax = plots.risk_coverage(errors, uncertainty, label="first")
    curve, best = ax.get_lines()
    order = np.argsort(uncertainty)
    kept = np.arange(1, 201)
    np.testing.assert_allclose(curve.get_xdata(), kept / 200)
    np.testing.assert_allclose(
        curve.get_ydata(), np.cumsum(errors[order]) / kept
    )
    assert (best.get_ydata() <= curve.get_ydata() + 1e-12).all()
    assert best.get_ydata()[-1] == curve.get_ydata()[-1] == errors.mean()
    area = (np.cumsum(errors[order]) / kept).mean()
    assert legend_texts(ax)[0] == f"first (AURC {area:.3g})"
    assert ax.get_ylim()[0] == 0

    plots.risk_coverage(errors, errors, ax=ax, label="oracle")
    assert len(ax.get_lines()) == 4
    assert ax.get_lines()[2].get_color() != curve.get_color()
    assert legend_texts(ax).count("best order possible") == 1


def test_a_worse_curve_drawn_later_still_fits_on_the_axes(rng):
    uncertainty = rng.random(200)
    ax = plots.risk_coverage(uncertainty > 0.95, uncertainty, label="good")
    plots.risk_coverage(uncertainty > 0.4, uncertainty, ax=ax, label="bad")
    highest = max(line.get_ydata().max() for line in ax.get_lines())
    bottom, top = ax.get_ylim()
    assert bottom == 0 and top >= highest


def test_risk_coverage_of_one_distinct_uncertainty_is_visible():
    ax = plots.risk_coverage([0, 1, 1, 0], [3.0, 3.0, 3.0, 3.0])
    assert ax.get_lines()[0].get_marker() == "o"
    np.testing.assert_allclose(ax.get_lines()[0].get_xydata(), [[1.0, 0.5]])


def stairs_by_label(ax):
    return {patch.get_label(): patch.get_data() for patch in ax.patches}


def test_histograms_share_bins_and_draw_the_threshold(rng):
    known, near = rng.normal(size=500), rng.normal(3, 1, size=100)
    ax = plots.score_histograms(known, {"near": near}, threshold=2.0)
    drawn = stairs_by_label(ax)
    for scores, name in ((known, "known"), (near, "near")):
        heights, edges = drawn[name].values, drawn[name].edges
        np.testing.assert_allclose(
            heights, np.histogram(scores, edges)[0] / len(scores)
        )
        assert heights.sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(drawn["known"].edges, drawn["near"].edges)
    (line,) = ax.get_lines()
    assert set(line.get_xdata()) == {2.0}
    assert any("2" in text.get_text() for text in ax.texts)
    assert ax.get_xscale() == "linear"


def test_histograms_of_an_array_call_it_unknown(rng):
    ax = plots.score_histograms(rng.random(20), rng.random(30))
    assert legend_texts(ax) == ["known", "unknown"]
    assert ax.get_lines()[:] == []


def test_far_scores_do_not_squeeze_the_known_ones(rng):
    known = rng.normal(10, 1, 500)
    ax = plots.score_histograms(known, {"far": rng.normal(5e4, 10, 100)})
    assert ax.get_xscale() == "symlog"
    data = stairs_by_label(ax)["known"]
    assert (data.values > 0).sum() >= 5
    widths = np.diff(ax.xaxis.get_transform().transform(data.edges))
    np.testing.assert_allclose(widths, widths[0], rtol=1e-6)


def test_a_threshold_beyond_all_scores_is_in_sight(rng):
    ax = plots.score_histograms(rng.random(50), rng.random(50), threshold=7.0)
    assert ax.get_xlim()[0] <= 7.0 <= ax.get_xlim()[1]


@settings(max_examples=25, deadline=None)
@given(
    known=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    unknown=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30),
)
@example(known=[0.0], unknown=[2.3e-302])
@example(known=[0.0], unknown=[1e-305])
@example(known=[0.0], unknown=[2e-309])
@example(known=[0.0], unknown=[5e-324])
def test_no_score_falls_out_of_the_histograms(known, unknown):
    ax = plots.score_histograms(known, {"far": unknown})
    for data in stairs_by_label(ax).values():
        assert data.values.sum() == pytest.approx(1.0)
        assert np.isfinite(data.edges).all()
    plt.close("all")


@pytest.mark.parametrize("embedding_dim", [3, 4, 10, 64])
@pytest.mark.parametrize("mass", [0.5, 0.95])
def test_circle_holds_its_share_of_a_projected_shell(embedding_dim, mass, rng):
    points = rng.normal(size=(40_000, embedding_dim))
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    points *= np.sqrt(embedding_dim - 2)
    radius = plots.shell_radius(embedding_dim, mass)
    inside = np.linalg.norm(points[:, :2], axis=-1) <= radius
    assert inside.mean() == pytest.approx(mass, abs=0.01)


def test_shell_radius_limits():
    assert plots.shell_radius(2) == 0.0
    assert plots.shell_radius(18, mass=1.0) == pytest.approx(4.0)
    gaussian = np.sqrt(-2 * np.log(0.05))
    assert plots.shell_radius(10**6) == pytest.approx(gaussian, rel=1e-4)


def clusters(rng, num_classes, embedding_dim=12, num_samples=300):
    centroids = 3 * rng.normal(size=(num_classes, embedding_dim))
    labels = np.arange(num_samples) % num_classes
    noise = rng.normal(size=(num_samples, embedding_dim))
    centred = centroids - centroids.mean(axis=0)
    return centred[labels] + noise, labels, centroids


def points_of(ax, index):
    return np.asarray(ax.collections[index].get_offsets())


def test_map_is_a_linear_projection_that_keeps_the_origin(rng):
    x, labels, centroids = clusters(rng, 4)
    x[0] = 0.0
    x[3] = x[1] + x[2]
    ax = plots.embedding_map(x, labels, centroids)
    drawn = points_of(ax, 0)
    np.testing.assert_allclose(drawn[0], 0.0, atol=1e-12)
    np.testing.assert_allclose(drawn[3], drawn[1] + drawn[2], atol=1e-9)
    assert (
        np.linalg.norm(drawn, axis=1) <= np.linalg.norm(x, axis=1) + 1e-9
    ).all()
    assert ax.get_aspect() == 1.0
    (name,) = [t for t in ax.texts if "know" in t.get_text()]
    assert tuple(name.xy) == (0, 0)


def test_map_keeps_distances_of_centroids_that_span_a_plane(rng):
    x, labels, centroids = clusters(rng, 3)
    ax = plots.embedding_map(x, labels, centroids)
    drawn = points_of(ax, 1)
    np.testing.assert_allclose(drawn.sum(axis=0), 0.0, atol=1e-9)
    for i, j in itertools.combinations(range(3), 2):
        assert np.linalg.norm(drawn[i] - drawn[j]) == pytest.approx(
            np.linalg.norm(centroids[i] - centroids[j])
        )
    for circle, centre in zip(ax.patches, drawn, strict=True):
        np.testing.assert_allclose(circle.center, centre)
        assert circle.radius == plots.shell_radius(12)


def test_two_centroids_leave_the_second_direction_to_the_embeddings(rng):
    centroids = np.zeros((2, 6))
    centroids[:, 4] = [1.0, -1.0]
    x = rng.normal(size=(200, 6)) * [1, 9, 1, 1, 2, 1]
    ax = plots.embedding_map(x, np.arange(200) % 2, centroids)
    drawn = points_of(ax, 0)
    np.testing.assert_allclose(np.abs(drawn[:, 0]), np.abs(x[:, 4]))
    assert np.abs(np.corrcoef(drawn[:, 1], x[:, 1])[0, 1]) > 0.99
    assert "100 %" in ax.get_xlabel() and "(0 %" in ax.get_ylabel()


@pytest.mark.parametrize("centroids", [None, np.zeros((3, 5))])
def test_embeddings_without_any_spread_can_be_drawn(centroids):
    ax = plots.embedding_map(np.zeros((4, 5)), centroids=centroids)
    np.testing.assert_allclose(points_of(ax, 0), 0.0)


def test_embeddings_of_size_two_are_drawn_as_they_are(rng):
    x = rng.normal(size=(20, 2))
    ax = plots.embedding_map(x, centroids=np.array([[1.0, 3.0], [3.0, 3.0]]))
    np.testing.assert_array_equal(points_of(ax, 0), x)
    np.testing.assert_array_equal(points_of(ax, 1), [[-1, 0], [1, 0]])
    assert ax.patches[:] == []


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_map_names_few_classes_and_gives_many_a_color_bar(
    num_classes, style, rng
):
    x, labels, centroids = clusters(rng, num_classes)
    with plt.style.context(style):
        ax = plots.embedding_map(
            x, labels, centroids, rng.normal(size=(50, 12))
        )
        text_color = plt.rcParams["text.color"]
    names = {text.get_text() for text in ax.texts}
    few = num_classes <= 20
    assert names.issuperset(map(str, range(num_classes))) == few
    assert len(ax.figure.axes) == (1 if few else 2)
    assert len(ax.patches) == num_classes
    assert {text.get_color() for text in ax.texts} == {text_color}
    colors = [tuple(c) for c in ax.collections[0].get_facecolors()]
    by_class = {
        label: {colors[i] for i in np.flatnonzero(labels == label)}
        for label in range(num_classes)
    }
    assert all(len(found) == 1 for found in by_class.values())
    assert len(set.union(*by_class.values())) == num_classes
    assert len(ax.get_legend().get_texts()) == 3


def test_map_thins_points_evenly_and_takes_names(rng):
    x, labels, centroids = clusters(rng, 3)
    ax = plots.embedding_map(
        x, labels, centroids, class_names=["ant", "bee", "cat"], max_points=50
    )
    assert len(points_of(ax, 0)) == 50
    assert {"ant", "bee", "cat"} <= {text.get_text() for text in ax.texts}


@pytest.mark.parametrize("num_classes", [3, 30])
def test_map_takes_names_in_an_array(rng, num_classes):
    names = np.array([f"class {index}" for index in range(num_classes)])
    ax = plots.embedding_map(*clusters(rng, num_classes), class_names=names)
    texts = list(ax.texts)
    if len(ax.figure.axes) > 1:
        texts += ax.figure.axes[-1].get_yticklabels()
    assert {"class 0"} <= {text.get_text() for text in texts}


def test_classes_without_centroids_are_named_at_their_means(rng):
    x, labels, _ = clusters(rng, 3)
    labels = labels * 2
    ax = plots.embedding_map(x, labels, max_points=None)
    drawn = points_of(ax, 0)
    anchors = {text.get_text(): text.xy for text in ax.texts}
    assert set(anchors) - {"0", "2", "4"} == {"I don’t know"}
    for label in (0, 2, 4):
        np.testing.assert_allclose(
            anchors[str(label)], drawn[labels == label].mean(axis=0), atol=1e-9
        )


def test_abstention_over_training_shows_the_metric_too():
    logs = {
        "abstention_rate": [0.5, 0.3, 0.2],
        "val_abstention_rate": [0.6, 0.4, 0.3],
        # What the monitor logs: nothing, and then what it measured last.
        "known_abstention_rate": [np.nan, np.nan, 0.1],
    }
    lines = plots.abstention_over_training(logs, frequency=3).get_lines()
    assert [line.get_label() for line in lines] == [
        "training",
        "validation",
        "known",
    ]
    assert [line.get_xdata().tolist() for line in lines] == [
        [1, 2, 3],
        [1, 2, 3],
        [3],
    ]


def test_what_a_monitor_logs_is_drawn_where_it_measured(rng):
    x = rng.normal(size=(64, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(2)])
    model.compile("adam", keras_halo.HALOLoss())
    monitor = keras_halo.OODMonitor(x, {"far": 9 * x}, frequency=2)
    history = model.fit(
        x, np.arange(64) % 2, epochs=5, verbose=0, callbacks=[monitor]
    )
    logged = history.history["known_abstention_rate"]
    ax = plots.abstention_over_training(history, frequency=2)
    known = ax.get_lines()[0].get_xydata()
    np.testing.assert_allclose(known, [[2, logged[1]], [4, logged[3]]])


def test_abstention_over_training_shows_every_set():
    logs = {
        "loss": [3.0, 2.0],
        "known_abstention_rate": [0.5, 0.1],
        "a_abstention_rate": [0.6, 0.8],
        "b_abstention_rate": [0.4, 0.2],
        "ood_abstention_rate": [0.5, 0.5],
    }
    ax = plots.abstention_over_training(logs)
    drawn = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
    assert list(drawn) == ["known", "a", "b", "mean of unknown"]
    np.testing.assert_allclose(drawn["a"], [[1, 0.6], [2, 0.8]])

    class History:
        history = logs

    again = plots.abstention_over_training(History())
    assert len(again.get_lines()) == 4
    assert list(again.get_lines()[0].get_xdata()) == [1, 2]


def draw_everything(ax, rng):
    labels, p = classified(rng)
    uncertainty = 1 - p.max(axis=-1)
    x, classes, centroids = clusters(rng, 4)
    return {
        "reliability": lambda: plots.reliability_diagram(labels, p, ax=ax),
        "risk": lambda: plots.risk_coverage(
            p.argmax(axis=-1) != labels, uncertainty, ax=ax
        ),
        "histograms": lambda: plots.score_histograms(
            uncertainty, {"a": 2 * uncertainty}, threshold=0.9, ax=ax
        ),
        "map": lambda: plots.embedding_map(
            x, classes, centroids, unknown=x / 3, ax=ax
        ),
        "abstention": lambda: plots.abstention_over_training(
            {"known_abstention_rate": [0.5, 0.2]}, ax=ax
        ),
    }


PLOTS = ["reliability", "risk", "histograms", "map", "abstention"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", PLOTS)
def test_plots_draw_on_the_axes_given_and_in_its_style(name, style, rng):
    with plt.style.context(style):
        figure, ax = plt.subplots()
        assert draw_everything(ax, rng)[name]() is ax
        figure.canvas.draw()
        background = ax.get_facecolor()[:3]
        texts = [*ax.texts, ax.xaxis.label, ax.yaxis.label, ax.title]
        legend = ax.get_legend()
        for text in [*texts, *legend.get_texts()]:
            color = plt.matplotlib.colors.to_rgb(text.get_color())
            assert contrast(color, background) > 7
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", PLOTS)
def test_plots_make_their_own_figure(name, rng):
    ax = draw_everything(None, rng)[name]()
    assert len(plt.get_fignums()) == 1
    assert ax.figure is plt.gcf()
    with pytest.raises(ValueError, match="matplotlib Axes or None"):
        draw_everything(np.array([ax, ax]), rng)[name]()


def luminance(color):
    rgb = np.asarray(color, "float64")
    linear = np.where(
        rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4
    )
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_line_colors_stand_out_from_white_and_from_black():
    for color in drawing.PALETTE[:6]:
        rgb = plt.matplotlib.colors.to_rgb(color)
        assert contrast(rgb, (1, 1, 1)) > 2.9
        assert contrast(rgb, (0, 0, 0)) > 2.9


REFUSED = {
    "labels out of range": (
        lambda: plots.embedding_map(
            np.eye(3), [0, 1, 2], centroids=np.eye(2, 3)
        ),
        r"\[0, 2\)",
    ),
    "labels of another length": (
        lambda: plots.embedding_map(np.eye(3), [0, 1]),
        r"integers of shape \(3,\)",
    ),
    "centroids of another size": (
        lambda: plots.embedding_map(np.eye(3), centroids=np.eye(4)),
        "size of `embeddings`, 3",
    ),
    "NaN embeddings": (
        lambda: plots.embedding_map(np.full((2, 3), np.nan)),
        "finite",
    ),
    "one-dimensional embeddings": (
        lambda: plots.embedding_map(np.zeros(3)),
        "shape `",
    ),
    "names that do not fit": (
        lambda: plots.embedding_map(
            np.eye(3), [0, 1, 0], class_names=["a", "b", "c"]
        ),
        "2 names",
    ),
    "shell mass": (
        lambda: plots.embedding_map(np.eye(3), shell_mass=1.5),
        "mass",
    ),
    "max points": (
        lambda: plots.embedding_map(np.eye(3), max_points=0),
        "max_points",
    ),
    "embedding size": (lambda: plots.shell_radius(1), "at least 2"),
    "no unknown set": (
        lambda: plots.score_histograms([1.0], {}),
        "at least one set",
    ),
    "empty unknown set": (
        lambda: plots.score_histograms([1.0], {"a": []}),
        r"unknown\['a'\]",
    ),
    "NaN scores": (
        lambda: plots.score_histograms([np.nan], [1.0]),
        "finite",
    ),
    "NaN threshold": (
        lambda: plots.score_histograms([1.0], [1.0], threshold=np.nan),
        "threshold",
    ),
    "no bins": (
        lambda: plots.score_histograms([1.0], [1.0], num_bins=0),
        "num_bins",
    ),
    "history without rates": (
        lambda: plots.abstention_over_training({"loss": [1.0]}),
        "OODMonitor",
    ),
    "no history": (
        lambda: plots.abstention_over_training([1.0]),
        "model.fit",
    ),
    "frequency": (
        lambda: plots.abstention_over_training(
            {"known_abstention_rate": [1.0]}, frequency=0
        ),
        "frequency",
    ),
    "too few samples": (
        lambda: plots.reliability_diagram([0], [[1.0, 0.0]]),
        "num_bins",
    ),
    "lengths": (lambda: plots.risk_coverage([0, 1], [1.0]), "errors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_a_figure_is_made(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
    assert plt.get_fignums() == []


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"keras-halo\[tools\]"):
        plots.risk_coverage([0, 1], [0.0, 1.0])


def test_the_package_imports_without_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None; "
        "import keras_halo.plots, keras_halo.workflows, keras_halo.callbacks"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_metrics_shown_are_those_of_the_package(rng):
    labels, p = classified(rng)
    ax = plots.reliability_diagram(labels, p)
    error = metrics.expected_calibration_error(labels, p)
    assert ax.get_title() == f"ECE {100 * error:.2g} %"
