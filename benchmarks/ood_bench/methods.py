"""What is trained: the head on top of the features, and the loss.

Every method takes the same network up to its features. It says how the head
is built, what the loss is, and how a trained model is read: as class logits,
as scores of detectors, and, where it can abstain, as probabilities that leave
mass for that.

References:

- Raphael Pisoni, "I don't know!": Teaching neural networks to abstain with
  the HALO-Loss, 2026.
"""

import collections
import dataclasses

import keras
import numpy as np
from baselines import IsoMaxPlusHead, cross_entropy, logit_norm
from keras import layers, ops
from networks import block_outputs

import keras_halo
from keras_halo.ops import geometry, packing
from ood_bench import posthoc

_BATCH_SIZE = 250

Reading = collections.namedtuple(
    "Reading", ["logits", "scores", "probabilities"]
)
Reading.__doc__ = """What a trained model says of `N` images.

Args:
    logits: Array of shape `(N, K)`, those of the classes alone.
    scores: Dictionary of the name of a detector to `N` scores.
    probabilities: Array of shape `(N, K)` whose rows leave the mass of
        abstaining out, or `None` for a model that cannot abstain.
"""

Reader = collections.namedtuple("Reader", ["read", "storage"])
Reader.__doc__ = """How to read a trained model.

Args:
    read: Function of images, which returns a `Reading`.
    storage: Dictionary of the name of a detector to how many numbers it keeps
        besides the network.
"""


Training = collections.namedtuple(
    "Training",
    ["model", "loss", "metric", "rate", "shared", "callbacks"],
    defaults=[1.0, None, ()],
)
Training.__doc__ = """What is fitted in order to train a model.

Args:
    model: The model itself, or one that shares its layers.
    loss: As `keras.Model.compile` takes it.
    metric: Accuracy, as `keras.Model.compile` takes it.
    rate: Float, by what the learning rate is multiplied.
    shared: The method that trains this, a dataclass, where others may begin
        with the same; `None` otherwise.
    callbacks: Tuple of `keras.callbacks.Callback`.
"""


class _OnePhase:
    """Trains in one go."""

    def phases(self, model, images, epochs):
        """Yields each `Training` and its epochs, once the one before is done.

        Args:
            model: The model to train in place.
            images: `data.Images`.
            epochs: Integer, of all phases together.
        """
        yield self.training(model), epochs


def _predict(model, x):
    """Predictions, all batches of one size: some backends compile for each."""
    padding = -len(x) % _BATCH_SIZE
    padded = np.concatenate(
        [x, np.zeros_like(x, shape=(padding, *x.shape[1:]))]
    )
    outputs = model.predict(padded, batch_size=_BATCH_SIZE, verbose=0)
    return {name: values[: len(x)] for name, values in outputs.items()}


def _on_a_sphere(features):
    """Features of one length, with components near one as layers expect."""
    x = layers.UnitNormalization()(features)
    return layers.Rescaling(features.shape[-1] ** 0.5)(x)


def _all_blocks(model, *more):
    """What the blocks of a network say: directions, and logarithms of lengths.

    Args:
        model: `keras.Model` on a network of `networks.NETWORKS`.
        *more: Symbolic tensors of shape `(N, f)`, treated as blocks are.
    """
    return keras_halo.layers.BlockFeatures()([*block_outputs(model), *more])


class _Linear(_OnePhase):
    """A linear layer on the features, with every post-hoc detector."""

    def features(self, backbone):
        return backbone.output

    def head(self, backbone, num_classes):
        return layers.Dense(num_classes, name="logits")(self.features(backbone))

    def more_blocks(self, model):
        """What detectors on all blocks read beside them."""
        return ()

    def reader(self, model, images):
        network = _with_features(model, *self.more_blocks(model))
        x, y = images.train
        train = _predict(network, x)
        kernel, bias = model.get_layer("logits").get_weights()
        detectors = posthoc.fit_all(
            train["features"],
            train["logits"],
            y,
            kernel,
            bias,
            _validation_temperature(network, images),
        )
        on_blocks = posthoc.fit_on_blocks(
            train["blocks"], y, images.num_classes
        )
        return _reader(network, {**detectors, **on_blocks})


@dataclasses.dataclass(frozen=True)
class CrossEntropy(_Linear):
    """Cross-entropy, with or without label smoothing."""

    label_smoothing: float = 0.0

    def training(self, model):
        loss = cross_entropy(self.label_smoothing)
        return Training(model, loss, "accuracy")


class CrossEntropyOnASphere(CrossEntropy):
    """Cross-entropy on features that are scaled to one length."""

    def features(self, backbone):
        return _on_a_sphere(backbone.output)


