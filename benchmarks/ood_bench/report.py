"""Tables of finished runs: Markdown to read, CSV to compute with."""

import csv
import os

import keras
import numpy as np

from keras_halo import __version__
from keras_halo.metrics import aurc

# Key, header, factor and decimals of each column.
KNOWN_COLUMNS = (
    ("accuracy", "accuracy", 100, 2),
    ("ece", "ECE", 100, 2),
    ("ece_scaled", "ECE, scaled", 100, 2),
    ("ece_with_abstain", "ECE, abstain", 100, 2),
    ("ece_if_calibrated", "ECE, if calibrated", 100, 2),
    ("nll", "NLL", 1, 3),
    ("nll_scaled", "NLL, scaled", 1, 3),
    ("nll_with_abstain", "NLL, abstain", 1, 3),
    ("brier", "Brier", 1, 3),
    ("brier_scaled", "Brier, scaled", 1, 3),
    ("brier_with_abstain", "Brier, abstain", 1, 3),
    ("abstained", "abstained", 100, 2),
)
COST_COLUMNS = (
    ("parameters", "parameters", 1, 0),
    ("seconds", "training, s", 1, 0),
    ("cpu_seconds", "training, CPU s", 1, 0),
    ("epoch_seconds", "epoch, s", 1, 1),
    ("peak_mib", "memory, MiB", 1, 0),
)
MEAN_COLUMNS = (
    ("auroc", "AUROC", 100, 1),
    ("fpr95_known_positive", "FPR@95 known+", 100, 1),
    ("fpr95_unknown_positive", "FPR@95 unknown+", 100, 1),
    ("aupr_unknown_positive", "AUPR unknown+", 100, 1),
    ("aupr_known_positive", "AUPR known+", 100, 1),
)
RISK_COLUMNS = (
    ("aurc", "AURC ‰", 1000, 1),
    ("augrc", "AUGRC ‰", 1000, 1),
)

NOTES = """\
Mean ± standard deviation over the seeds; how many, the first table says.
Accuracies, ECE, AUROC, AUPR, FPR and shares in %. ECE with 15 bins of equal
width. NLL in nats, Brier score between 0 and 2.

- *Summary*: AURC is that of the largest probability; the detectors are those
  that are best by *choose by*, of all that store nothing and of all that keep
  more than a temperature, and their AUROC is the mean over the unknown sets.
- *scaled*: after a temperature fitted to the validation images. *abstain*:
  HALO's probabilities as they are, with the mass of abstaining missing from
  the classes; everything else is of the classes alone, summing to one.
- *if calibrated*: the ECE that a perfectly calibrated model with the same
  probabilities measures on as many images, labels drawn from these
  probabilities. A smaller ECE cannot be told from perfect calibration.
- *accuracy* is of the best class, also where the model abstains; *abstained*
  says how often that is on known images.
- FPR@95 *known+*: unknown accepted while 95 % of known are (ODIN);
  *unknown+*: known flagged while 95 % of unknown are (OpenOOD v1.5).
- AUPR is average precision with the named side as the positive one.
- AURC and AUGRC in thousandths: errors of the best class, ordered by the
  detector.
- *unit*: fitted to features that are scaled to length one.
- *keeps*: numbers that the detector stores besides the network.
- *choose by*: AUROC of validation images against synthetic outliers, none of
  which is among the sets that are reported. Settings may be chosen by it.
- *CPU s*: time of all cores together, which other programs on the same
  machine prolong less than the time on the clock. *epoch, s*: on the clock,
  median over the epochs after the first, which compiles.
  *memory*: peak of the process up to the end of training, libraries and
  images included."""


# Of the known images, what the summary shows.
SUMMARY_COLUMNS = KNOWN_COLUMNS[:3]


