from typing import Any

import keras

from keras_halo.layers.class_gaussians import OR_SKIP, ClassGaussians
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

# For every class and pair of dimensions: the sums of the pass in float64, and
# the layer in float32, twice while it is filled.
_BYTES = 8 + 2 * 4


def fit_class_gaussians(
    model: keras.Model,
    x: Data | ClassStatistics,
    y: Any = None,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    sample_weight: Any = None,
    skip_missing: bool = False,
) -> keras.Model:
    """Appends an out-of-distribution score that is fitted to training data.

    One pass over the data computes the embeddings that enter the head; the
    mean and the covariance of every class are then stored in a
    `keras_halo.layers.ClassGaussians` layer on top of the model. The new model
    shares layers and weights with the given one and holds no training data.
    It is an ordinary Keras model: `save`, `load_model`, `export` and `predict`
    work as for any other. If `model` is trained further, fit again.

    Formula:

    ```python
    scores = head(embeddings)
    ood = (
        min_k(-log N(embeddings; mean_k, cov_k))
        + log(P(abstain) / (1 - P(abstain)))
    )
    ```

    Memory: the pass keeps sums and no embeddings, 8 bytes times `K * D^2`,
    however many samples there are; the layer takes 4 more and, while it is
    filled, another 4. For 1,000 classes in 512 dimensions that is 4.2 GB, and
    the file 1 GB: a smaller `embedding_dim` of the head makes both smaller, by
    its square. With `verbose` it is said before it is taken.

    Args:
        model: A trained functional or sequential model with one `HALODense`
            head.
        x: Training inputs, whatever `model.predict` takes; or, without `y`,
            a dataset of batches `(x, y)` or `(x, y, sample_weight)`: a
            `tf.data.Dataset`, a `torch.utils.data.DataLoader`, a
            `keras.utils.PyDataset` or a generator. Data that is augmented
            should not be: the extent of a class is measured. Or, without `y`,
            the statistics of all data, of `keras_halo.collect_statistics`.
        y: Labels, integers of shape `(N, ...)` or `(N, ..., 1)`, or one-hot
            of shape `(N, ..., K)`.
        batch_size: Integer, as in `model.predict`. Defaults to 32.
        verbose: `"auto"`, 0, 1 or 2, as in `model.predict`.
        sample_weight: Optional weights of shape `(N,)` or `(N, ...)`. What
            has a weight of zero is left out, whatever its label, such as
            padding; every other weight counts as one. Defaults to `None`.
        skip_missing: Boolean, whether classes with fewer than two samples go
            without a Gaussian, so that their inputs score as unknown ones do.
            Defaults to `False`, which refuses them.

    Returns:
        `keras.Model` with the inputs of `model` and the outputs
        `{"scores": packed scores, "ood": scores of shape (batch_size, ...)}`.

    Raises:
        ValueError: If the model has not exactly one head or is subclassed,
            labels do not fit, a class has fewer than two samples, or
            embeddings are not finite. The given model is never changed.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(60, 4)), np.arange(60) % 3
    >>> model = keras.Sequential([keras.Input((4,)), keras_halo.HALODense(3)])
    >>> model = fit_class_gaussians(model, x, y, verbose=0)
    >>> ood = model.predict(np.array([[0.0] * 4, [9.0] * 4]), verbose=0)["ood"]
    >>> bool(ood[1] > ood[0])
    True

    References:

    - Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin, A Simple Unified
      Framework for Detecting Out-of-Distribution Samples and Adversarial
      Attacks, 2018.
    """
    batch_size = check_batch_size(batch_size)
    verbose = check_verbose(verbose)
    skip_missing = as_boolean(skip_missing, "skip_missing")
    embeddings, scores = head_tensors(model)
    warn_of_preprocessor(model)
    units, dim = find_head(model).units, embeddings.shape[-1]
    if verbose and not isinstance(x, ClassStatistics):
        print(
            f"Gaussians of {units} classes in {dim} dimensions: "
            f"{_BYTES * units * dim**2 / 1e6:.1f} MB."
        )
    layer = ClassGaussians(units, name="class_gaussians")
    # Built before the pass, so that what cannot work fails at once.
    ood = layer(embeddings, scores)
    if isinstance(x, ClassStatistics):
        _check_alone(y, sample_weight)
        layer.set_statistics(x, skip_missing)
        inputs = input_structure(model)
        return keras.Model(inputs, {"scores": scores, "ood": ood})
    data = labelled_data(x, y, sample_weight)
    least = 0 if skip_missing else 2
    check_labels(data, model, units, scores.shape[:-1], least, OR_SKIP)
    check_readable(data, "x")
    inputs = input_structure(model)
    statistics = ClassStatistics(units, dim)
    collect(
        keras.Model(inputs, embeddings),
        data,
        batch_size,
        verbose,
        statistics.update,
    )
    layer.set_statistics(statistics, skip_missing)
    return keras.Model(inputs, {"scores": scores, "ood": ood})


def _check_alone(y, sample_weight):
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ValueError(
                f"`{name}` belongs to inputs. Received: {name} beside "
                "statistics, which were collected with labels and weights. "
                "Leave it out."
            )
