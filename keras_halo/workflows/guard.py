import json
import os
import pathlib
import zipfile
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.layers.guard import Guard
from keras_halo.layers.halo_dense import HALODense
from keras_halo.rejection import storage
from keras_halo.rejection.fitted import Fingerprint
from keras_halo.rejection.readings import read_scores
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.utils.checks import check_model
from keras_halo.utils.keras_private import flat_layers
from keras_halo.workflows.graph import (
    find_head,
    free_name,
    input_structure,
    warn_of_idle_statistics,
    warn_of_preprocessor,
)

_GUARD = "keras_halo>Guard"


def guard(model: keras.Model, rule: RejectionRule) -> keras.Model:
    """Returns a model that answers as a rule decides, in one file.

    The new model shares all layers with the given one. It carries the rule,
    what the rule guarantees, and the counts of its calibration data, saves and
    loads as any Keras model, and decides alike in every format that Keras
    exports to. `keras_halo.read_certificate` reads the guarantee out of the
    file without running it.

    The guarantee is that of the model as it was when the rule was fitted. What
    changes the given model later (`fit`, `calibrate`, new weights) changes the
    guarded one: save it first. Guarded models refuse `training=True`, with
    which the head would follow what it judges. A rule with `method="fitted"`
    knows the head that it was fitted on, but not the Gaussians: after another
    `fit_class_gaussians`, fit it again.

    Args:
        model: Functional or sequential model that emits packed scores, or a
            model of `keras_halo.fit_class_gaussians`.
        rule: A rule of `keras_halo.rejection`, fitted on what this model
            predicted for calibration data.

    Returns:
        `keras.Model` with the inputs of `model` that emits a dictionary:
        `"label"`, -1 for rejected; `"probabilities"` of the classes, of shape
        `(batch_size, ..., K)`; `"score"`, larger for outliers; and
        `"p_value"`, the chance that a known input scores as high. A rule that
        was fitted on outliers, or saved by keras_halo 0.1.0, has no p-values.
        With a `LabelSetRule` also `"label_set"`, booleans of shape
        `(batch_size, ..., K)`.

    Raises:
        ValueError: If the rule is not fitted, was fitted on another model or
            on plain scores, judges batches and not inputs or by groups of the
            user, or the model has no HALO head.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras_halo.HALODense(3)]
    ... )
    >>> scores = model.predict(rng.normal(size=(200, 4)), verbose=0)
    >>> rule = keras_halo.rejection.CoverageRule(0.9).fit(scores)
    >>> guarded = keras_halo.guard(model, rule)
    >>> answers = guarded.predict(rng.normal(size=(5, 4)), verbose=0)
    >>> answers["label"].shape, answers["probabilities"].shape
    ((5,), (5, 3))
    >>> keras_halo.read_certificate(guarded)["calibration"]["samples"]
    200

    References:

    - Vladimir Vovk, Alex Gammerman, Glenn Shafer, Algorithmic Learning in a
      Random World, 2005. (P-values by rank.)
    """
    check_model(model)
    if not isinstance(rule, RejectionRule):
        raise ValueError(
            "`rule` must be a rule of `keras_halo.rejection`. Received: "
            f"rule={rule!r:.100}. Fit one: `rejection.CoverageRule(0.95)"
            ".fit(model.predict(x_calibration))`."
        )
    certificate = rule.certificate()
    rule.require_judging_singly()
    if rule.method is None:
        raise ValueError(
            "A rule with method=None judges scores that the model does not "
            f"emit. Received: {rule!r}. Use a rule with one of "
            "`keras_halo.OOD_METHODS`, or `rule.to_layer()` in a model that "
            "computes the score."
        )
    rule.check_head(_fingerprint(find_head(model)))
    warn_of_idle_statistics(model)
    warn_of_preprocessor(model)
    layer = Guard(certificate, name=free_name(model, "guard"))
    output = model.outputs[0] if len(model.outputs) == 1 else model.output
    return keras.Model(input_structure(model), layer(output))


def _fingerprint(head):
    features = np.zeros((1, head.input_spec.axes[-1]), "float32")
    scores = ops.convert_to_numpy(head(features, training=False))
    return read_scores(scores, "abstain").fingerprint


def _check_unchanged(model, certificate):
    """Raises `ValueError` where a guarded model has another head by now."""
    heads = [
        layer for layer in flat_layers(model) if isinstance(layer, HALODense)
    ]
    if len(heads) != 1 or certificate["fingerprint"] is None:
        return
    try:
        Fingerprint(**certificate["fingerprint"]).check_same(
            _fingerprint(heads[0])
        )
    except ValueError as error:
        raise ValueError(
            "The model has changed since its rule was fitted, by `fit`, "
            "`calibrate`, new weights or calls with `training=True`: its "
            "certificate does not hold any more. Fit the rule and guard the "
            f"model again. ({error})"
        ) from error


def read_certificate(
    source: keras.Model | str | os.PathLike[str],
) -> dict[str, Any]:
    """Reads what a guarded model guarantees, without running it.

    Args:
        source: A model of `keras_halo.guard`, or the path of the `.keras` file
            that it was saved to.

    Returns:
        Dictionary, see `RejectionRule.certificate`. `"guarantee"` and
        `"limits"` are in words.

    Raises:
        ValueError: If there is no guard, its certificate was edited, or the
            head of the model has changed since the rule was fitted.
        OSError: If there is no such file.

    Example:

    >>> import tempfile, os
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras_halo.HALODense(3)]
    ... )
    >>> scores = model.predict(np.eye(40, 4), verbose=0)
    >>> rule = keras_halo.rejection.CoverageRule(0.9).fit(scores)
    >>> path = os.path.join(tempfile.mkdtemp(), "guarded.keras")
    >>> keras_halo.guard(model, rule).save(path)
    >>> keras_halo.read_certificate(path)["calibration"]["samples"]
    40
    """
    if isinstance(source, keras.Model):
        found = [
            layer.certificate
            for layer in flat_layers(source)
            if isinstance(layer, Guard)
        ]
    elif isinstance(source, (str, os.PathLike)):
        found = _certificates_in(_config_of(pathlib.Path(source)))
    else:
        raise ValueError(
            "`source` must be a model or the path of a `.keras` file. "
            f"Received: source={source!r:.100}."
        )
    if len(found) != 1:
        raise ValueError(
            "Expected a model of `keras_halo.guard(model, rule)`, or its "
            f"file. Received: {len(found)} guards in {source!r:.100}."
        )
    storage.check_intact(found[0], source)
    if isinstance(source, keras.Model):
        _check_unchanged(source, found[0])
    return found[0]


def _config_of(path):
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("config.json"))
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no `.keras` file of a model: {error}. Pass the file "
            "that `guarded.save(path)` wrote."
        ) from error


def _certificates_in(config):
    if isinstance(config, list):
        parts = config
    elif isinstance(config, dict):
        if config.get("registered_name") == _GUARD:
            return [config["config"]["certificate"]]
        parts = config.values()
    else:
        return []
    return [found for part in parts for found in _certificates_in(part)]