@dataclasses.dataclass(frozen=True)
class CrossEntropyOnAnEmbedding(CrossEntropy):
    """Cross-entropy on an embedding like the one that HALO has.

    Args:
        embedding_dim: Integer, the size of the embedding.
    """

    embedding_dim: int = 32

    def features(self, backbone):
        return layers.Dense(self.embedding_dim)(backbone.output)

    def more_blocks(self, model):
        return (model.layers[-1].input,)


@dataclasses.dataclass(frozen=True)
class LogitNorm(_Linear):
    """Cross-entropy of logits that have a constant norm in training."""

    temperature: float = 0.04

    def training(self, model):
        loss = logit_norm(self.temperature)
        return Training(model, loss, "accuracy")


@dataclasses.dataclass(frozen=True)
class IsoMaxPlus(_OnePhase):
    """Distances to prototypes, with a scale that is left out afterwards."""

    entropic_scale: float = 10.0

    def head(self, backbone, num_classes):
        return IsoMaxPlusHead(num_classes, name="logits")(backbone.output)

    def training(self, model):
        loss = cross_entropy(scale=self.entropic_scale)
        return Training(model, loss, "accuracy")

    def reader(self, model, images):
        network = _with_features(model)
        detectors = posthoc.logit_detectors(
            _validation_temperature(network, images)
        )
        # All logits have the same scale: the largest is the least distance.
        detectors["min distance"] = detectors.pop("max logit")
        return _reader(network, detectors)


def roundness(labels, embeddings, centroids):
    """How far the residuals of a batch are from a unit Gaussian's covariance.

    The radial term of HALO fixes the length of a residual and leaves its
    direction free. This term is smallest where all directions are alike.

    Formula:

    ```python
    residuals = embeddings - c[labels]
    covariance = transpose(residuals) @ residuals / batch_size
    roundness = sum((covariance - identity) ** 2) / D
    ```

    Args:
        labels: Tensor of shape `(B,)` or `(B, 1)`.
        embeddings: Tensor of shape `(B, D)`.
        centroids: Tensor of shape `(K, D)`, not centred.

    Returns:
        Scalar tensor.
    """
    centroids = geometry.centered(ops.convert_to_tensor(centroids))
    labels = ops.cast(ops.reshape(labels, (-1,)), "int32")
    residuals = embeddings - ops.take(centroids, labels, axis=0)
    dim = embeddings.shape[-1]
    total = ops.matmul(ops.transpose(residuals), residuals)
    covariance = total / ops.cast(ops.shape(residuals)[0], total.dtype)
    return ops.sum(ops.square(covariance - ops.eye(dim))) / dim


@dataclasses.dataclass(frozen=True)
class HALO(_OnePhase):
    """The published HALO head, and the loss.

    Args:
        embedding_dim: Integer, the size `D` of the embedding; 0 for `D = K`.
        label_smoothing: As of `keras_halo.HALOLoss` and `HALODense`.
        distill: As of `keras_halo.HALOLoss`.
        radial_weight: As of `keras_halo.HALOLoss`.
        learn_gamma: As of `keras_halo.HALODense`.
        normalize: Boolean, whether batch normalization without a scale comes
            before the head.
        roundness: Float, the weight of `roundness` in the loss.
    """

    embedding_dim: int = 0
    label_smoothing: float = 0.1
    distill: bool = True
    radial_weight: float = 1.0
    learn_gamma: bool = True
    normalize: bool = False
    roundness: float = 0.0

    def head(self, backbone, num_classes):
        dim = self.embedding_dim or num_classes
        x = layers.Dense(dim, use_bias=not self.normalize)(backbone.output)
        if self.normalize:
            x = layers.BatchNormalization(momentum=0.9, scale=False)(x)
        return keras_halo.HALODense.reference(
            num_classes, self.label_smoothing, learn_gamma=self.learn_gamma
        )(x)

    def training(self, model):
        loss = keras_halo.HALOLoss(
            label_smoothing=self.label_smoothing,
            distill=self.distill,
            radial_weight=self.radial_weight,
        )
        if not self.roundness:
            return Training(model, loss, "accuracy")
        head = model.layers[-1]
        width = model.output.shape[-1]
        # A loss sees one tensor: packed scores and embeddings side by side.
        both = layers.Concatenate()([model.output, head.input])

        def with_roundness(y_true, y_pred):
            return loss(y_true, y_pred[:, :width]) + self.roundness * roundness(
                y_true, y_pred[:, width:], head.centroids
            )

        def accuracy(y_true, y_pred):
            return keras.metrics.sparse_categorical_accuracy(
                y_true, y_pred[:, :width]
            )

        return Training(
            keras.Model(model.input, both), with_roundness, accuracy
        )

    def reader(self, model, images):
        fitted = keras_halo.fit_class_gaussians(
            model, *images.train, batch_size=_BATCH_SIZE, verbose=0
        )
        # What the layer of Gaussians keeps, and nothing that was trained.
        weights = fitted.get_layer("class_gaussians").weights
        storage = dict.fromkeys(keras_halo.OOD_METHODS, 0)
        storage["fitted"] = sum(int(np.prod(w.shape)) for w in weights)

        def read(x):
            outputs = _predict(fitted, x)
            packed = outputs["scores"]
            scores = {
                name: keras_halo.ood_score(packed, name)
                for name in keras_halo.OOD_METHODS
            }
            return Reading(
                packing.unpack(packed).logits,
                {**scores, "fitted": outputs["ood"]},
                keras_halo.decode_predictions(packed).probabilities,
            )

        return Reader(read, storage)


