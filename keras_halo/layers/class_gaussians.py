import math

import keras
import numpy as np
from keras import ops

from keras_halo.layers.score_layer import ScoreLayer
from keras_halo.ops import geometry, ood_scores, packing
from keras_halo.ops.class_statistics import class_statistics
from keras_halo.utils.checks import check_units


def gaussian_nll(embeddings, means, whitenings, log_normalizers):
    """Negative log densities of Gaussians, one for every class.

    Formula:

    ```python
    nll_k = |whitenings[k] @ (x - means[k])|_2^2 / 2 + log_normalizers[k]
    ```

    which is `-log N(x; mean_k, cov_k)` for
    `inverse(cov_k) = transpose(whitenings[k]) @ whitenings[k]` and
    `log_normalizers[k] = (log(det(cov_k)) + D * log(2 * pi)) / 2`. The norm is
    the ordinary one, a sum of squares.

    Args:
        embeddings: Tensor of shape `(..., D)`.
        means: Tensor of shape `(K, D)`.
        whitenings: Tensor of shape `(K, D, D)`.
        log_normalizers: Tensor of shape `(K,)`.

    Returns:
        Tensor of shape `(..., K)`.

    Example:

    >>> nll = gaussian_nll(
    ...     ops.array([[3.0, 4.0]]), ops.zeros((1, 2)), ops.eye(2)[None], 0.0
    ... )
    >>> float(nll[0, 0])
    12.5
    """
    num_classes, dim = means.shape
    # One matrix product for all classes. What converters ask for: the batch
    # keeps its own axis, whose unknown size jax2onnx can follow; and classes
    # come last, as OpenVINO sums wrongly over the last of three axes.
    leading = ops.shape(embeddings)[:-1]
    stacked = ops.reshape(
        ops.transpose(whitenings, (1, 0, 2)), (dim * num_classes, dim)
    )
    centers = ops.sum(whitenings * ops.expand_dims(means, axis=1), axis=-1)
    centers = ops.reshape(ops.transpose(centers), (-1,))
    whitened = ops.matmul(embeddings, ops.transpose(stacked)) - centers
    squares = ops.sum(
        ops.reshape(whitened * whitened, (*leading, dim, num_classes)), axis=-2
    )
    return 0.5 * squares + log_normalizers


@keras.saving.register_keras_serializable(package="keras_halo")
class ClassGaussians(ScoreLayer):
    """Out-of-distribution score from a Gaussian fitted to every class.

    HALO trains the embeddings of a class towards a ball around its centroid;
    what training reaches is an ellipsoid around a point nearby. This layer
    measures both, mean and covariance, in one pass over training data and
    keeps `K * (D^2 + D + 1)` numbers and no sample. Its score is the negative
    log density under the nearest class plus the log-odds of abstaining; larger
    for outliers. The density sees what leaves every ellipsoid, the odds what
    falls between the classes, which wide ellipsoids cover. Far out the density
    always decides, because it grows with the square of the distance.

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
        scores: Tensor of shape `(batch_size, ..., units + 6)`, its output.

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
    - Olivier Ledoit, Michael Wolf, A well-conditioned estimator for
      large-dimensional covariance matrices, 2004.
    """

    _SCORES_AT = 1

    def __init__(self, units, **kwargs):
        units = check_units(units)
        super().__init__(**kwargs)
        self.units = units
        self.supports_masking = True

    def build(self, embeddings_shape, scores_shape):
        self._check_shapes(embeddings_shape, scores_shape)
        dim = embeddings_shape[-1]
        self.means = self._add_statistic("means", (self.units, dim), "zeros")
        self.whitenings = self._add_statistic(
            "whitenings", (self.units, dim, dim), "zeros"
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
            raise ValueError(
                "Expected embeddings of shape `(batch_size, ..., D)` and "
                f"packed scores of shape `(batch_size, ..., {self.units + 6})` "
                f"for units={self.units}. Received: embeddings of shape "
                f"{tuple(embeddings_shape)}, scores of shape "
                f"{tuple(scores_shape)}. Pass the input and the output of the "
                "`HALODense` head, in this order."
            )

    def adapt(self, embeddings, labels):
        """Fits the Gaussians to embeddings of training data, all at once.

        Args:
            embeddings: Array of shape `(..., D)`.
            labels: Integers of shape `(...)` or `(..., 1)`, or one-hot of
                shape `(..., units)`.

        Raises:
            ValueError: As `class_statistics` of
                `keras_halo.ops.class_statistics` does. The layer is left as it
                was.
            ImportError: If scikit-learn is missing.
        """
        means, covariances = class_statistics(embeddings, labels, self.units)
        dim = means.shape[-1]
        if not self.built:
            self.build((None, dim), (None, packing.packed_width(self.units)))
        if tuple(self.means.shape) != means.shape:
            raise ValueError(
                "The layer was built for embeddings of size "
                f"{self.means.shape[-1]}. Received: embeddings of size {dim}. "
                "Pass what enters the `HALODense` head."
            )
        factors = np.linalg.cholesky(covariances)
        diagonals = np.diagonal(factors, axis1=-2, axis2=-1)
        self.means.assign(means)
        self.whitenings.assign(np.linalg.inv(factors))
        self.log_normalizers.assign(
            np.log(diagonals).sum(axis=-1) + 0.5 * dim * math.log(2 * math.pi)
        )

    def call(self, embeddings, scores):
        embeddings = ops.clip(
            ops.cast(embeddings, self.head_dtype),
            -geometry.MAX_COMPONENT,
            geometry.MAX_COMPONENT,
        )
        densities = gaussian_nll(
            embeddings,
            ops.convert_to_tensor(self.means, self.head_dtype),
            ops.convert_to_tensor(self.whitenings, self.head_dtype),
            ops.convert_to_tensor(self.log_normalizers, self.head_dtype),
        )
        odds = ood_scores.abstain_log_odds(ops.cast(scores, self.head_dtype))
        return ops.min(densities, axis=-1) + ops.squeeze(odds, axis=-1)

    def compute_output_shape(self, embeddings_shape, scores_shape):
        return tuple(scores_shape[:-1])

    def compute_output_spec(self, embeddings, scores):
        self._check_shapes(embeddings.shape, scores.shape)
        return keras.KerasTensor(
            self.compute_output_shape(embeddings.shape, scores.shape),
            dtype=self.head_dtype,
        )

    def get_config(self):
        return {**super().get_config(), "units": self.units}
