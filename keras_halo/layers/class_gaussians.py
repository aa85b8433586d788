import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.layers.score_layer import ScoreLayer
from keras_halo.ops import geometry, ood_scores, packing
from keras_halo.ops.class_statistics import ClassStatistics, check_counts
from keras_halo.ops.tensors import min_of_rows
from keras_halo.utils.checks import as_boolean, check_not_masked, check_units
from keras_halo.utils.types import Shape, Tensor

# What there is to do about classes without samples, besides more data.
OR_SKIP = (
    ", or skip_missing=True, after which inputs of these classes score as "
    "unknown ones do"
)


def gaussian_nll(embeddings, shift, kernel, centers, log_normalizers):
    """Computes negative log densities of Gaussians, one for every class.

    Formula:

    ```python
    z = reshape((x - shift) @ kernel - centers, (D, K))
    nll_k = sum(z[:, k] ** 2) / 2 + log_normalizers[k]
    ```

    which is `-log N(x; mean_k, cov_k)` for the constants that
    `gaussian_constants` makes. The norm is the ordinary one, a sum of squares.

    Args:
        embeddings: Tensor of shape `(..., D)`.
        shift: Tensor of shape `(D,)`.
        kernel: Tensor of shape `(D, D * K)`.
        centers: Tensor of shape `(D * K,)`.
        log_normalizers: Tensor of shape `(K,)`.

    Returns:
        Tensor of shape `(..., K)`.

    Example:

    >>> nll = gaussian_nll(
    ...     ops.array([[3.0, 4.0]]),
    ...     ops.zeros((2,)),
    ...     ops.eye(2),
    ...     ops.zeros((2,)),
    ...     ops.zeros((1,)),
    ... )
    >>> float(nll[0, 0])
    12.5
    """
    dim, num_classes = shift.shape[0], log_normalizers.shape[0]
    # One matrix product for all classes. What converters ask for: the batch
    # keeps its own axis, whose unknown size jax2onnx can follow; and classes
    # come last, as OpenVINO sums wrongly over the last of three axes.
    leading = ops.shape(embeddings)[:-1]
    whitened = ops.matmul(embeddings - shift, kernel) - centers
    squares = ops.sum(
        ops.reshape(whitened * whitened, (*leading, dim, num_classes)), axis=-2
    )
    return 0.5 * squares + log_normalizers