class DefaultHALO(HALO):
    """The two lines swapped: a head with an embedding of its own."""

    def head(self, backbone, num_classes):
        return keras_halo.HALODense(num_classes)(backbone.output)


@dataclasses.dataclass(frozen=True)
class VariedHALO(HALO):
    """What HALO leaves open: targets, the radial term, margin, centroids.

    Args:
        plain: Pair of floats in `[0, 1]`, the share of plain targets beside
            distilled ones in the first epoch and in the last, linear in
            between.
        warm_up: Float in `[0, 1)`, the share of the epochs over which the
            radial term rises to its weight.
        margin_smoothing: Float in `[0, 1)`, the label smoothing from which the
            head takes its abstain margin; -1 for that of the loss.
        decay: Float, the weight of the squared centroids in the loss.
    """

    plain: tuple = (0.0, 0.0)
    warm_up: float = 0.0
    margin_smoothing: float = -1.0
    decay: float = 0.0

    def head(self, backbone, num_classes):
        dim = self.embedding_dim or num_classes
        x = layers.Dense(dim)(backbone.output)
        head = keras_halo.HALODense.reference(
            num_classes,
            self.label_smoothing,
            learn_gamma=self.learn_gamma,
            centroid_regularizer=keras.regularizers.L2(self.decay),
        )
        scores = head(x)
        if self.margin_smoothing >= 0.0:
            # Its own would have to be that of the loss.
            head.abstain_bias.assign(
                geometry.abstain_bias(dim, num_classes, self.margin_smoothing)
            )
        return scores

    def training(self, model):
        # A weight of the model: JAX takes any other number for a constant.
        model.progress = keras.Variable(0.0, trainable=False, name="progress")
        losses = {
            (distill, weight): keras_halo.HALOLoss(
                self.label_smoothing, distill, weight, reduction=None
            )
            for distill in (True, False)
            for weight in (0.0, self.radial_weight)
        }

        def blended(y_true, y_pred):
            # The loss is linear in its targets and in its radial term.
            progress = ops.convert_to_tensor(model.progress)
            first, last = self.plain
            plain = first + (last - first) * progress
            radial = ops.minimum(progress / (self.warm_up or 1e-9), 1.0)
            if not self.warm_up:
                radial = ops.ones_like(radial)
            weights = {
                (True, 0.0): (1.0 - plain) * (1.0 - radial),
                (True, self.radial_weight): (1.0 - plain) * radial,
                (False, 0.0): plain * (1.0 - radial),
                (False, self.radial_weight): plain * radial,
            }
            return sum(
                share * losses[kind](y_true, y_pred)
                for kind, share in weights.items()
            )

        return Training(
            model, blended, "accuracy", callbacks=(_Progress(model.progress),)
        )


class _Progress(keras.callbacks.Callback):
    """Writes into a variable how far training has come: from 0 to 1."""

    def __init__(self, variable):
        super().__init__()
        self.variable = variable

    def on_epoch_begin(self, epoch, logs=None):
        self.variable.assign(epoch / max(self.params["epochs"] - 1, 1))


