from typing import Any

import keras

from keras_halo.ops.class_statistics import ClassStatistics
from keras_halo.utils.batches import check_readable, labelled_data
from keras_halo.utils.checks import as_boolean, check_batch_size, check_verbose
from keras_halo.utils.types import Data
from keras_halo.workflows.collecting import check_labels, collect
from keras_halo.workflows.graph import (
    find_head,
    head_tensors,
    input_structure,
    warn_of_preprocessor,
)


def collect_statistics(
    model: keras.Model,
    x: Data,
    y: Any = None,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    sample_weight: Any = None,
    pooled: bool = False,
) -> ClassStatistics:
    """Measures means and scatter of the embeddings of each class.

    It is the pass of `fit_class_gaussians` over the data, apart: where these
    lie on several machines, each of them collects the statistics of its shard,
    `state()` of them travels, and `merge` joins them. Statistics merge in any
    order to those of one pass, to rounding. A shard may lack classes.

    Args:
        model: A trained functional or sequential model with one `HALODense`
            head.
        x: Inputs of the shard, or a dataset, as in `fit_class_gaussians`.
        y: Labels, as there.
        batch_size: Integer, as in `model.predict`. Defaults to 32.
        verbose: `"auto"`, 0, 1 or 2, as in `model.predict`. Defaults to
            `"auto"`.
        sample_weight: Optional weights; what has a weight of zero is left
            out. Defaults to `None`.
        pooled: Boolean, whether one scatter for all classes together is
            enough: `fit_class_gaussians` needs one of each. Defaults to
            `False`.

    Returns:
        `ClassStatistics`.

    Raises:
        ValueError: If the model has not exactly one head or is subclassed,
            labels do not fit, or embeddings are not finite.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(60, 4)), np.arange(60) % 3
    >>> model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    >>> statistics = collect_statistics(model, x[:20], y[:20], verbose=0)
    >>> for start in (20, 40):
    ...     part = slice(start, start + 20)
    ...     statistics.merge(
    ...         collect_statistics(model, x[part], y[part], verbose=0)
    ...     )
    >>> fitted = keras_halo.fit_class_gaussians(model, statistics)
    >>> sorted(fitted.predict(x, verbose=0))
    ['ood', 'scores']
    """
    batch_size = check_batch_size(batch_size)
    verbose = check_verbose(verbose)
    pooled = as_boolean(pooled, "pooled")
    embeddings, scores = head_tensors(model)
    warn_of_preprocessor(model)
    units = find_head(model).units
    data = labelled_data(x, y, sample_weight)
    check_labels(data, model, units, scores.shape[:-1], None)
    check_readable(data, "x")
    statistics = ClassStatistics(units, embeddings.shape[-1], pooled)
    collect(
        keras.Model(input_structure(model), embeddings),
        data,
        batch_size,
        verbose,
        statistics.update,
    )
    return statistics
