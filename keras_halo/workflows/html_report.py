"""An evaluation as one HTML file that needs nothing beside it."""

import base64
import html
import io

import keras

from keras_halo import rejection
from keras_halo.plots.drawing import import_pyplot
from keras_halo.rejection.wording import percent
from keras_halo.version import __version__

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
th:first-child, td:first-child { text-align: left; }
.text td:nth-child(2), .text th:nth-child(2) { min-width: 16rem;
  text-align: left; }
img { background: white; height: auto; max-width: 100%; }
small { opacity: .75; }
"""

_COVERAGES = (0.9, 0.95, 0.99)
_RISKS = (0.01, 0.05)


def html_report(report, title):
    """Writes what `keras_halo.evaluate_ood` found as an HTML page.

    Args:
        report: `keras_halo.OODReport`.
        title: String, the heading.

    Returns:
        String, the whole page: tables, thresholds with their guarantees, and
        pictures.

    Example:

    >>> inputs = keras.Input((4,))
    >>> model = keras.Model(inputs, keras_halo.HALODense(2)(inputs))
    >>> x, y = np.eye(4, dtype="float32"), [0, 1, 0, 1]
    >>> report = keras_halo.evaluate_ood(
    ...     model, (x, y), {"far": 9 * x}, verbose=0, num_bins=4
    ... )
    >>> html_report(report, "digits").startswith("<!DOCTYPE html>")
    True
    """
    known, unknown, footnotes = report.tables()
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>Score: <code>{html.escape(report.method)}</code>, larger for "
        "unknown inputs.</p>",
        "<h2>Unknown inputs</h2>",
        _table(unknown),
        "<h2>Known inputs</h2>",
        _table(known),
        "<h2>Thresholds and what they guarantee</h2>",
        "<p>Fitted on the known inputs of this report. Not guaranteed: "
        f"{rejection.CoverageRule().limits}</p>",
        _table(_thresholds(report), "wide text"),
        "<h2>Pictures</h2>",
        _picture(report),
        f"<p><small>{html.escape(' '.join(footnotes))}<br>keras_halo "
        f"{__version__}, Keras {keras.__version__}, "
        f"{keras.backend.backend()}</small></p>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n"
        "</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _thresholds(report):
    """Rows: a rule, its guarantee, its threshold, what it accepts of each."""
    rows = [["rule", "guarantee", "threshold", "known"]]
    rows[0] += [result.name for result in report.unknown]
    rules = [rejection.CoverageRule(c, method=None) for c in _COVERAGES]
    rules += [rejection.SelectiveRiskRule(r, method=None) for r in _RISKS]
    for rule in rules:
        name = type(rule).__name__
        scores = report.known.scores
        try:
            rule.fit(scores, errors=report.known.errors > 0.5)
        except ValueError as error:
            empty = [""] * (len(rows[0]) - 2)
            rows.append([name, f"cannot be given: {error}", *empty])
            continue
        sets = [scores, *(result.scores for result in report.unknown)]
        rows.append(
            [
                name,
                rule.guarantee,
                f"{rule.threshold:.6g}",
                *(percent(rule.predict(s).coverage) for s in sets),
            ]
        )
    return rows


def _table(rows, kind="wide"):
    header, *body = (
        [html.escape(" ".join(str(cell).split())) for cell in row]
        for row in rows
    )
    lines = ["<tr>" + "".join(f"<th>{c}</th>" for c in header) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in body
    ]
    text = "\n".join(lines)
    return f'<div class="{kind}"><table>{text}</table></div>'


def _picture(report):
    figure = report.plot()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    import_pyplot().close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        '<img alt="Histograms of the score for known and unknown inputs, a '
        'reliability diagram, and risk by coverage" '
        f'src="data:image/png;base64,{encoded}">'
    )