def gaussian_constants(means, whitenings, dtype="float64"):
    """Returns what `gaussian_nll` takes, from means and whitenings.

    Args:
        means: Array of shape `(K, D)`.
        whitenings: Iterable of `K` inverses of the Cholesky factors of
            covariances, of shape `(D, D)`; `None` for a class without a
            Gaussian, which is never the nearest one.
        dtype: String, that of the kernel. Defaults to `"float64"`.

    Returns:
        Tuple `shift, kernel, centers, log_normalizers` of arrays.

    Example:

    >>> constants = gaussian_constants(np.ones((1, 2)), [0.5 * np.eye(2)])
    >>> constants[1].tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    num_classes, dim = means.shape
    # Around the middle of all: of what lies far off, float32 keeps the rest.
    shift = means.mean(axis=0)
    kernel = np.zeros((dim, dim, num_classes), dtype)
    centers = np.zeros((dim, num_classes))
    log_normalizers = np.full(num_classes, math.inf)
    for k, whitening in enumerate(whitenings):
        if whitening is None:
            continue
        kernel[:, :, k] = whitening.T
        centers[:, k] = whitening @ (means[k] - shift)
        log_normalizers[k] = 0.5 * dim * math.log(2 * math.pi)
        log_normalizers[k] -= np.log(np.diagonal(whitening)).sum()
    return shift, kernel.reshape(dim, -1), centers.reshape(-1), log_normalizers


@keras.saving.register_keras_serializable(package="keras_halo")
class ClassGaussians(ScoreLayer):
    """Out-of-distribution score from a Gaussian fitted to every class.

    HALO trains the embeddings of a class towards a ball around its centroid;
    what training reaches is an ellipsoid around a point nearby. This layer
    measures both, mean and covariance, in one pass over training data and
    keeps `K * (D^2 + D + 1) + D` numbers and no sample. Its score is the
    negative log density under the nearest class plus the log-odds of
    abstaining; larger for outliers. The density sees what leaves every
    ellipsoid, the odds what falls between the classes, which wide ellipsoids
    cover. Far out the density always decides, because it grows with the square
    of the distance.

    `keras_halo.fit_class_gaussians` appends a fitted layer to a model. A layer
    that was not fitted answers NaN.

    Formula:

    ```python
    outputs = min_k(-log N(x; mean_k, cov_k))
              + log(P(abstain) / (1 - P(abstain)))
    ```

    Args:
        units: Integer, at least 2. The number of classes.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Call arguments:
        embeddings: Tensor of shape `(batch_size, ..., D)`, the input of the
            `HALODense` head.
        scores: Tensor of shape `(batch_size, ..., packed_width)`, its output.

    Output shape:
        `(batch_size, ...)`. float32 whatever the dtype policy, float64 under a
        float64 policy.

    Raises:
        ValueError: If `units` is below 2, or the shapes of embeddings and
            scores do not fit.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> embeddings = rng.normal(size=(200, 4)).astype("float32")
    >>> layer = keras_halo.layers.ClassGaussians(2)
    >>> layer.adapt(embeddings, np.arange(200) % 2)
    >>> scores = keras_halo.HALODense(2)(embeddings)
    >>> tuple(layer(embeddings, scores).shape)
    (200,)

    References:

    - Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin, A Simple Unified
      Framework for Detecting Out-of-Distribution Samples and Adversarial
      Attacks, 2018.
    - Yilun Chen, Ami Wiesel, Yonina C. Eldar, Alfred O. Hero, Shrinkage
      Algorithms for MMSE Covariance Estimation, 2010.
    """

    scores_index = 1

    def __init__(self, units: int, **kwargs: Any) -> None:
        units = check_units(units)
        super().__init__(**kwargs)
        self.units = units
        self.supports_masking = True

    def build(self, embeddings_shape: Shape, scores_shape: Shape) -> None:
        self._check_shapes(embeddings_shape, scores_shape)
        dim = embeddings_shape[-1]
        self.shift = self._add_statistic("shift", (dim,), "zeros")
        self.kernel = self._add_statistic(
            "kernel", (dim, dim * self.units), "zeros"
        )
        self.centers = self._add_statistic(
            "centers", (dim * self.units,), "zeros"
        )
        # Scores of a layer that was never fitted must not look like scores.
        self.log_normalizers = self._add_statistic(
            "log_normalizers",
            (self.units,),
            keras.initializers.Constant(math.nan),
        )
        self.built = True

    def _add_statistic(self, name, shape, initializer):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            trainable=False,
            dtype=self.head_dtype,
            autocast=False,
        )

    def _check_shapes(self, embeddings_shape, scores_shape):
        dim = embeddings_shape[-1] if len(embeddings_shape) > 1 else None
        num_classes = packing.count_classes(scores_shape)
        if (
            dim is None
            or num_classes != self.units
            or len(embeddings_shape) != len(scores_shape)
        ):
            columns = packing.packed_width(self.units)
            raise ValueError(
                "Expected embeddings of shape `(batch_size, ..., D)` and "
                f"packed scores of shape `(batch_size, ..., {columns})` "
                f"for units={self.units}. Received: embeddings of shape "
                f"{tuple(embeddings_shape)}, scores of shape "
                f"{tuple(scores_shape)}. Pass the input and the output of the "
                "`HALODense` head, in this order."
            )

    def adapt(
        self, embeddings: Any, labels: Any, skip_missing: bool = False
    ) -> None:
        """Fits the Gaussians to embeddings of training data, all at once.

        Args:
            embeddings: Array of shape `(..., D)`.
            labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of
                shape `(..., units)`.
            skip_missing: Boolean, as in `set_statistics`. Defaults to `False`.

        Raises:
            ValueError: If embeddings are not finite, labels do not fit, and as
                `set_statistics` does. The layer is left as it was.
        """
        check_not_masked(embeddings, "embeddings")
        embeddings = np.asarray(ops.convert_to_numpy(embeddings))
        dim = embeddings.shape[-1] if embeddings.ndim > 1 else 0
        statistics = ClassStatistics(self.units, max(dim, 1))
        statistics.update(embeddings, labels)
        self.set_statistics(statistics, skip_missing)

    def set_statistics(
        self, statistics: ClassStatistics, skip_missing: bool = False
    ) -> None:
        """Fits the Gaussians to statistics that were collected before.

        Args:
            statistics: `keras_halo.ClassStatistics` of `units` classes, not
                pooled. Those of parts of the data merge.
            skip_missing: Boolean, whether classes with fewer than two samples
                go without a Gaussian, as if they were unknown, rather than
                being refused. Defaults to `False`.

        Raises:
            ValueError: If a class has fewer than two samples, or embeddings do
                not vary inside of their classes. The layer is left as it was.
        """
        skip_missing = as_boolean(skip_missing, "skip_missing")
        num_classes, dim = statistics.means.shape
        if num_classes != self.units or statistics.pooled:
            raise ValueError(
                f"Expected statistics of {self.units} classes, each with its "
                f"own scatter. Received: {num_classes} classes, pooled="
                f"{statistics.pooled}."
            )
        if self.built and self.shift.shape[0] != dim:
            raise ValueError(
                "The layer was built for embeddings of size "
                f"{self.shift.shape[0]}. Received: embeddings of size {dim}. "
                "Pass what enters the `HALODense` head."
            )
        enough = statistics.counts >= 2
        if not (skip_missing and enough.any()):
            check_counts(statistics.counts, 2, OR_SKIP)
        scales = statistics.scales()
        if scales is None:
            raise ValueError(
                "The embeddings of every class are all the same, so that they "
                "have no covariance. Received: residuals around the class "
                "means that are zero to rounding. Pass more than copies of one "
                "sample, or look for a layer whose output has collapsed."
            )
        if not self.built:
            self.build((None, dim), (None, packing.packed_width(self.units)))
        constants = gaussian_constants(
            statistics.means,
            (
                np.linalg.inv(
                    np.linalg.cholesky(statistics.covariance(k, scales))
                )
                if enough[k]
                else None
                for k in range(num_classes)
            ),
            self.head_dtype,
        )
        for weight, value in zip(self.weights, constants, strict=True):
            weight.assign(value)

    def load_own_variables(self, store: Any) -> None:
        if "3" in store:
            super().load_own_variables(store)
            return
        # Files of 0.1.0 hold means, whitenings and log_normalizers.
        means, whitenings, log_normalizers = (
            np.asarray(store[key], "float64") for key in ("0", "1", "2")
        )
        with np.errstate(divide="ignore"):
            # A layer that was not fitted holds zeros, and NaN for the rest.
            constants = gaussian_constants(means, whitenings)
        for weight, value in zip(self.weights, constants, strict=True):
            weight.assign(value)
        self.log_normalizers.assign(log_normalizers)

    def call(self, embeddings: Tensor, scores: Tensor) -> Tensor:
        embeddings = ops.clip(
            ops.cast(embeddings, self.head_dtype),
            -geometry.MAX_COMPONENT,
            geometry.MAX_COMPONENT,
        )
        densities = gaussian_nll(
            embeddings,
            *(
                ops.convert_to_tensor(weight, self.head_dtype)
                for weight in (
                    self.shift,
                    self.kernel,
                    self.centers,
                    self.log_normalizers,
                )
            ),
        )
        odds = ood_scores.abstain_log_odds(ops.cast(scores, self.head_dtype))
        return ops.squeeze(min_of_rows(densities) + odds, axis=-1)

    def compute_output_shape(
        self, embeddings_shape: Shape, scores_shape: Shape
    ) -> Shape:
        return tuple(scores_shape[:-1])

    def compute_output_spec(self, embeddings: Tensor, scores: Tensor) -> Any:
        self._check_shapes(embeddings.shape, scores.shape)
        return keras.KerasTensor(
            self.compute_output_shape(embeddings.shape, scores.shape),
            dtype=self.head_dtype,
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}
