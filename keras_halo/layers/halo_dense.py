import warnings
from typing import Any, Self

import keras
import numpy as np
from keras import constraints, initializers, ops, regularizers

from keras_halo.layers.temperature_layer import TemperatureLayer
from keras_halo.ops import evidence, geometry, packing
from keras_halo.ops.head import packed_scores, saturated, with_far_background
from keras_halo.ops.head_smoothing import note_label_smoothing
from keras_halo.utils.checks import (
    as_boolean,
    check_abstain_rate,
    check_embedding_dim,
    check_floating,
    check_label_smoothing,
    check_not_taken,
    check_units,
    to_array,
)
from keras_halo.utils.keras_private import (
    leave_out_of_remat,
    own_variables,
)
from keras_halo.utils.precision import exact_constant
from keras_halo.utils.types import ArrayLike, Identifier, Shape, Tensor

# Centroids start close together, so that class logits start near zero: a head
# whose centroids start on their shells abstains from everything at first.
_CENTROID_STDDEV = 0.3

# Where the far background begins before there is any evidence to go by.
_INITIAL_FAR_RADIUS = 1.0


@keras.saving.register_keras_serializable(package="keras_halo")
class HALODense(TemperatureLayer):
    """Classification head whose logits are distances to learned centroids.

    Takes the place of the last `Dense(units)` of a classifier. The layer maps
    its input to an embedding, in which every class has a centroid. The abstain
    class, "I don't know", has none of its own. It stands for two backgrounds: a
    narrow one at the origin, onto which the centroids are centred, and a wide
    one around it, which wins far out.

    The output is one tensor of *packed scores*. It can be treated as logits of
    the `units` classes followed by the logit of abstaining: the remaining
    columns, from which `HALOLoss` and the functions of this package read the
    geometry, are so negative that `softmax` gives them probability zero and
    `argmax` and top-k never choose them. So
    `metrics=["accuracy"]` works as before, and `argmax(scores, axis=-1) ==
    units` means: abstained.

    **When the head abstains.** In training the layer keeps running statistics
    of how surely it names a class, as batch normalization does of its inputs,
    and finds the quantiles below which `abstain_rate / 2` of the training
    samples lie, once for either background. The backgrounds begin a quarter
    farther away from the mean, because new inputs are recognized less surely
    than training samples, and at least 1.5 nats away, because a network that
    has learned nothing yet hardly tells inputs apart. No label and no gradient
    is involved, and the loss does not see the result: it trains against the
    fixed margin of the published method. The statistics stand still with
    `training=False`, with `trainable=False` and for masked positions. The layer
    cannot see `sample_weight` or `ignore_class`; mask what must not count.

    How many new inputs are rejected depends on how well the network
    generalizes. Where the rate matters, fit a threshold
    (`keras_halo.rejection.CoverageRule`) or `keras_halo.calibrate` the head.

    The layer computes and emits float32 whatever the dtype policy (float64
    under a float64 policy), also in a mixed-precision model.

    Formula:

    ```python
    magnitude = mean(abs(inputs), axis=-1) + 0.1
    features = inputs / (sqrt(pi) * magnitude * sqrt(max(n / 256, 1)))
    x = dot(features, kernel) + bias
    c = centroids - mean(centroids, axis=0)
    s = gamma * (2 * dot(x, transpose(c)) / D - mean(c ** 2, axis=-1))
    top = max_k s_k
    far = gamma * mean(x ** 2, axis=-1) / 2 + far_bias
    a = logaddexp(abstain_bias, top + far_scale * (far - top))
    outputs = [s | a | neutral(|x|^2, gamma, D, far_radius, layout)]
    far_radius = max(-far_bias / gamma, 1e-3)
    ```

    Args:
        units: Integer, at least 2. The number of classes.
        embedding_dim: Integer, at least 2, the size `D` of the embedding.
            `"auto"`, the default, takes the smallest power of two that is at
            least `2 * units`, within 128 and 1024. `None` takes the input
            itself as the embedding.
        abstain_rate: Float in `[0, 0.5)`, the share of training samples on
            which the head abstains. `None` keeps the fixed margin of the
            published method, without a far background. Defaults to `0.01`.
        normalize: Boolean, whether the norm of the input is bounded before it
            is embedded: large feature vectors get one mean magnitude, which
            dropout leaves as it is on average; those of a mean magnitude far
            below 0.1 stay small. Without an embedding of its own the head
            never normalizes. Defaults to `True`.
        label_smoothing: Float in `[0, 1)`, from which a head with
            `abstain_rate=None` takes its margin: `HALOLoss` must have the
            same value. Other heads refuse it, there it is the loss that
            smooths. Defaults to `None`, which means `0.1`.
        learn_gamma: Boolean, whether the inverse temperature is trained.
            Defaults to `True`.
        kernel_initializer: Initializer for the `kernel` of the embedding.
            `None`, the default, means `"glorot_uniform"`, times the factor by
            which `normalize` shortens many features. Not with
            `embedding_dim=None`, which has no kernel.
        kernel_regularizer: Regularizer function applied to this `kernel`. Not
            with `embedding_dim=None` either.
        centroid_initializer: Initializer for the `centroids` weights matrix.
            `None`, the default, means a normal distribution with standard
            deviation 0.3: class logits start near zero.
        centroid_regularizer: Regularizer function applied to the `centroids`
            weights matrix.
        centroid_constraint: Constraint function applied to the `centroids`
            weights matrix.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Input shape:
        N-D tensor of floats with shape `(batch_size, ..., features)`.
        Components beyond `1e12` in magnitude are saturated. A sparse tensor
        is made dense.

    Output shape:
        N-D tensor with shape `(batch_size, ..., packed_width)`.

    Raises:
        ValueError: If an argument is out of range, an `activity_regularizer` is
            given (the packed columns would dominate it), the last axis of the
            input is undefined, or below 2 with `embedding_dim=None`, or the
            input is not floating point.

    Example:

    >>> layer = keras_halo.HALODense(3)
    >>> scores = layer(np.zeros((2, 8), "float32"))
    >>> tuple(scores.shape)
    (2, 9)
    >>> probabilities = ops.convert_to_numpy(ops.softmax(scores))
    >>> float(probabilities[:, 4:].max())
    0.0

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    """

    def __init__(
        self,
        units: int,
        embedding_dim: int | str | None = "auto",
        abstain_rate: float | None = 0.01,
        normalize: bool = True,
        label_smoothing: float | None = None,
        learn_gamma: bool = True,
        kernel_initializer: Identifier = None,
        kernel_regularizer: Identifier = None,
        centroid_initializer: Identifier = None,
        centroid_regularizer: Identifier = None,
        centroid_constraint: Identifier = None,
        **kwargs: Any,
    ) -> None:
        units = check_units(units)
        if _is_activation(embedding_dim):
            # The second argument of `Dense`.
            kwargs["activation"] = embedding_dim
        check_not_taken(kwargs, _NOT_TAKEN, "HALODense")
        embedding_dim = check_embedding_dim(embedding_dim)
        abstain_rate = check_abstain_rate(abstain_rate)
        normalize = as_boolean(normalize, "normalize")
        if embedding_dim is None:
            _check_has_kernel(kernel_initializer, kernel_regularizer)
        if label_smoothing is not None:
            label_smoothing = check_label_smoothing(label_smoothing)
            if abstain_rate is not None:
                raise ValueError(
                    "`label_smoothing` belongs to the loss, "
                    "`HALOLoss(label_smoothing=...)`: only a head with "
                    "`abstain_rate=None` takes its margin from it. Received: "
                    f"label_smoothing={label_smoothing}, "
                    f"abstain_rate={abstain_rate}. Leave it out here, or use "
                    "`HALODense.reference` for the published method."
                )
        if kwargs.get("activity_regularizer") is not None:
            raise ValueError(
                "`HALODense` takes no `activity_regularizer`: the geometry "
                "columns of its output are of the order of -1e12 and would "
                "dominate the penalty. Received: activity_regularizer="
                f"{kwargs['activity_regularizer']}. Regularize the layer "
                "before the head instead."
            )
        super().__init__(learn_gamma=learn_gamma, **kwargs)
        # Running statistics could not leave the trace of a rematerialized call.
        leave_out_of_remat(self)
        self.units = units
        self.embedding_dim = embedding_dim
        self.abstain_rate = abstain_rate
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        if centroid_initializer is None:
            centroid_initializer = initializers.RandomNormal(
                stddev=_CENTROID_STDDEV
            )
        self.centroid_initializer = initializers.get(centroid_initializer)
        self.centroid_regularizer = regularizers.get(centroid_regularizer)
        self.centroid_constraint = constraints.get(centroid_constraint)
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    @classmethod
    def reference(
        cls,
        units: int,
        label_smoothing: float | None = 0.1,
        centroid_initializer: Identifier = None,
        **kwargs: Any,
    ) -> Self:
        """Makes the head of the published method.

        It takes its input as the embedding, its centroids start on their
        shells, and the logit of abstaining is a constant.

        Args:
            units: Integer, at least 2. The number of classes.
            label_smoothing: Float in `[0, 1)`, that of the loss. Defaults to
                `0.1`.
            centroid_initializer: Initializer for the `centroids`. `None`, the
                default, means a normal distribution with standard deviation
                one.
            **kwargs: Further arguments of `HALODense`.

        Returns:
            `HALODense`.

        Example:

        >>> head = keras_halo.HALODense.reference(3, label_smoothing=0.05)
        >>> head.embedding_dim, head.abstain_rate
        (None, None)
        """
        if centroid_initializer is None:
            centroid_initializer = initializers.RandomNormal(stddev=1.0)
        return cls(
            units,
            embedding_dim=None,
            abstain_rate=None,
            normalize=False,
            label_smoothing=label_smoothing,
            centroid_initializer=centroid_initializer,
            **kwargs,
        )

    def build(self, input_shape: Shape) -> None:
        num_features = input_shape[-1]
        least = 2 if self.embedding_dim is None else 1
        if num_features is None or num_features < least:
            raise ValueError(
                "The last axis of the input of `HALODense` must be defined "
                f"and at least {least}. Received: "
                f"input_shape={tuple(input_shape)}. Flatten or pool before the "
                "head, and leave `embedding_dim` to the head for a single "
                "feature."
            )
        dim = self._embedding_size(num_features)
        if self.embedding_dim is not None:
            self.kernel = self._add_head_weight(
                name="kernel",
                shape=(num_features, dim),
                initializer=self._kernel_initializer(num_features, dim),
                regularizer=self.kernel_regularizer,
            )
            self.bias = self._add_head_weight(
                name="bias", shape=(dim,), initializer="zeros"
            )
        self.centroids = self._add_head_weight(
            name="centroids",
            shape=(self.units, dim),
            initializer=self.centroid_initializer,
            regularizer=self.centroid_regularizer,
            constraint=self.centroid_constraint,
        )
        self._add_temperature(dim)
        # What the loss has to agree with; zero says nothing.
        self._background = 0.0
        if self.abstain_rate is None:
            self._background = packing.smoothing_background(
                self.margin_smoothing
            )
        # Weights, so that calibration can move them and `save` keeps them.
        self.abstain_bias = self._add_statistic(
            "abstain_bias",
            (),
            geometry.abstain_bias(dim, self.units, self.margin_smoothing),
        )
        if self.abstain_rate is not None:
            self.far_bias = self._add_statistic(
                "far_bias",
                (),
                -_INITIAL_FAR_RADIUS * geometry.initial_temperature(dim),
            )
            self.far_scale = self._add_statistic("far_scale", (), 1.0)
            self.evidence_mean = self._add_statistic("evidence_mean", (2,), 0.0)
            self.evidence_variance = self._add_statistic(
                "evidence_variance", (2,), 0.0
            )
            self.evidence_offset = self._add_statistic(
                "evidence_offset",
                (2,),
                evidence.initial_offset(0.5 * self.abstain_rate),
            )
            self.evidence_count = self._add_statistic("evidence_count", (), 0.0)
        self.input_spec = keras.layers.InputSpec(
            min_ndim=2, axes={-1: num_features}
        )
        self.built = True

    def _kernel_initializer(self, num_features, dim):
        if self.kernel_initializer is not None:
            return self.kernel_initializer
        factor = 1.0
        if self.normalize:
            factor = geometry.length_factor(num_features)
        return initializers.VarianceScaling(
            factor**2, mode="fan_avg", distribution="uniform"
        )

    def _embedding_size(self, num_features):
        if self.embedding_dim is None:
            return num_features
        if self.embedding_dim == "auto":
            return geometry.default_embedding_dim(self.units)
        if self.embedding_dim < self.units - 1:
            warnings.warn(
                f"An embedding of {self.embedding_dim} dimensions cannot hold "
                f"{self.units} centroids at equal distances. Expected "
                f"`embedding_dim` of at least {self.units - 1}. Leave it out "
                "for a size that fits.",
                stacklevel=2,
            )
        return self.embedding_dim

    @property
    def margin_smoothing(self) -> float:
        """Float, the label smoothing that the margin is made of."""
        return 0.1 if self.label_smoothing is None else self.label_smoothing

    def _add_statistic(self, name, shape, value):
        return self._add_head_weight(
            name=name,
            shape=shape,
            initializer=exact_constant(value),
            trainable=False,
            # Across replicas the average of theirs, as batch normalization.
            aggregation="mean",
        )

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor = None
    ) -> Tensor:
        check_floating(inputs.dtype, self)
        inputs = self._as_dense(inputs)
        embeddings = self._embed(ops.cast(inputs, self.head_dtype))
        if len(inputs.shape) > 2:
            embeddings = ops.reshape(embeddings, (-1, embeddings.shape[-1]))
            if mask is not None:
                mask = ops.reshape(mask, (-1,))
        # Copies: what the gradient reads must not move with the statistics.
        abstain_bias = ops.convert_to_tensor(self.abstain_bias) + 0.0
        temperature = self.temperature
        scores = packed_scores(
            embeddings,
            ops.convert_to_tensor(self.centroids, self.head_dtype),
            temperature,
            abstain_bias,
            self._background,
        )
        if self.abstain_rate is not None:
            scores = with_far_background(
                scores,
                ops.convert_to_tensor(self.far_bias) + 0.0,
                ops.convert_to_tensor(self.far_scale) + 0.0,
            )
        if self._follows_evidence(training):
            self._update_statistics(scores, temperature, mask)
        if len(inputs.shape) > 2:
            shape = self.compute_output_shape(ops.shape(inputs))
            scores = ops.reshape(scores, shape)
        if self.abstain_rate is None:
            note_label_smoothing(scores, self.margin_smoothing)
        return scores

    def _as_dense(self, inputs):
        """Inputs as a dense tensor with a known number of features."""
        inputs = ops.convert_to_tensor(inputs, sparse=False)
        if inputs.shape[-1] is None:
            # In a graph of TensorFlow that was told of the rank alone.
            num_features = self.input_spec.axes[-1]
            shape = (*ops.shape(inputs)[:-1], num_features)
            inputs = ops.reshape(inputs, shape)
        return inputs

    def _embed(self, features):
        if self.embedding_dim is None:
            return features
        features = saturated(features)
        if self.normalize:
            features = geometry.normalized_features(features)
        kernel = ops.convert_to_tensor(self.kernel, self.head_dtype)
        # As an operator: `ops.matmul` computes float64 in float32 on PyTorch.
        return features @ kernel + ops.convert_to_tensor(self.bias)

    def _follows_evidence(self, training):
        if self.abstain_rate is None or not self.trainable:
            return False
        if training is not None and not isinstance(training, (bool, int)):
            warnings.warn(
                "The running statistics of `HALODense` stand still where "
                "`training` is a tensor, as under a `keras.RematScope` around "
                "the whole model on JAX. Expected a Python boolean. Make the "
                "model outside of the scope, or place the biases afterwards "
                "with `keras_halo.calibrate`.",
                stacklevel=2,
            )
            return False
        return bool(training)

    def assign_evidence(self, samples: ArrayLike) -> None:
        """Places the abstain biases by evidence that was measured elsewhere.

        Training goes on from there.

        Args:
            samples: Array of shape `(N, 2)`, what
                `keras_halo.ops.evidence.class_evidence` gives for known inputs.
        """
        samples = to_array(samples, "samples")
        mean, deviation = samples.mean(axis=0), samples.std(axis=0)
        quantiles = np.quantile(samples, 0.5 * self.abstain_rate, axis=0)
        offset = (quantiles - mean) / np.maximum(deviation, 1e-12)
        offset = np.clip(offset, -evidence.MAX_OFFSET, 0.0)
        self.evidence_mean.assign(mean)
        self.evidence_variance.assign(deviation**2)
        self.evidence_offset.assign(offset)
        self.evidence_count.assign(1.0 / evidence.STEP)
        state = evidence.EvidenceStatistics(
            *map(ops.convert_to_tensor, (mean, deviation**2, offset)), None
        )
        near, far = ops.unstack(evidence.biases(state), 2)
        self.abstain_bias.assign(near)
        self.far_bias.assign(far)
        self.far_scale.assign(evidence.far_scale(state))

    def _update_statistics(self, scores, temperature, mask):
        parts = packing.unpack(ops.stop_gradient(scores))
        temperature = ops.stop_gradient(temperature)
        state = evidence.updated(
            evidence.EvidenceStatistics(
                mean=ops.convert_to_tensor(self.evidence_mean),
                variance=ops.convert_to_tensor(self.evidence_variance),
                offset=ops.convert_to_tensor(self.evidence_offset),
                count=ops.convert_to_tensor(self.evidence_count),
            ),
            evidence.class_evidence(
                parts.logits, parts.squared_norm, temperature
            ),
            0.5 * self.abstain_rate,
            mask,
        )
        near, far = ops.unstack(evidence.biases(state), 2)
        scale = evidence.far_scale(state)
        seen = state.count > 0.5
        for weight, value in (
            (self.abstain_bias, near),
            (self.far_bias, far),
            (self.far_scale, scale),
        ):
            weight.assign(ops.where(seen, value, ops.convert_to_tensor(weight)))
        self.evidence_mean.assign(state.mean)
        self.evidence_variance.assign(state.variance)
        self.evidence_offset.assign(state.offset)
        self.evidence_count.assign(state.count)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:-1], packing.packed_width(self.units))

    def compute_output_spec(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor = None
    ) -> Any:
        # The base class would announce the 16-bit compute dtype of a mixed
        # policy, which is not what `call` returns.
        check_floating(inputs.dtype, self)
        return keras.KerasTensor(
            self.compute_output_shape(inputs.shape), dtype=self.head_dtype
        )

    def _check_number_of_weights(self, values, are_old):
        if are_old and len(values) == 3 and len(self._own_weights()) != 3:
            raise ValueError(
                "These are the weights of a `HALODense` of keras_halo 0.1.0: "
                f"expected {len(self._own_weights())} arrays. Received: 3. "
                "Build the model with `HALODense.reference(units, "
                "label_smoothing=...)` in the place of `HALODense(units)` to "
                "load them, and convert that model with "
                "`keras_halo.convert_head` to have the new head."
            )

    def _own_weights(self):
        return own_variables(self)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "units": self.units,
                "embedding_dim": self.embedding_dim,
                "abstain_rate": self.abstain_rate,
                "normalize": self.normalize,
                "label_smoothing": self.label_smoothing,
                "kernel_initializer": initializers.serialize(
                    self.kernel_initializer
                ),
                "kernel_regularizer": regularizers.serialize(
                    self.kernel_regularizer
                ),
                "centroid_initializer": initializers.serialize(
                    self.centroid_initializer
                ),
                "centroid_regularizer": regularizers.serialize(
                    self.centroid_regularizer
                ),
                "centroid_constraint": constraints.serialize(
                    self.centroid_constraint
                ),
            }
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        if config.get("embedding_dim", "auto") is None:
            # Files from when it was taken without a kernel, and ignored.
            config = {
                **config,
                "kernel_initializer": None,
                "kernel_regularizer": None,
            }
        return super().from_config(config)

    @classmethod
    def _config_of_version_1(cls, config):
        # The published method is all that there was.
        return {
            **config,
            "embedding_dim": None,
            "abstain_rate": None,
            "normalize": False,
        }


