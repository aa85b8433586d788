import numbers
from collections.abc import Sequence

import numpy as np

from keras_halo.ops.class_statistics import ClassStatistics
from keras_halo.ops.labels import class_indices
from keras_halo.plots import drawing
from keras_halo.plots.projection import principal_plane, shell_radius
from keras_halo.utils.checks import (
    as_integer,
    as_list,
    check_finite,
    check_not_masked,
    to_array,
)
from keras_halo.utils.types import ArrayLike, Axes

# More classes than this get a colour bar instead of labels at their centroids.
_MAX_LABELLED = 20


def embedding_map(
    embeddings: ArrayLike,
    labels: ArrayLike | None = None,
    centroids: ArrayLike | None = None,
    unknown: ArrayLike | None = None,
    ax: Axes = None,
    class_names: Sequence[str] | None = None,
    shell_mass: float | None = 0.95,
    max_points: int | None = 2000,
) -> Axes:
    """Draws embeddings, centroids, shells and the origin in two dimensions.

    The map is an orthogonal projection onto the plane in which the centroids
    (or, without centroids, the embeddings) vary most. It is linear: the origin,
    where "I don't know" sits, stays where it is, lengths are never stretched,
    and the axes are in units of the embedding's components. What a projection
    cannot show is height: points that fall on the origin may be far above it.
    The axes tell what share of the variance they show. Embeddings of size 2
    are drawn as they are.

    The circle around a centroid holds the share `shell_mass` of the
    projection of the class's shell, see `shell_radius`.

    Args:
        embeddings: Array of shape `(N, D)`, the inputs of the head.
        labels: Optional integers of shape `(N,)`, the classes by which points
            are coloured. Defaults to `None`.
        centroids: Optional array of shape `(K, D)`, the `centroids` of the
            head; they are centred onto the origin as the head does it.
            Defaults to `None`.
        unknown: Optional array of shape `(M, D)`, embeddings of inputs that
            belong to no class. Defaults to `None`.
        ax: Optional matplotlib `Axes` to draw on. Defaults to `None`, the axes
            of a new figure.
        class_names: Optional sequence of `K` strings, written at the centroids
            instead of the numbers of the classes. Defaults to `None`.
        shell_mass: Float in `(0, 1]`, or `None` for no circles. Defaults to
            `0.95`.
        max_points: Integer, how many embeddings, and how many unknown ones, to
            draw at most, taken at even steps through the array; `None` draws
            all. The projection always sees all. Defaults to `2000`.

    Returns:
        The `Axes`.

    Raises:
        ValueError: If shapes do not fit each other, values are not finite, or
            `class_names` are no names of as many classes.
        ImportError: If matplotlib is missing.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> centroids = 3 * np.eye(3, 8)
    >>> labels = np.arange(30) % 3
    >>> ax = keras_halo.plots.embedding_map(
    ...     centroids[labels] + rng.normal(size=(30, 8)), labels, centroids
    ... )
    >>> len(ax.patches)
    3
    """
    embeddings = _finite_matrix(embeddings, "embeddings")
    embedding_dim = embeddings.shape[-1]
    if centroids is not None:
        centroids = _same_size(centroids, "centroids", embedding_dim)
        centroids = centroids - centroids.mean(axis=0)
    if unknown is not None:
        unknown = _same_size(unknown, "unknown", embedding_dim)
    if labels is not None:
        num_classes = None if centroids is None else len(centroids)
        labels = class_indices(
            labels,
            num_classes,
            (len(embeddings),),
            remedy="Pass inputs of no class as `unknown`.",
        )
    class_names = _read_names(class_names, labels, centroids)
    if max_points is not None:
        max_points = as_integer(
            max_points, "max_points", 1, ", or `None` for all"
        )
    radius = None
    if shell_mass is not None:
        radius = shell_radius(embedding_dim, shell_mass)

    plane, shares = principal_plane(
        embeddings if centroids is None else centroids, embeddings
    )
    ax = drawing.axes_or_new(ax)
    colors = _ClassColors(labels, centroids)
    _draw_embeddings(ax, embeddings @ plane, labels, colors, max_points)
    if unknown is not None:
        _draw_unknown(ax, unknown @ plane, max_points)
    if centroids is not None:
        _draw_centroids(ax, centroids @ plane, colors, radius)
    anchors = None
    if centroids is not None:
        anchors = centroids @ plane
    elif labels is not None:
        anchors = _class_means(embeddings @ plane, labels)
    if anchors is not None:
        _name_classes(ax, colors, class_names, anchors)
    _draw_origin(ax, embeddings @ plane)
    has_circles = radius and centroids is not None
    _draw_legend(ax, unknown is not None, has_circles, shell_mass)
    of_what = "embeddings'" if centroids is None else "centroids'"
    _label_axes(ax, embedding_dim, shares, of_what)
    return ax


