"""Draws the figures of "How it works", with the package itself.

    KERAS_BACKEND=jax python docs/figures.py

Needs `keras-halo[tools]`. Every figure is drawn for the light and for the dark
scheme of the site.
"""

import pathlib

import keras
import numpy as np
from keras import ops
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

from keras_halo import HALODense, HALOLoss, decode_predictions
from keras_halo.ops import geometry

IMAGES = pathlib.Path(__file__).parent / "images"
SCHEMES = {
    "light": {"text": "#222222", "edge": "#888888", "page": "#ffffff"},
    "dark": {"text": "#e4e4ea", "edge": "#8a8c99", "page": "#1e2129"},
}
COLORS = ["#1c7ed6", "#e8590c", "#2f9e44", "#ae3ec9"]
STAR = {"marker": "*", "color": "#f2b705", "markeredgecolor": "black"}


def train_on_digits(dim, num_classes):
    """A small network on the 8 x 8 digits of scikit-learn, and test data."""
    keras.utils.set_random_seed(0)
    digits = load_digits(n_class=num_classes)
    x = (digits.data / 16.0).astype("float32")
    y = digits.target
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[: len(x) // 2], order[len(x) // 2 :]
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(dim),
            HALODense.reference(num_classes),
        ]
    )
    model.compile(keras.optimizers.Adam(2e-3), HALOLoss(distill=False))
    model.fit(x[train], y[train], epochs=60, verbose=0)
    return model, x[test], y[test]


def soap_bubble(trained_3d, trained_16d):
    """Embeddings on shells in three dimensions, and radii in sixteen."""
    model, x, y = trained_3d
    backbone = keras.Sequential(model.layers[:-1])
    points = ops.convert_to_numpy(backbone(x))
    centroids = ops.convert_to_numpy(model.layers[-1].centroids)
    centroids = centroids - centroids.mean(axis=0)
    figure = plt.figure(figsize=(9, 4))
    ax = figure.add_subplot(1, 2, 1, projection="3d")
    radius = np.sqrt(3 * geometry.shell(3))
    turn, tilt = np.mgrid[0 : 2 * np.pi : 25j, 0 : np.pi : 13j]
    sphere = np.stack(
        [
            np.cos(turn) * np.sin(tilt),
            np.sin(turn) * np.sin(tilt),
            np.cos(tilt),
        ]
    )
    for digit, centroid in enumerate(centroids):
        color = COLORS[digit]
        surface = centroid[:, None, None] + radius * sphere
        ax.plot_wireframe(*surface, color=color, lw=0.4, alpha=0.5)
        ax.scatter(*points[y == digit].T, color=color, s=7, depthshade=False)
    ax.plot([0], [0], [0], ls="", markersize=15, **STAR)
    ax.set_axis_off()
    ax.set_box_aspect((1, 1, 1), zoom=1.4)
    ax.set_title("an embedding of 3 dimensions")

    model, x, y = trained_16d
    predictions = decode_predictions(model.predict(x, verbose=0))
    own = predictions.squared_radius[np.arange(len(y)), y]
    ax = figure.add_subplot(1, 2, 2)
    ax.hist(own, bins=40, density=True, color=COLORS[0], alpha=0.8)
    shell = geometry.shell(16)
    ax.axvline(shell, color=COLORS[1], lw=2)
    ax.text(shell + 0.03, ax.get_ylim()[1] * 0.95, "shell", color=COLORS[1])
    ax.set(
        xlim=(0, 2.5),
        yticks=[],
        xlabel="squared distance to the own centroid",
        title="an embedding of 16 dimensions",
    )
    return figure


def plane(half_width, count=220):
    axis = np.linspace(-half_width, half_width, count, dtype="float32")
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    return grid.reshape(-1, 2), (count, count)