# What `Dense` or a loss takes, and why there is no such thing here.
_NOT_TAKEN = {
    "activation": (
        "its output are packed scores, which the loss has to see as they are. "
        "Leave it out, and append `keras_halo.HALOSoftmax` to the trained "
        "model for probabilities"
    ),
    "from_logits": (
        "packed scores always are logits. Leave it out; a metric on "
        "probabilities is wrapped in `keras_halo.metrics.ProbabilityMetric`"
    ),
    "use_bias": (
        "distances to centroids have no bias of the classes, and the bias of "
        "the embedding is learned. Leave it out"
    ),
}


def _is_activation(value):
    """Whether the second argument is what `Dense` takes there."""
    if callable(value):
        return True
    if not isinstance(value, str) or value == "auto":
        return False
    try:
        keras.activations.get(value)
    except ValueError:
        return False
    return True


def _check_has_kernel(kernel_initializer, kernel_regularizer):
    """Raises `ValueError` for what a head without a kernel would ignore."""
    for name, value in (
        ("kernel_initializer", kernel_initializer),
        ("kernel_regularizer", kernel_regularizer),
    ):
        if value is not None:
            raise ValueError(
                f"`{name}` belongs to the kernel of the embedding. Received: "
                f"{name}={value!r:.100} with embedding_dim=None, which takes "
                "the input as the embedding. Leave it out, or choose an "
                "`embedding_dim`; for the centroids there is "
                f"`{name.replace('kernel', 'centroid')}`."
            )