def _finite_matrix(values, argument):
    values = to_array(values, argument)
    if values.ndim != 2 or len(values) == 0 or values.shape[-1] < 2:
        raise ValueError(
            f"`{argument}` must have the shape `(N, D)` with at least one row "
            f"and two columns. Received: shape={values.shape}. Flatten "
            "positions of tokens or pixels into rows."
        )
    check_finite(values, argument)
    return values


def _same_size(values, argument, embedding_dim):
    values = _finite_matrix(values, argument)
    if values.shape[-1] != embedding_dim:
        raise ValueError(
            f"`{argument}` must be of the size of `embeddings`, "
            f"{embedding_dim}. Received: shape={values.shape}. Take the "
            "inputs of the head, not its outputs."
        )
    return values


def _count_classes(labels, centroids):
    if centroids is not None:
        return len(centroids)
    return 0 if labels is None else int(labels.max()) + 1


def _read_names(class_names, labels, centroids):
    if class_names is None:
        return None
    check_not_masked(class_names, "class_names")
    num_classes = _count_classes(labels, centroids)
    expected = f"a list of {num_classes} names, one a class"
    remedy = "Give each class a string, in the order of their numbers."
    # Numbers are names too.
    kinds = (str, numbers.Number)
    names = as_list(class_names, "class_names", kinds, expected, remedy)
    if len(names) != num_classes:
        raise ValueError(
            f"`class_names` must be {expected}. Received: {len(names)} names. "
            f"{remedy}"
        )
    return names


class _ClassColors:
    """Ten colours by name, or a colour map once there are more classes."""

    def __init__(self, labels, centroids):
        from matplotlib import colors

        self.num_classes = _count_classes(labels, centroids)
        if self.num_classes <= len(drawing.PALETTE):
            self.map = colors.ListedColormap(drawing.PALETTE)
            self.norm = colors.NoNorm()
        else:
            # Neither end of the map, which white or black would swallow.
            viridis = drawing.import_pyplot().get_cmap("viridis")
            self.map = colors.ListedColormap(
                viridis(np.linspace(0.2, 0.92, self.num_classes))
            )
            self.norm = colors.Normalize(-0.5, self.num_classes - 0.5)

    def of(self, classes):
        return self.map(self.norm(classes))


def _thinned(points, max_points):
    """Indices of at most `max_points` points at even steps."""
    if max_points is None or len(points) <= max_points:
        return np.arange(len(points))
    return np.linspace(0, len(points) - 1, int(max_points)).astype(int)


def _draw_embeddings(ax, points, labels, colors, max_points):
    chosen = _thinned(points, max_points)
    ax.scatter(
        *points[chosen].T,
        s=9,
        linewidths=0,
        alpha=0.5,
        color=drawing.KNOWN_COLOR
        if labels is None
        else colors.of(labels[chosen]),
        zorder=2,
    )


def _draw_unknown(ax, points, max_points):
    ax.scatter(
        *points[_thinned(points, max_points)].T,
        s=13,
        marker="x",
        linewidths=0.7,
        alpha=0.45,
        color=drawing.text_color(),
        zorder=1.9,
    )


def _draw_centroids(ax, points, colors, radius):
    from matplotlib.patches import Circle

    classes = np.arange(len(points))
    few = len(points) <= _MAX_LABELLED
    if radius:
        for point, color in zip(points, colors.of(classes), strict=True):
            ax.add_patch(
                Circle(
                    point,
                    radius,
                    fill=False,
                    edgecolor=color,
                    linewidth=1.5 if few else 0.7,
                    alpha=0.9 if few else 0.5,
                    zorder=3,
                )
            )
    ax.scatter(
        *points.T,
        s=60 if few else 22,
        color=colors.of(classes),
        edgecolors=drawing.text_color(),
        linewidths=1 if few else 0.5,
        zorder=4,
    )


