"""
Title: The swap with its defaults, all data in one table and one figure
Description: Reads the tables of default_swap.py; draws and prints a summary.

    python benchmarks/swap_summary.py --figure docs/images/swap.png

Reads `benchmarks/results/swap-NAME-table.md`, which `default_swap.py` wrote as
`table.md` in its output folder. HALO is shown by its default score. A baseline
is shown by its best score on the set that is reported, to its advantage; "best
baseline" is the best of all methods but HALO. Needs `keras-halo[tools]`.
"""

import argparse
import pathlib
import re

RESULTS = pathlib.Path(__file__).with_name("results")

# What to show: the data, the file of its table, the unknown inputs.
DATA = (
    ("letters, 6 held out", "letters", "held out"),
    ("satellite, 2 held out", "satellite", "held out"),
    ("shuttle, rare states", "shuttle", "rare"),
    ("spoken digits, 3 held out", "speech", "held out"),
    ("MNIST, 3 held out", "mnist", "held out"),
    ("Fashion-MNIST, 7 sets", "fashion", "mean of 7 sets"),
    ("Fashion-MNIST, 0 to 4 held out", "fashion-0-4", "held out"),
    ("Fashion-MNIST, 5 to 9 held out", "fashion-5-9", "held out"),
    ("Fashion-MNIST, memorised", "fashion-memorised", "mean of 7 sets"),
    ("CIFAR-10, CIFAR-100", "cifar10", "CIFAR-100"),
    ("CIFAR-10 in full, CIFAR-100", "cifar10-resnet", "CIFAR-100"),
    ("CLINC150, 30 held out", "clinc-held-out", "held out"),
    ("CLINC150, out of scope", "clinc", "out of scope"),
)
# Of a HALO head: what is shown, and what else packed scores alone give.
DEFAULT, OTHERS = "abstain", ("gap", "gen", "max_logit", "max_probability")
CROSS_ENTROPY, HALO, PUBLISHED = "cross-entropy", "HALO", "HALO, published"
DRAWN = {
    CROSS_ENTROPY: ("tab:gray", "o"),
    "label smoothing": ("tab:olive", "s"),
    "IsoMax+": ("tab:orange", "D"),
    HALO: ("tab:blue", "*"),
}

_NUMBER = re.compile(r"(-?\d+\.\d+)(?: ± (\d+\.\d+))?$")


def read_table(path):
    """Dictionary of method to a dictionary of row to its cell, a string."""
    lines = path.read_text("utf-8").strip().splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    head, body = rows[0][1:], rows[2:]
    return {
        method: {row[0]: row[i + 1] for row in body if row[i + 1]}
        for i, method in enumerate(head)
    }


def mean_and_spread(text):
    """`"92.10 ± 0.26"` as two floats; `None` where there is no spread."""
    found = _NUMBER.search(text)
    return float(found[1]), None if found[2] is None else float(found[2])


def _named_score(part):
    name = part.rsplit(" ", 1 + 2 * ("±" in part))[0]
    return name, mean_and_spread(part)


def auroc(cells, method, unknown):
    """Name, mean and spread of the score that a method is shown by."""
    parts = cells[f"AUROC {unknown}"].split("<br>")
    scores = dict(map(_named_score, parts))
    if method == HALO:
        return (DEFAULT, *scores[DEFAULT])
    best = max(scores, key=lambda name: scores[name][0])
    return (best, *scores[best])


def read_all(folder):
    """Tables by data, those that are there, in the order of `DATA`."""
    for title, name, unknown in DATA:
        path = folder / f"swap-{name}-table.md"
        if path.exists():
            yield title, unknown, read_table(path)