class _Converted:
    """A first phase, and another head for the rest of the epochs.

    `keras_halo.convert_head` makes the second head: the embedding is all that
    it reads, whitened such that the classes start as unit Gaussians. It then
    starts from the full learning rate again.
    """

    def features(self, backbone):
        """What the converted head reads."""
        if self.all_blocks:
            return _all_blocks(backbone)
        x = backbone.output
        return _on_a_sphere(x) if self.unit_length else x

    def whitened(self, backbone):
        """The embedding in which `convert_head` puts its head."""
        features = self.features(backbone)
        return layers.Dense(features.shape[-1])(features)

    def first_training(self, model, images):
        """The `Training` of a classifier that shares layers with `model`."""
        features = layers.GlobalAveragePooling2D()(block_outputs(model)[-1])
        classifier = _with_linear_head(model, features, images)
        first = CrossEntropy()
        return first.training(classifier)._replace(shared=first)

    def phases(self, model, images, epochs):
        embedding, head = model.layers[-2:]
        num_first = min(round(self.share * epochs), epochs - 1)
        first = self.first_training(model, images)
        yield first, num_first
        converted = keras_halo.convert_head(
            keras.Model(model.input, embedding.input),
            *images.train,
            batch_size=_BATCH_SIZE,
            label_smoothing=self.label_smoothing,
            abstain_rate=None,
            units=images.num_classes,
            verbose=0,
        )
        whitening, halo_head = converted.layers[-2:]
        embedding.set_weights(whitening.get_weights())
        head.set_weights(self.weights_like(halo_head))
        if self.freeze:
            first.model.trainable = False
        training = self.training(model)._replace(rate=self.rate)
        yield training, epochs - num_first


@dataclasses.dataclass(frozen=True)
class ConvertedHALO(_Converted, HALO):
    """Cross-entropy first, HALO for the rest of the same number of epochs.

    Args:
        share: Float in `(0, 1)`, the share of the epochs in the first phase.
        unit_length: Boolean, whether the converted head reads features that
            are scaled to one length.
        freeze: Boolean, whether HALO trains embedding and head alone.
        all_blocks: Boolean, whether the converted head reads direction and
            length of the features of all blocks instead.
        rate: Float, the learning rate of the second phase in units of that
            of the first.
    """

    share: float = 0.9
    unit_length: bool = True
    freeze: bool = True
    all_blocks: bool = False
    rate: float = 1.0

    def head(self, backbone, num_classes):
        return keras_halo.HALODense.reference(
            num_classes, self.label_smoothing, learn_gamma=self.learn_gamma
        )(self.whitened(backbone))

    def weights_like(self, halo_head):
        return halo_head.get_weights()


@dataclasses.dataclass(frozen=True)
class ConvertedCrossEntropy(_Converted, CrossEntropy):
    """`ConvertedHALO` on all blocks, with cross-entropy in HALO's place.

    The embedding and what the head says of it at the start are the same, so
    that nothing but the loss is another one: the logits of HALO's classes are
    linear in the embedding.

    Args:
        share: As of `ConvertedHALO`, and so are the others.
    """

    share: float = 0.9
    freeze: bool = True
    all_blocks: bool = True
    rate: float = 2.5

    def head(self, backbone, num_classes):
        return layers.Dense(num_classes, name="logits")(self.whitened(backbone))

    def weights_like(self, halo_head):
        centroids, gamma = (
            ops.convert_to_numpy(weight)
            for weight in (halo_head.centroids, halo_head.temperature)
        )
        # s = gamma * (2 * dot(x, c) / D - mean(c ** 2)), as HALO has it.
        c = centroids - centroids.mean(axis=0)
        return [
            gamma * 2.0 / c.shape[-1] * c.T,
            -gamma * np.square(c).mean(axis=-1),
        ]


@dataclasses.dataclass(frozen=True)
class WhitenedHALO(ConvertedHALO):
    """HALO from the start, and a head on its own embedding at the end.

    The radial term gives residuals their length and leaves their directions
    free. `keras_halo.convert_head` makes the directions alike, by a `Dense`
    after the embedding, or after the features of all blocks and the embedding.

    Args:
        first_dim: Integer, the size of the embedding.
    """

    first_dim: int = 32

    def features(self, backbone):
        x = layers.Dense(self.first_dim, name="embedding")(backbone.output)
        if self.all_blocks:
            return _all_blocks(backbone, x)
        return _on_a_sphere(x) if self.unit_length else x

    def first_training(self, model, images):
        first = HALO(embedding_dim=self.first_dim)
        head = keras_halo.HALODense.reference(
            images.num_classes,
            first.label_smoothing,
            learn_gamma=first.learn_gamma,
        )
        scores = head(model.get_layer("embedding").output)
        classifier = keras.Model(model.input, scores)
        return first.training(classifier)._replace(shared=first)


def _with_linear_head(model, features, images):
    return keras.Model(model.input, layers.Dense(images.num_classes)(features))


def _with_features(model, *more_blocks):
    """The model with what detectors read beside its output."""
    return keras.Model(
        model.input,
        {
            "features": model.layers[-1].input,
            "blocks": _all_blocks(model, *more_blocks),
            "logits": model.output,
        },
    )