def write(folder, results, command):
    """Writes `table.md`, `known.csv` and `detectors.csv`.

    Args:
        folder: String.
        results: List of `Settings`, record and arrays of every run.
        command: List of strings, what was called.

    Returns:
        String, the part of the text that fits on a screen.
    """
    heading, tables = _heading(results, command), _tables(results)
    text = "\n\n".join([heading, *tables, NOTES])
    with open(os.path.join(folder, "table.md"), "w", encoding="utf-8") as file:
        file.write(text + "\n")
    _write_csv(os.path.join(folder, "known.csv"), _known_rows(results))
    _write_csv(os.path.join(folder, "detectors.csv"), _detector_rows(results))
    return "\n\n".join([heading, tables[0]])


def _heading(results, command):
    settings, record, _ = results[0]
    arguments = " ".join(_without_folders(part) for part in command)
    held_out = f", without classes {settings.hold_out}"
    return (
        f"`{arguments}`\n\n"
        f"{settings.dataset}{held_out if settings.hold_out else ''}: "
        f"{record['training']['num_train']:,} images to train, "
        f"{settings.epochs} epochs, {record['num_test']:,} test images. "
        f"keras_halo {__version__}, Keras {keras.__version__} on "
        f"{settings.backend}."
    )


def _without_folders(argument):
    """An argument of the command line; of `NAME=PATH` the name stays."""
    name, equals, path = argument.rpartition("=")
    return name + equals + os.path.basename(path)


def groups(results):
    """Runs of the same network and method, in the order of the plan."""
    grouped = {}
    for settings, record, arrays in results:
        key = (settings.network, settings.method)
        grouped.setdefault(key, []).append((record, arrays))
    return grouped


def _summary(results):
    """One row for each training, detectors chosen by synthetic outliers."""
    grouped = groups(results)
    _, aurc_header, factor, _ = RISK_COLUMNS[0]
    rows = [
        [
            "trained",
            "seeds",
            *(column[1] for column in SUMMARY_COLUMNS),
            aurc_header,
            "without post-hoc state",
            "AUROC",
            "fitted",
            "AUROC",
            "keeps",
        ]
    ]
    for key, runs in grouped.items():
        records = [record for record, _ in runs]
        known = [record["known"] for record in records]
        nothing_stored, fitted = best_detectors(records)
        rows.append(
            [
                _title(grouped, *key),
                str(len(runs)),
                *_cells(known, SUMMARY_COLUMNS),
                cell(
                    [aurc(a["errors"], a["uncertainty"]) for _, a in runs],
                    factor,
                    2,
                ),
                *_detector_cells(records, nothing_stored)[:2],
                *_detector_cells(records, fitted),
            ]
        )
    return rows


def best_detectors(records):
    """Names of the best by synthetic outliers, as the summary has them.

    Args:
        records: List of the records of all seeds of a training.

    Returns:
        Pair of names: of all that store nothing, and of all that keep more
        than a temperature; `None` where there is none.
    """
    detectors = records[0]["detectors"]

    def best(names):
        return max(
            names,
            key=lambda name: sum(
                r["detectors"][name]["synthetic_auroc"] for r in records
            ),
            default=None,
        )

    return (
        best([n for n, d in detectors.items() if d["storage"] == 0]),
        best([n for n, d in detectors.items() if d["storage"] > 1]),
    )


def _detector_cells(records, name):
    if name is None:
        return "", "", ""
    found = [record["detectors"][name] for record in records]
    aurocs = [mean_over_sets(detector)["auroc"] for detector in found]
    return name, cell(aurocs, 100, 1), f"{found[0]['storage']:,}"


def _title(grouped, network, method):
    many = len({network for network, _ in grouped}) > 1
    return f"{network}, {method}" if many else method