def _class_means(points, labels):
    """Means of the classes, NaN for a class without points."""
    num_classes = int(labels.max()) + 1
    statistics = ClassStatistics(num_classes, points.shape[-1], pooled=True)
    statistics.update(points, labels)
    is_empty = statistics.counts[:, None] == 0
    return np.where(is_empty, np.nan, statistics.means)


def _name_classes(ax, colors, class_names, anchors):
    if colors.num_classes > _MAX_LABELLED:
        _draw_color_bar(ax, colors, class_names)
        return
    names = range(len(anchors)) if class_names is None else class_names
    for name, point in zip(names, anchors, strict=True):
        if np.isfinite(point).all():
            ax.annotate(
                str(name),
                point,
                xytext=_outwards(point),
                textcoords="offset points",
                ha="center",
                va="center",
                fontweight="bold",
                color=drawing.text_color(),
                path_effects=drawing.outlined(ax),
                zorder=6,
            )


def _outwards(point, distance=11):
    """Offset of a label away from the crowd around the origin."""
    length = np.linalg.norm(point)
    return distance * (point / length if length > 0 else np.array([0, 1]))


def _draw_color_bar(ax, colors, class_names):
    from matplotlib.cm import ScalarMappable

    bar = ax.figure.colorbar(
        ScalarMappable(colors.norm, colors.map), ax=ax, label="class"
    )
    step = -(-colors.num_classes // 10)
    ticks = np.arange(0, colors.num_classes, step)
    names = range(colors.num_classes) if class_names is None else class_names
    bar.set_ticks(ticks, labels=[str(names[tick]) for tick in ticks])


def _emptiest_corner(points):
    """The corner, `(0 or 1, 0 or 1)`, to which the fewest points lie."""
    corners = [(0, 0), (1, 0), (1, 1), (0, 1)]
    lengths = np.linalg.norm(points, axis=-1) + 1e-12

    def crowd(corner):
        direction = (2.0 * np.array(corner) - 1.0) / np.sqrt(2.0)
        # Within about 15 degrees of the line to the corner.
        return np.sum(points @ direction > 0.966 * lengths)

    return min(corners, key=crowd)


def _draw_origin(ax, points):
    color = drawing.text_color()
    right, top = _emptiest_corner(points)
    ax.scatter(
        0,
        0,
        s=130,
        marker="+",
        linewidths=2.2,
        color=color,
        zorder=5,
        path_effects=drawing.outlined(ax),
    )
    # Named from a corner, because the middle of the map is crowded.
    ax.annotate(
        "I don\N{RIGHT SINGLE QUOTATION MARK}t know",
        (0, 0),
        xytext=(0.03 + 0.94 * right, 0.04 + 0.92 * top),
        textcoords="axes fraction",
        ha="right" if right else "left",
        va="center",
        fontstyle="italic",
        color=color,
        arrowprops={
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.8,
            "shrinkB": 7,
            "path_effects": drawing.outlined(ax),
        },
        path_effects=drawing.outlined(ax),
        zorder=6,
    )


def _draw_legend(ax, has_unknown, has_circles, shell_mass):
    from matplotlib.lines import Line2D

    color = drawing.text_color()

    def handle(label, marker, size, **style):
        style = {"color": color, "linestyle": "", **style}
        return Line2D([], [], marker=marker, ms=size, label=label, **style)

    handles = [handle("known", ".", 6, alpha=0.6)]
    if has_unknown:
        handles.append(handle("unknown", "x", 5, alpha=0.7))
    if has_circles:
        label = f"{100 * shell_mass:g} % of the shell of a class"
        handles.append(handle(label, "o", 11, markerfacecolor="none"))
    ax.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(handles),
        frameon=False,
    )


def _label_axes(ax, embedding_dim, shares, of_what):
    ax.set_aspect("equal", adjustable="datalim")
    if embedding_dim == 2:
        ax.set(xlabel="component 0", ylabel="component 1")
        return
    names = [
        f"direction {number} ({100 * share:.0f} % of the {of_what} variance)"
        for number, share in enumerate(shares, start=1)
    ]
    ax.set(xlabel=names[0], ylabel=names[1])