def _validation_temperature(network, images):
    x, y = images.validation
    return posthoc.fit_temperature(_predict(network, x)["logits"], y)


def _reader(network, detectors):
    def read(x):
        outputs = _predict(network, x)
        logits = outputs["logits"]
        scores = {
            name: detector.score(outputs[detector.reads], logits)
            for name, detector in detectors.items()
        }
        return Reading(logits, scores, None)

    return Reader(read, {name: d.storage for name, d in detectors.items()})


# 0.02, plain targets and normalized embeddings did well in short trials.
METHODS = {
    "cross-entropy": CrossEntropy(),
    "cross-entropy-unit": CrossEntropyOnASphere(),
    # What of HALO in 32 and 128 dimensions is a merit of the embedding alone?
    "cross-entropy-D32": CrossEntropyOnAnEmbedding(),
    "cross-entropy-D128": CrossEntropyOnAnEmbedding(embedding_dim=128),
    "label-smoothing": CrossEntropy(label_smoothing=0.1),
    "LogitNorm": LogitNorm(),
    "IsoMax+": IsoMaxPlus(),
    "HALO-default": DefaultHALO(),
    "HALO": HALO(),
    "HALO-plain": HALO(distill=False),
    "HALO-fixed-gamma": HALO(learn_gamma=False),
    "HALO-no-radial": HALO(radial_weight=0.0),
    "HALO-D32": HALO(embedding_dim=32),
    "HALO-D128": HALO(embedding_dim=128),
    # A head that is trained alone bears a larger learning rate.
    "HALO-converted-blocks": ConvertedHALO(
        distill=False, label_smoothing=0.003, all_blocks=True, rate=2.5
    ),
    "HALO-plain-0.02": HALO(distill=False, label_smoothing=0.02),
    "HALO-D32-plain-0.02": HALO(
        distill=False, label_smoothing=0.02, embedding_dim=32
    ),
    "HALO-normalized": HALO(
        distill=False, label_smoothing=0.02, embedding_dim=16, normalize=True
    ),
    "HALO-converted": ConvertedHALO(distill=False, label_smoothing=0.005),
    "HALO-converted-whole": ConvertedHALO(
        distill=False,
        label_smoothing=0.001,
        share=0.5,
        unit_length=False,
        freeze=False,
    ),
    "HALO-D32-whitened": WhitenedHALO(distill=False, label_smoothing=0.005),
    "HALO-D128-blocks": WhitenedHALO(
        distill=False, label_smoothing=0.003, all_blocks=True, first_dim=128
    ),
    "HALO-round": HALO(distill=False, label_smoothing=0.02, roundness=1.0),
    "HALO-normalized-round": HALO(
        distill=False,
        label_smoothing=0.02,
        embedding_dim=16,
        normalize=True,
        roundness=1.0,
    ),
    "HALO-mixed": VariedHALO(plain=(0.5, 0.5)),
    "HALO-plain-to-distilled": VariedHALO(plain=(1.0, 0.0)),
    "HALO-distilled-to-plain": VariedHALO(plain=(0.0, 1.0)),
    "HALO-warm-up": VariedHALO(warm_up=0.3),
    "HALO-small-margin": VariedHALO(margin_smoothing=0.3),
    "HALO-large-margin": VariedHALO(margin_smoothing=0.02),
    "HALO-decay": VariedHALO(decay=1e-3),
    # Last: each begins like one further up, whose first phase is done by then.
    "HALO-D32-blocks": WhitenedHALO(
        distill=False, label_smoothing=0.003, all_blocks=True
    ),
    # What of HALO on all blocks is a merit of the blocks alone?
    "cross-entropy-blocks": ConvertedCrossEntropy(),
}

# With augmentation of no gain over those that are left: only run by name.
TRIED = (
    "HALO-plain-0.02",
    "HALO-D32-plain-0.02",
    "HALO-normalized",
    "HALO-converted",
    "HALO-converted-whole",
    "HALO-D32-whitened",
    "HALO-D32-blocks",
    "HALO-round",
    "HALO-normalized-round",
    "HALO-mixed",
    "HALO-plain-to-distilled",
    "HALO-distilled-to-plain",
    "HALO-warm-up",
    "HALO-small-margin",
    "HALO-large-margin",
    "HALO-decay",
)

# For a quick comparison: what every post-hoc detector reads, the best baseline
# without post-hoc state, the defaults, and the best setting.
CENTRAL = (
    "cross-entropy",
    "IsoMax+",
    "HALO",
    "HALO-D128-blocks",
)