def summary(folder):
    """Markdown, one row a data set."""
    lines = [
        "| %, CE → HALO | accuracy | ECE | AUROC, unknown | best baseline "
        "| AUROC, far noise |",
        "|---" * 6 + "|",
    ]

    def shown(figures, places):
        mean, spread = figures
        text = f"{mean:.{places}f}"
        if spread is None:
            return text
        # A narrow column breaks after the arrow, not within a figure.
        return f"{text}\u00a0±\u00a0{spread:.{places}f}"

    for title, unknown, table in read_all(folder):
        both = [(m, table[m]) for m in (CROSS_ENTROPY, HALO)]

        def known(row, places, both=both):
            cells = [mean_and_spread(cells[row]) for _, cells in both]
            return " → ".join(shown(figures, places) for figures in cells)

        def ranked(what, both=both):
            cells = [auroc(cells, method, what)[1:] for method, cells in both]
            return " → ".join(shown(figures, 1) for figures in cells)

        baselines = {
            method: auroc(cells, method, unknown)[1:]
            for method, cells in table.items()
            if method not in (HALO, PUBLISHED)
        }
        best = max(baselines, key=lambda name, of=baselines: of[name][0])
        row = (
            title,
            known("accuracy", 1),
            known("ECE", 2),
            ranked(unknown),
            f"{shown(baselines[best], 1)}, {best}",
            ranked("far noise"),
        )
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def default_against_best(folder):
    """Markdown: how much another score of the head would gain, chosen best.

    By the mean over all unknown sets of a file, noise included.
    """
    lines = [
        "| % | default score | best other score | difference |",
        "|---" * 4 + "|",
    ]
    for name in dict.fromkeys(name for _, name, _ in DATA):
        path = folder / f"swap-{name}-table.md"
        if not path.exists():
            continue
        cells = read_table(path)[HALO]
        sets = [
            dict(map(_named_score, cells[row].split("<br>")))
            for row in cells
            if row.startswith("AUROC ") and " mean of " not in row
        ]
        means = {
            score: sum(of[score][0] for of in sets) / len(sets)
            for score in (DEFAULT, *OTHERS)
        }
        best = max(OTHERS, key=means.get)
        gain = means[best] - means[DEFAULT]
        lines.append(
            f"| {name}, {len(sets)} sets | {means[DEFAULT]:.2f} | "
            f"{means[best]:.2f} ({best}) | {gain:+.2f} |"
        )
    return "\n".join(lines)


def draw(folder, path):
    """Saves a figure: two AUROCs and the calibration error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tables = list(read_all(folder))
    figure, axes = plt.subplots(
        ncols=3, figsize=(9, 5.2), sharey=True, layout="constrained"
    )
    for row, (_, unknown, table) in enumerate(tables):
        for place, (method, (color, marker)) in enumerate(DRAWN.items()):
            if method not in table:
                continue
            cells = table[method]
            figures = (
                auroc(cells, method, unknown)[1:],
                auroc(cells, method, "far noise")[1:],
                mean_and_spread(cells["ECE"]),
            )
            for ax, (mean, spread) in zip(axes, figures, strict=True):
                ax.errorbar(
                    mean,
                    row + 0.15 * (place - 1.5),
                    xerr=spread,
                    color=color,
                    marker=marker,
                    markersize=11 if method == HALO else 6,
                    markeredgecolor="white",
                    elinewidth=1,
                    zorder=3 if method == HALO else 2,
                    label=method if row == 0 else None,
                )
    axes[0].set(
        yticks=range(len(tables)),
        yticklabels=[title for title, *_ in tables],
        ylim=(len(tables) - 0.5, -0.5),
        xlabel="AUROC, unknown, %",
    )
    axes[1].set_xlabel("AUROC, far noise, %")
    axes[2].set(xscale="log", xlabel="ECE, %, logarithmic")
    for ax, better in zip(axes, ("right", "right", "left"), strict=True):
        ax.set_title(f"further {better} is better", fontsize=9)
        ax.grid(axis="x", alpha=0.3)
        for row in range(1, len(tables)):
            ax.axhline(row - 0.5, color="black", alpha=0.15, lw=0.8)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--results", type=pathlib.Path, default=RESULTS, help="folder of tables"
    )
    parser.add_argument(
        "--figure", type=pathlib.Path, help="where the figure is saved"
    )
    parsed = parser.parse_args(arguments)
    print(f"{summary(parsed.results)}\n")
    print(default_against_best(parsed.results))
    if parsed.figure:
        draw(parsed.results, parsed.figure)


if __name__ == "__main__":
    main()
