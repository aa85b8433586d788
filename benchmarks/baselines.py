"""What cross-entropy and its relatives put in the place of the head and loss.

References:

- Christian Szegedy et al., Rethinking the Inception Architecture for Computer
  Vision, 2016. (Label smoothing.)
- Hongxin Wei et al., Mitigating Neural Network Overconfidence with Logit
  Normalization, 2022.
- David Macêdo, Teresa Ludermir, Enhanced Isotropy Maximization Loss: Seamless
  and High-Performance Out-of-Distribution Detection Simply Replacing the
  SoftMax Loss, 2021.
- Sudarshan Regmi et al., T2FNorm: Extremely Simple Scaled Train-time Feature
  Normalization for OOD Detection, 2023.
"""

import keras
from keras import layers, ops


def cross_entropy(label_smoothing=0.0, scale=1.0):
    """Cross-entropy of logits, with integer labels, for each sample."""

    def loss(y_true, y_pred):
        labels = ops.one_hot(
            ops.cast(ops.reshape(y_true, (-1,)), "int32"), y_pred.shape[-1]
        )
        return keras.losses.categorical_crossentropy(
            labels,
            scale * y_pred,
            from_logits=True,
            label_smoothing=label_smoothing,
        )

    return loss


def logit_norm(temperature=0.04):
    """Cross-entropy of logits that have a constant norm in training."""
    loss = cross_entropy(scale=1.0 / temperature)

    def normalized(y_true, y_pred):
        norms = ops.sqrt(ops.sum(ops.square(y_pred), -1, keepdims=True))
        return loss(y_true, y_pred / (norms + 1e-7))

    return normalized


@keras.saving.register_keras_serializable(package="baselines")
class IsoMaxPlusHead(layers.Layer):
    """Negative scaled distances of unit features to unit prototypes."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.prototypes = self.add_weight(
            shape=(self.units, input_shape[-1]),
            initializer=keras.initializers.RandomNormal(stddev=1.0),
            name="prototypes",
        )
        self.distance_scale = self.add_weight(
            shape=(), initializer="ones", name="distance_scale"
        )

    def call(self, inputs):
        cosines = ops.matmul(
            ops.normalize(inputs, axis=-1),
            ops.transpose(ops.normalize(self.prototypes, axis=-1)),
        )
        # The floor keeps the slope of the root finite on a prototype.
        distances = ops.sqrt(ops.maximum(2.0 - 2.0 * cosines, 1e-6))
        return -ops.abs(self.distance_scale) * distances


@keras.saving.register_keras_serializable(package="baselines")
class T2FNormHead(layers.Layer):
    """A linear layer on features of one length, in training only."""

    def __init__(self, units, temperature=0.1, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature
        self.dense = layers.Dense(units)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs, training=False):
        if training:
            inputs = ops.normalize(inputs, axis=-1) / self.temperature
        return self.dense(inputs)
