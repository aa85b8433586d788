import keras
from keras import constraints, initializers, ops, regularizers

from keras_halo import fused, geometry, packing
from keras_halo.precision import computation_dtype, exact_constant
from keras_halo.validation import (
    check_floating,
    check_label_smoothing,
    check_units,
)


@keras.saving.register_keras_serializable(package="keras_halo")
class HALODense(keras.layers.Layer):
    """Classification head whose logits are distances to learned centroids.

    Takes the place of the last `Dense(units)` of a classifier. Every class has
    a centroid in the embedding space that the layer receives; the abstain
    class, "I don't know", has none of its own: it sits at the origin, onto
    which the centroids are centred. The output is one tensor of *packed
    scores* with `units + 4` columns. It can be treated as logits of the
    `units` classes followed by the logit of abstaining: the remaining three
    columns, from which `HALOLoss` and the functions of this package read the
    geometry, are so negative that `softmax` gives them probability zero and
    `argmax` and top-k never choose them. So `metrics=["accuracy"]` works as
    before, and `argmax(scores, axis=-1) == units` means: abstained.

    The layer computes and emits float32 whatever the dtype policy (float64
    under a float64 policy), also in a mixed-precision model.

    Formula:

    ```python
    c = centroids - mean(centroids, axis=0)
    gamma = softplus(raw_gamma)
    s = gamma * (2 * dot(inputs, transpose(c)) / D - mean(c ** 2, axis=-1))
    outputs = [s | abstain_bias | neutral(|inputs|^2, gamma, D)]
    ```

    Args:
        units: Integer, at least 2. The number of classes.
        label_smoothing: Float in `[0, 1)`. The label smoothing of the loss,
            from which the abstain class gets its margin: the stronger the
            smoothing, the higher the logit of abstaining. Give `HALOLoss` the
            same value. Defaults to `0.1`.
        learn_gamma: Boolean, whether the temperature is trained. Defaults to
            `True`.
        centroid_initializer: Initializer for the `centroids` weights matrix.
            `None`, the default, means a normal distribution with standard
            deviation one: the scale on which the radial term places an
            embedding around its centroid.
        centroid_regularizer: Regularizer function applied to the `centroids`
            weights matrix.
        centroid_constraint: Constraint function applied to the `centroids`
            weights matrix.
        **kwargs: Base layer keyword arguments, such as `name` and `dtype`.

    Input shape:
        N-D tensor of floats with shape `(batch_size, ..., D)`, `D >= 2`.
        Components beyond `1e12` in magnitude are saturated.

    Output shape:
        N-D tensor with shape `(batch_size, ..., units + 4)`.

    Raises:
        ValueError: If `units` is below 2, `label_smoothing` outside `[0, 1)`,
            an `activity_regularizer` is given (the packed columns would
            dominate it), the last axis of the input is undefined or below 2,
            or the input is not floating point.

    Example:

    >>> layer = keras_halo.HALODense(3)
    >>> scores = layer(np.zeros((2, 8), "float32"))
    >>> tuple(scores.shape)
    (2, 7)
    >>> probabilities = ops.convert_to_numpy(ops.softmax(scores))
    >>> float(probabilities[:, 4:].max())
    0.0

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    """

    def __init__(
        self,
        units,
        label_smoothing=0.1,
        learn_gamma=True,
        centroid_initializer=None,
        centroid_regularizer=None,
        centroid_constraint=None,
        **kwargs,
    ):
        check_units(units)
        check_label_smoothing(label_smoothing)
        if kwargs.get("activity_regularizer") is not None:
            raise ValueError(
                "`HALODense` takes no `activity_regularizer`: the geometry "
                "columns of its output are of the order of -1e12 and would "
                "dominate the penalty. Received: activity_regularizer="
                f"{kwargs['activity_regularizer']}. Regularize the layer "
                "before the head instead."
            )
        super().__init__(**kwargs)
        # Inputs and weights are cast in `call`, never down to 16 bits.
        self.autocast = False
        self.units = units
        self.label_smoothing = label_smoothing
        self.learn_gamma = learn_gamma
        if centroid_initializer is None:
            centroid_initializer = initializers.RandomNormal(stddev=1.0)
        self.centroid_initializer = initializers.get(centroid_initializer)
        self.centroid_regularizer = regularizers.get(centroid_regularizer)
        self.centroid_constraint = constraints.get(centroid_constraint)
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    def build(self, input_shape):
        embedding_dim = input_shape[-1]
        if embedding_dim is None or embedding_dim < 2:
            raise ValueError(
                "The last axis of the input of `HALODense` is the embedding "
                "and must be defined and at least 2. Received: "
                f"input_shape={tuple(input_shape)}. Put a "
                "`keras.layers.Dense(embedding_dim)` before the head."
            )
        self.centroids = self._add_head_weight(
            name="centroids",
            shape=(self.units, embedding_dim),
            initializer=self.centroid_initializer,
            regularizer=self.centroid_regularizer,
            constraint=self.centroid_constraint,
        )
        self.raw_gamma = self._add_head_weight(
            name="raw_gamma",
            shape=(),
            initializer=exact_constant(
                geometry.inverse_softplus(
                    geometry.initial_temperature(embedding_dim)
                )
            ),
            trainable=self.learn_gamma,
        )
        # A weight, so that calibration can move it and `save` keeps it.
        self.abstain_bias = self._add_head_weight(
            name="abstain_bias",
            shape=(),
            initializer=exact_constant(
                geometry.abstain_bias(
                    embedding_dim, self.units, self.label_smoothing
                )
            ),
            trainable=False,
        )
        self.input_spec = keras.layers.InputSpec(
            min_ndim=2, axes={-1: embedding_dim}
        )
        self.built = True

    def _add_head_weight(self, **kwargs):
        return self.add_weight(dtype=self.head_dtype, autocast=False, **kwargs)

    @property
    def head_dtype(self):
        """String, the dtype in which the layer computes and answers."""
        return computation_dtype(self.compute_dtype)

    @property
    def temperature(self):
        """Scalar tensor, the current temperature `gamma`."""
        return geometry.to_temperature(
            ops.convert_to_tensor(self.raw_gamma, self.head_dtype)
        )

    def call(self, inputs):
        check_floating(inputs.dtype, self)
        embeddings = ops.cast(inputs, self.head_dtype)
        centroids = ops.convert_to_tensor(self.centroids, self.head_dtype)
        if len(inputs.shape) > 2:
            embeddings = ops.reshape(embeddings, (-1, centroids.shape[-1]))
        scores = fused.packed_scores(
            embeddings,
            centroids,
            self.temperature,
            ops.convert_to_tensor(self.abstain_bias, self.head_dtype),
        )
        if len(inputs.shape) > 2:
            shape = self.compute_output_shape(ops.shape(inputs))
            scores = ops.reshape(scores, shape)
        return scores

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], packing.packed_width(self.units))

    def compute_output_spec(self, inputs):
        # The base class would announce the 16-bit compute dtype of a mixed
        # policy, which is not what `call` returns.
        check_floating(inputs.dtype, self)
        return keras.KerasTensor(
            self.compute_output_shape(inputs.shape), dtype=self.head_dtype
        )

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "units": self.units,
                "label_smoothing": self.label_smoothing,
                "learn_gamma": self.learn_gamma,
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