def where_abstain_lives():
    """P(abstain) over an embedding of two dimensions, of two heads."""
    rng = np.random.default_rng(0)
    centroids = np.array([[0, 2.6], [2.3, -1.3], [-2.3, -1.3]], "float32")
    heads = {
        "the published head": HALODense.reference(3),
        "the default head": HALODense(3, embedding_dim=None),
    }
    points, shape = plane(9)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
    for ax, (title, head) in zip(axes, heads.items(), strict=True):
        head.build((None, 2))
        head.centroids.assign(centroids)
        # It places its backgrounds by what it is trained with.
        for _ in range(300):
            x = centroids[rng.integers(0, 3, 100)] * 1.2
            x = x + rng.normal(scale=0.5, size=x.shape)
            head(x.astype("float32"), training=True)
        scores = ops.convert_to_numpy(head(points))
        abstain = decode_predictions(scores).abstain_probability
        image = ax.imshow(
            abstain.reshape(shape),
            extent=(-9, 9, -9, 9),
            origin="lower",
            cmap="viridis",
            vmin=0.0,
            vmax=1.0,
        )
        bar = figure.colorbar(image, ax=ax, fraction=0.046)
        bar.outline.set_visible(False)
        ax.scatter(*x.T, s=4, color="white", alpha=0.6)
        for name, centroid in zip("ABC", centroids, strict=True):
            ax.text(
                *centroid,
                name,
                ha="center",
                va="center",
                color="black",
                bbox={"boxstyle": "circle", "facecolor": "white"},
            )
        ax.plot(0, 0, ls="", markersize=15, **STAR)
        ax.set(xticks=[], yticks=[], title=title)
    figure.suptitle("probability of “I don’t know”", y=0.97)
    return figure


def packed_scores(trained):
    """One row of packed scores, and what softmax makes of it."""
    model, x, _ = trained
    row = model.predict(x[:1], verbose=0)[0]
    shares = ops.convert_to_numpy(ops.softmax(row[None]))[0]
    units = model.layers[-1].units
    names = [f"$s_{{{k}}}$" for k in range(units)]
    names += ["$a$", "$|x|^2$", r"$\gamma$", "$D$", r"$\kappa$", "layout"]
    num_geometry = len(row) - units - 1
    figure, ax = plt.subplots(figsize=(9, 3))
    kinds = [COLORS[0]] * units + [COLORS[1]] + [COLORS[2]] * num_geometry
    ax.bar(range(len(row)), shares, color=kinds)
    for column, (value, share) in enumerate(zip(row, shares, strict=True)):
        is_huge = abs(value) > 1e6
        text = f"{value:.1e}" if is_huge else f"{value:.1f}"
        turn = 90 if is_huge else 0
        ax.text(
            column, share + 0.03, text, ha="center", fontsize=8, rotation=turn
        )
    ax.set_xticks(range(len(row)), names)
    ax.set(ylim=(0, 1.15), ylabel="after softmax")
    middle = units + 0.5 * (num_geometry + 1)
    parts = ((0.5 * (units - 1), "classes"), (units, "abstain"))
    for place, name in (*parts, (middle, "geometry")):
        ax.text(
            place, -0.24, name, ha="center", transform=ax.get_xaxis_transform()
        )
    return figure


def draw(name, make, *arguments):
    for scheme, colors in SCHEMES.items():
        settings = {
            f"{part}.{which}": colors["text"]
            for part, which in (
                ("text", "color"),
                ("axes", "labelcolor"),
                ("axes", "titlecolor"),
                ("xtick", "color"),
                ("ytick", "color"),
            )
        }
        settings |= {"axes.edgecolor": colors["edge"]}
        settings |= {"axes.facecolor": colors["page"]}
        with plt.rc_context(settings):
            figure = make(*arguments)
            path = IMAGES / f"{name}-{scheme}.png"
            figure.savefig(
                path, dpi=110, facecolor=colors["page"], bbox_inches="tight"
            )
            plt.close(figure)
        print(path.name, path.stat().st_size // 1000, "kB")


if __name__ == "__main__":
    trained_16d = train_on_digits(16, 10)
    draw("soap-bubble", soap_bubble, train_on_digits(3, 4), trained_16d)
    draw("packed-scores", packed_scores, trained_16d)
    draw("where-abstain-lives", where_abstain_lives)