def _tables(results):
    grouped = groups(results)
    known = [
        ["trained", "seeds", *(c[1] for c in KNOWN_COLUMNS + COST_COLUMNS)],
    ]
    per_set = [["trained", "detector", *_set_names(results), "mean"]]
    means = [
        [
            "trained",
            "detector",
            *(c[1] for c in MEAN_COLUMNS + RISK_COLUMNS),
            "keeps",
            "choose by",
        ],
    ]
    for key, runs in grouped.items():
        records = [record for record, _ in runs]
        known.append(
            [
                _title(grouped, *key),
                str(len(records)),
                *_cells([r["known"] for r in records], KNOWN_COLUMNS),
                *_cells([_costs(r["training"]) for r in records], COST_COLUMNS),
            ]
        )
        for detector in records[0]["detectors"]:
            found = [r["detectors"][detector] for r in records]
            row = [_title(grouped, *key), detector]
            aurocs = [
                [entry["sets"][name]["auroc"] for entry in found]
                for name in _set_names(results)
            ]
            aurocs.append(np.mean(aurocs, axis=0))
            per_set.append([*row, *(cell(a, 100, 1) for a in aurocs)])
            means.append(
                [
                    *row,
                    *_cells([mean_over_sets(f) for f in found], MEAN_COLUMNS),
                    *_cells(found, RISK_COLUMNS),
                    f"{found[0]['storage']:,}",
                    cell([f["synthetic_auroc"] for f in found], 100, 1),
                ]
            )
    return (
        "**Summary**\n\n" + markdown(_summary(results)),
        "**Known images**\n\n" + markdown(known),
        "**AUROC against each unknown set**\n\n" + markdown(per_set),
        "**Means over the unknown sets, and selective prediction**\n\n"
        + markdown(means),
    )


def mean_over_sets(detector):
    """Every measure of separation, each set counting the same."""
    sets = list(detector["sets"].values())
    return {key: np.mean([s[key] for s in sets]) for key in sets[0]}


def _set_names(results):
    return list(next(iter(results[0][1]["detectors"].values()))["sets"])


def _costs(training):
    seconds = training["epoch_seconds"]
    return {
        **training,
        "epoch_seconds": float(np.median(seconds[1:] or seconds)),
    }


def _cells(records, columns):
    return [
        cell([record.get(key) for record in records], factor, decimals)
        for key, _, factor, decimals in columns
    ]


def cell(values, factor, decimals):
    """Mean ± standard deviation of a figure; nothing where one is missing."""
    if any(value is None for value in values):
        return ""
    values = factor * np.array(values, "float64")
    text = f"{values.mean():.{decimals}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.{decimals}f}"
    return text


def markdown(rows):
    """A Markdown table of rows of strings, the first of them the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def _run_columns(settings, record):
    return {
        "dataset": settings.dataset,
        "network": settings.network,
        "trained": settings.method,
        "seed": settings.seed,
        "backend": settings.backend,
        "epochs": settings.epochs,
        "num_train": record["training"]["num_train"],
        "num_test": record["num_test"],
        "hold_out": " ".join(map(str, settings.hold_out)),
    }


def _known_rows(results):
    for settings, record, _ in results:
        for part in ("known", "validation"):
            yield {
                **_run_columns(settings, record),
                "images": "test" if part == "known" else part,
                **record[part],
                **{
                    key: value
                    for key, value in _costs(record["training"]).items()
                    if not isinstance(value, list)
                },
            }


def _detector_rows(results):
    for settings, record, _ in results:
        for name, detector in record["detectors"].items():
            shared = {
                key: value for key, value in detector.items() if key != "sets"
            }
            for unknown, measures in detector["sets"].items():
                yield {
                    **_run_columns(settings, record),
                    "detector": name,
                    "unknown": unknown,
                    **measures,
                    "abstained": record["abstained"][unknown],
                    **shared,
                }


def _write_csv(path, rows):
    rows = list(rows)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _short(v) for k, v in row.items()} for row in rows)


def _short(value):
    """What tables are made of: no figure has more digits to it."""
    return f"{value:.5g}" if isinstance(value, float) else value
