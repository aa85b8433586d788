"""What can be done from a shell: `python -m keras_halo --help`."""

import argparse
import json
import pathlib
import sys
import zipfile

import keras
import numpy as np

from keras_halo import rejection
from keras_halo.layers.guard import Guard
from keras_halo.layers.halo_dense import HALODense
from keras_halo.ops import packing
from keras_halo.ops.labels import fitting_labels
from keras_halo.ops.model_output import FITTED
from keras_halo.ops.ood_scores import OOD_METHODS
from keras_halo.rejection.storage import write_text
from keras_halo.utils.keras_private import flat_layers
from keras_halo.utils.weights import counted_positions
from keras_halo.version import __version__
from keras_halo.workflows.add_abstention import add_abstention
from keras_halo.workflows.evaluate_ood import evaluate_ood
from keras_halo.workflows.graph import find_head
from keras_halo.workflows.guard import guard
from keras_halo.workflows.html_report import html_report
from keras_halo.workflows.predictor import Predictor
from keras_halo.workflows.replay import replay


def main(arguments=None):
    """Runs a command.

    Args:
        arguments: List of strings. Defaults to `None`, those of the process.

    Returns:
        Integer, the exit code: 0 for success, 1 where decisions come out
        otherwise, 2 for input that is no use, which is explained in one line.

    Example:

    >>> main(["report", "no-model.keras", "no-data.npz", "--html", "a.html"])
    2
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ImportError, OSError, ValueError) as error:
        # Keras adds lines of its own to some errors.
        message = " ".join(str(error).split())
        print(f"keras_halo: error: {message}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m keras_halo",
        description='Classifiers that can say "I don\'t know".',
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    report = commands.add_parser(
        "report",
        help="measure a model on known and unknown data; one HTML file",
        description="Measures accuracy, calibration and how well the model "
        "tells unknown inputs from known ones, with thresholds and pictures.",
    )
    report.add_argument("model", help="a .keras file with a HALO head")
    report.add_argument("data", help="known test data: .npz with x and y")
    report.add_argument(
        "--unknown",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="unknown data: .npz with x; may be repeated",
    )
    report.add_argument("--html", required=True, help="the file to write")
    report.add_argument("--json", help="write the numbers here as well")
    report.add_argument(
        "--method", default="abstain", choices=(*OOD_METHODS, FITTED)
    )
    report.add_argument("--batch-size", type=int, default=32)
    report.set_defaults(run=_report)

    guarded = commands.add_parser(
        "guard",
        help="put a rule with a guarantee into a model; one .keras file",
        description="Fits a rule on calibration data and saves a model that "
        "answers as the rule decides. A model without a HALO head gets one, "
        "which takes training data.",
    )
    guarded.add_argument("model", help="a .keras file of a classifier")
    guarded.add_argument("data", help="calibration data: .npz with x and y")
    guarded.add_argument("--output", required=True, help="the .keras file")
    guarded.add_argument(
        "--train", help="training data for a new head: .npz with x and y"
    )
    guarded.add_argument(
        "--coverage",
        type=float,
        default=0.95,
        help="share of known inputs to accept (default: 0.95)",
    )
    guarded.add_argument(
        "--confidence",
        type=float,
        help="with this confidence, and not only on average",
    )
    guarded.add_argument(
        "--method", default="abstain", choices=(*OOD_METHODS, FITTED)
    )
    guarded.set_defaults(run=_guard)

    replayed = commands.add_parser(
        "replay",
        help="make the decisions of a log again; exit code 1 if any differs",
        description="Decides again on the inputs that a log refers to, and "
        "says whether every decision comes out the same.",
    )
    replayed.add_argument("log", help="the file that `DecisionLog` wrote")
    replayed.add_argument("model", help="the guarded .keras file")
    replayed.add_argument("data", help="the inputs: .npz with x")
    replayed.add_argument(
        "--references",
        metavar="NAME",
        help="the array in the data with what the log calls each input "
        "(default: the log holds row numbers)",
    )
    replayed.add_argument("--batch-size", type=int, default=32)
    replayed.set_defaults(run=_replay)
    return parser


def _report(options):
    files = [_named(argument) for argument in options.unknown]
    names = [name for name, _ in files]
    if len(set(names)) < len(names):
        raise ValueError(
            "`--unknown` needs a name of its own for each file. Received: "
            f"{', '.join(names)}."
        )
    model = _model(options.model)
    if any(isinstance(layer, Guard) for layer in flat_layers(model)):
        raise ValueError(
            f"{options.model} is a guarded model, which keeps its scores to "
            "itself. Pass the model that it was made of."
        )
    # Says what is missing.
    find_head(model)
    x, y = _arrays(options.data, model, "y")
    unknown = {name: _arrays(path, model)[0] for name, path in files}
    if not unknown:
        raise ValueError(
            "A report compares known with unknown inputs. Received: no "
            "`--unknown NAME=FILE.npz`."
        )
    found = evaluate_ood(
        model,
        (x, y),
        unknown,
        method=options.method,
        batch_size=options.batch_size,
    )
    title = pathlib.Path(options.model).name
    write_text(html_report(found, title), options.html)
    if options.json:
        write_text(json.dumps(found.to_dict(), indent=1) + "\n", options.json)
    print(found)
    print(f"\nWritten to {options.html}.")
    return 0


def _guard(options):
    if not options.output.endswith(".keras"):
        raise ValueError(
            "`--output` must end in .keras. Received: "
            f"--output={options.output}."
        )
    delta = None
    if options.confidence is not None:
        delta = 1.0 - options.confidence
    rule = rejection.CoverageRule(options.coverage, options.method, delta)
    model = _model(options.model)
    x, y = _arrays(options.data, model, "y")
    layers = flat_layers(model)
    has_head = any(isinstance(layer, HALODense) for layer in layers)
    if not has_head and options.train is None:
        raise ValueError(
            f"{options.model} has no HALO head. Pass `--train FILE.npz`, the "
            "data it was trained on, to have one added."
        )
    if not has_head:
        model = add_abstention(model, *_arrays(options.train, model, "y"))
    scores, mask = Predictor(model).predict(x)
    if mask is not None:
        # Padding is no known input.
        num_classes = packing.count_classes(scores.shape)
        kept = counted_positions(None, scores.shape[:-1], "x", mask)
        y = fitting_labels(y, kept.shape, num_classes)[kept]
        scores = scores[kept]
        print(
            f"Masked positions are left out; {len(scores)} positions of "
            f"{len(mask)} inputs count as independent samples."
        )
    rule.fit(scores, y)
    guard(model, rule).save(options.output)
    print(rule.summary())
    print(f"\nWritten to {options.output}.")
    return 0


def _replay(options):
    guarded = _model(options.model)
    names = () if options.references is None else (options.references,)
    x, *references = _arrays(options.data, guarded, *names)
    found = replay(
        options.log,
        guarded,
        x,
        *references,
        batch_size=options.batch_size,
    )
    print(found)
    return 0 if found.same else 1


def _named(argument):
    name, separator, path = argument.partition("=")
    if not (name and separator and path):
        raise ValueError(
            "`--unknown` must be NAME=FILE.npz. Received: "
            f"--unknown {argument}."
        )
    return name, path


def _model(path):
    if not pathlib.Path(path).is_file():
        raise ValueError(f"There is no model {path}.")
    return keras.models.load_model(path)


def _arrays(path, model, *more):
    """The array `x` of a file, and others by name; `y` are labels."""
    if not pathlib.Path(path).is_file():
        raise ValueError(f"There is no file {path}.")
    keys = ("x", *more)
    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    except (EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no .npz file of numbers: {error}. Write it with "
            "`np.savez(path, x=x, y=y)`."
        ) from error
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(
            f"{path} has no array {missing[0]!r}. Received: "
            f"{', '.join(found) or 'none'}. Write it with `np.savez(path, "
            f"{', '.join(f'{key}={key}' for key in keys)})`."
        )
    arrays = [found[key] for key in keys]
    _check_shape(path, arrays[0], model)
    if more == ("y",) and len(arrays[0]) != len(arrays[1]):
        raise ValueError(
            f"{path} must hold one label for every input. Received: "
            f"{len(arrays[0])} inputs and {len(arrays[1])} labels."
        )
    return arrays


def _check_shape(path, x, model):
    if len(model.inputs) != 1:
        raise ValueError(
            "The command line takes models with one input. Received: "
            f"{len(model.inputs)} inputs. Use `keras_halo.evaluate_ood`."
        )
    expected = model.inputs[0].shape
    if len(x.shape) != len(expected) or any(
        b is not None and a != b
        for a, b in zip(x.shape[1:], expected[1:], strict=True)
    ):
        raise ValueError(
            f"x in {path} must have the shape {tuple(expected)}. Received: "
            f"shape={x.shape}."
        )
