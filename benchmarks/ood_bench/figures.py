"""Pictures of finished runs."""

import os

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from keras_halo.plots import reliability_diagram, risk_coverage
from keras_halo.plots.drawing import PALETTE
from ood_bench.methods import HALO, METHODS
from ood_bench.report import best_detectors, groups, mean_over_sets


def draw(folder, results):
    """Writes a set of pictures for each network.

    Args:
        folder: String.
        results: List of `Settings`, record and arrays of every run.
    """
    grouped = groups(results)
    for network in dict.fromkeys(network for network, _ in grouped):
        runs = {m: r for (n, m), r in grouped.items() if n == network}
        for name, figure in {
            "auroc": _mean_aurocs(runs),
            "auroc_by_set": _aurocs_by_set(runs),
            "reliability": _reliability(runs),
            "risk_coverage": _risk_coverage(runs),
        }.items():
            path = os.path.join(folder, f"{name}-{network}.png")
            figure.savefig(path, dpi=100)
            plt.close(figure)


def _mean_aurocs(runs):
    """One row a detector: a dot for each seed, a bar at the mean."""
    rows = []
    for method, seeds in runs.items():
        records = [record for record, _ in seeds]
        color = PALETTE[0 if isinstance(METHODS[method], HALO) else 1]
        for detector, filled in zip(
            best_detectors(records), (False, True), strict=True
        ):
            if detector is not None:
                values = [
                    100 * mean_over_sets(r["detectors"][detector])["auroc"]
                    for r in records
                ]
                label = f"{method} · {detector}"
                rows.append((np.mean(values), values, label, color, filled))
    rows.sort()
    figure, ax = plt.subplots(
        figsize=(8, 1.5 + 0.25 * len(rows)), layout="constrained"
    )
    for y, (mean, values, _, color, filled) in enumerate(rows):
        ax.plot(
            values,
            [y] * len(values),
            "o",
            color=color,
            markerfacecolor=color if filled else "none",
            alpha=0.7,
            ms=5,
        )
        ax.plot(mean, y, "|", color=color, ms=13, mew=2.5)
    ax.set_yticks(range(len(rows)), [row[2] for row in rows], fontsize=8)
    ax.set(
        xlabel="AUROC, mean over the unknown sets, %; dots are seeds,\n"
        "filled where the detector is fitted after the training",
        ylim=(-1, len(rows)),
        title="Of each training, the detector that does best on validation\n"
        "images and synthetic outliers: HALO blue, baselines orange",
    )
    ax.grid(alpha=0.3)
    return figure


def _aurocs_by_set(runs):
    """A table of colours: every detector of each training by set."""
    labels, table = [], []
    for method, seeds in runs.items():
        for detector, entry in seeds[0][0]["detectors"].items():
            labels.append(f"{method} · {detector}")
            table.append(
                [
                    100
                    * np.mean(
                        [
                            r["detectors"][detector]["sets"][name]["auroc"]
                            for r, _ in seeds
                        ]
                    )
                    for name in entry["sets"]
                ]
            )
    names = list(entry["sets"])
    figure, ax = plt.subplots(
        figsize=(4 + 0.75 * len(names), 2 + 0.22 * len(labels)),
        layout="constrained",
    )
    image = ax.imshow(table, aspect="auto", cmap="RdYlGn", vmin=0, vmax=100)
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            # Dark text on the pale middle of the scale, light on its ends.
            ax.text(
                column,
                row,
                f"{value:.1f}",
                ha="center",
                va="center",
                fontsize=7,
                color="black" if 12 < value < 92 else "white",
            )
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    figure.colorbar(image, label="AUROC, mean over the seeds, %", aspect=40)
    return figure


def _reliability(runs):
    """Confidence against accuracy of each training's first seed."""
    figure, axes = _panels(len(runs))
    for ax, (method, seeds) in zip(axes, runs.items(), strict=True):
        record, arrays = seeds[0]
        reliability_diagram(arrays["labels"], arrays["probabilities"], ax=ax)
        if ax is not axes[0]:
            ax.get_legend().remove()
        ax.set_title(f"{method}: ECE {100 * record['known']['ece']:.1f} %")
    return figure


def _risk_coverage(runs):
    """The most certain answers of each training beside those of the first."""
    first, *others = [
        (method, seeds[0][1]["errors"], seeds[0][1]["uncertainty"])
        for method, seeds in runs.items()
    ]
    pairs = [(first, other) for other in others] or [(first,)]
    figure, axes = _panels(len(pairs))
    for ax, pair in zip(axes, pairs, strict=True):
        for method, errors, uncertainty in pair:
            risk_coverage(errors, uncertainty, ax=ax, label=method)
        if ax is not axes[0]:
            ax.sharey(axes[0])
        ax.legend(loc="upper left", fontsize=7)
    return figure


def _panels(count):
    """A figure with so many axes, four in a row."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(4 * columns, 4 * rows),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, axes.flat[:count]
