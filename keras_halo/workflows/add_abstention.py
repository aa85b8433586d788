"""Gives a trained classifier the answer "I don't know"."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_halo.layers.block_features import BlockFeatures
from keras_halo.layers.precise_dense import PreciseDense
from keras_halo.losses.halo_loss import HALOLoss
from keras_halo.ops import evidence, packing
from keras_halo.ops.class_statistics import (
    ClassStatistics,
    check_counts,
    resolution_of,
)
from keras_halo.ops.labels import class_indices
from keras_halo.utils.batches import check_readable, labelled_data
from keras_halo.utils.checks import (
    as_integer,
    check_batch_size,
    check_finite,
    check_model,
    check_verbose,
)
from keras_halo.utils.types import Data
from keras_halo.workflows.blocks import blocks_and_features
from keras_halo.workflows.collecting import check_labels, collect
from keras_halo.workflows.convert_head import (
    convert_head,
    new_head,
    whitened_centroids,
)
from keras_halo.workflows.graph import (
    free_name,
    input_structure,
    warn_of_preprocessor,
)
from keras_halo.workflows.last_layer import embeddings_before_head

# Targets are smooth by themselves. Those of HALO's own distillation would be
# surer than the given network, which has seen these data.
_LABEL_SMOOTHING = 0.003

# Of the answers of the given network, beside the labels. Alone they would
# repeat its errors, labels alone make the head surer than it is right.
_SHARE_OF_ANSWERS = 0.25

# Small: training begins with a head that is nearly right.
_LEARNING_RATE = 1e-3

# The network has seen the data, so its classes look surer than they are: five
# times the usual weight keeps them at the squared radii that they began with.
_RADIAL_WEIGHT = 5.0

# How much the distance from all data moves the evidence, in units of how much
# the distances between the classes do.
_BACKGROUND_SHARE = 0.5

_BATCH_SIZE = 128
_LARGE_BATCH = 1024

# The deviation of the lengths of samples is at least this share of their mean.
_LEAST_SPREAD = 0.01

# What one sample may add to the components, 1 where it alone makes one of them.
_MOST_LEVERAGE = 0.5

# With more features the covariance of the samples is theirs alone: it calls
# every new input unknown.
_SAMPLES_A_FEATURE = 3

# Fewer features are not tried, and the part of the samples that is held out to
# choose among numbers of features.
_FEWEST_FEATURES = 32
_HELD_OUT = 0.2

# Inverse temperatures over the number of features: a half for Gaussians that
# are known exactly.
_TEMPERATURES = np.geomspace(0.01, 1.0, 15)

# Of the randomized search for principal components.
_POWER_STEPS = 3
_OVERSAMPLED = 16

# A loss of accuracy, on the given data, that nobody expects. The given network
# may have memorised these: beside a pretrained one, a head that was right two
# points less often on them was right two points more often on new images.
_WARN_BELOW = 0.03


def add_abstention(
    model: keras.Model,
    x: Data,
    y: Any = None,
    blocks: Sequence[Any] | None = None,
    epochs: int = 3,
    batch_size: int | None = None,
    sample_weight: Any = None,
    max_features: int = 1024,
    verbose: str | int = "auto",
    **kwargs: Any,
) -> keras.Model:
    """Returns a trained classifier that can abstain, with a HALO head.

    Any functional or sequential classifier will do, whatever it was trained
    with. The head reads the features of all blocks of the network, not only
    the last ones: the last features of a classifier keep what tells its classes
    apart and drop much of what tells that an input is none of them. Beside them
    it reads the logits of the given model. One pass over the data computes
    both, `convert_head` makes the head, and a few epochs on what is kept train
    it alone. It learns the labels and, for a quarter, the class probabilities
    that the given model answers with.

    What tells the classes apart is only a part of what the blocks know. So the
    embedding gets further components, in which every centroid is zero: the
    principal components of all features. They change no class logit and no
    probability. They lengthen the embeddings of inputs that resemble none of
    the data, and so speak for the far background. A head with
    `abstain_rate=None` has none, and goes without them.

    Formula of the evidence against the far background, with `x` the trained
    embedding, `p` the principal components and, over the given data, the
    standard deviations `std`:

    ```python
    far = max_k s_k - gamma * |x|^2 / 2 - weight * |p|^2
    weight = std(max_k s_k) / (2 * std(|p|^2))
    ```

    Each sample counts there as long as the others alone would make it: new
    inputs are longer than those that the components were made of.

    A head that is made of many features without training, by `epochs=0`, is
    less confident than it is right. `calibrate` sets its temperature by
    validation data, and changes no answer.

    The new model shares all layers with the given one, whose weights,
    `trainable` flags and compile state stay as they are. It emits packed
    scores; `convert_head` is the step below, for a head on the last features,
    on tokens or on pixels.

    Memory: for each sample 8 bytes times the features of all blocks together
    and 16 times those that are kept, plus 8 bytes times the square of
    `max_features`. With `verbose` it is said before it is taken.

    Args:
        model: A trained functional or sequential model with one output that
            ends in a classifier, as `convert_head` takes it, with one answer a
            sample. A model inside of it, such as a pretrained one, is looked
            into.
        x: Training inputs, whatever `model.predict` takes; or, without `y`, a
            dataset of batches `(x, y)` or `(x, y, sample_weight)`. A few
            hundred samples a class are enough. Data that is augmented should
            not be.
        y: Labels, integers of shape `(N,)` or `(N, 1)`, or one-hot of shape
            `(N, K)`; for one unit 0 or 1.
        blocks: List of names of layers, or of symbolic tensors of the model,
            that the head reads. Defaults to `None`, which means the last
            feature map of every resolution, the last vector of every width and
            four residual sums of a transformer.
        epochs: Integer, how long the head is trained. 0 converts only.
            Defaults to 3.
        batch_size: Integer, as in `model.predict`. Defaults to 32; training
            takes 128.
        sample_weight: Optional weights of shape `(N,)`. What has a weight of
            zero is left out; every other weight counts as one. Defaults to
            `None`.
        max_features: Integer. The features are turned into their principal
            components, at most so many and at most a third of the samples.
            From how many of them the head learns the classes, the likelihood
            of held-out samples decides. The logits of the given model count as
            features, and take at most half. Defaults to 1024.
        verbose: `"auto"`, 0, 1 or 2, as in `model.predict`. Defaults to
            `"auto"`.
        **kwargs: Further arguments of `HALODense`, such as `abstain_rate` and
            `name`.

    Returns:
        `keras.Model` with the inputs of `model` that emits packed scores. To
        train it further, compile it with `HALOLoss`.

    Raises:
        ValueError: If the model does not end as described, answers more than
            once a sample, has no layer of a given name, labels are out of range
            or missing, a class has no sample, or features are not finite. The
            given model is never changed.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(90, 6)).astype("float32"), np.arange(90) % 3
    >>> x[np.arange(90), y] += 5.0
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((6,)),
    ...         keras.layers.Dense(16, activation="relu"),
    ...         keras.layers.Dense(3, activation="softmax"),
    ...     ]
    ... )
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> _ = model.fit(x, y, epochs=20, verbose=0)
    >>> guarded = add_abstention(model, x, y, verbose=0)
    >>> noise = keras_halo.decode_predictions(
    ...     guarded.predict(-20.0 * np.ones((5, 6)), verbose=0)
    ... )
    >>> bool(noise.abstained.all())
    True

    References:

    - Raphael Pisoni, "I don't know!": Teaching neural networks to abstain
      with the HALO-Loss, 2026.
    - Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin, A Simple Unified
      Framework for Detecting Out-of-Distribution Samples and Adversarial
      Attacks, 2018. (Features of all layers.)
    """
    max_features = as_integer(max_features, "max_features", 2)
    epochs = as_integer(epochs, "epochs", 0)
    batch_size = check_batch_size(batch_size)
    verbose = check_verbose(verbose)
    check_model(model)
    last, old_head = embeddings_before_head(model)
    warn_of_preprocessor(model)
    if len(last.shape) != 2:
        raise ValueError(
            "Expected a classifier with one answer a sample. Received: a model "
            f"whose head reads features of shape {last.shape}. For tokens and "
            "pixels use `keras_halo.convert_head`."
        )
    num_classes = max(old_head.units, 2)
    # Bad arguments show here, before the data are read.
    new_head(num_classes, **kwargs)
    tensors, last = _blocks(model, last, blocks)
    features = BlockFeatures(name=free_name(model, "halo_blocks"))(tensors)
    data = labelled_data(x, y, sample_weight)
    check_labels(data, model, num_classes, last.shape[:-1], 1)
    check_readable(data, "x")
    inputs = input_structure(model)

    width = features.shape[-1]
    if verbose:
        size = 8 * width + 16 * min(max_features, width)
        print(
            f"Features of {len(tensors)} blocks, {width} a sample: at most "
            f"{size / 1000:.1f} MB for a thousand samples."
        )
    # The logits of the given model beside them: one pass for both.
    linear = old_head.linear_map()
    both = features
    if linear is not None:
        logits = _dense("given_logits", last.shape[-1], *linear)(last)
        both = keras.layers.Concatenate(dtype="float32")([features, logits])
    parts = []
    repetition = collect(
        keras.Model(inputs, both),
        data,
        batch_size,
        verbose,
        lambda *batch: parts.append(batch),
    )
    rows, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    parts.clear()
    labels = class_indices(labels, num_classes, labels.shape[:1])
    check_counts(np.bincount(labels, minlength=num_classes), 1)
    check_finite(rows, "features")
    resolution = repetition.resolution(_moments(rows)[1], resolution_of(rows))
    reduced, logits = rows[:, :width], rows[:, width:]
    limit = min(max_features, _features_for(len(rows), num_classes))
    # What the logits say must not be lost among the other components.
    num_given = min(logits.shape[-1], limit // 2)
    limit = min(limit - num_given, width)
    kernel, bias = principal_components(reduced, limit, resolution[:width])
    components = reduced @ kernel + bias
    kept = _best_count(components, labels, num_classes)
    reduction = _dense(free_name(model, "halo_reduction"), width, kernel, bias)
    features = reduction(features)
    targets, joined = labels, components
    if num_given:
        targets = _targets(old_head.probabilities(logits), labels)
        kernel, bias = principal_components(
            logits, num_given, resolution[width:]
        )
        joined = np.concatenate([components, logits @ kernel + bias], axis=-1)
        components = joined[:, :limit]
        of_given = _dense(
            free_name(model, "halo_given"),
            last.shape[-1],
            linear[0] @ kernel,
            linear[1] @ kernel + bias,
        )
        join = keras.layers.Concatenate(
            dtype="float32", name=free_name(model, "halo_features")
        )
        features = join([features, of_given(last)])
    read = np.r_[:kept, limit : joined.shape[-1]]
    rows = joined[:, read]
    start = keras.Input((rows.shape[-1],))
    head_model = convert_head(
        keras.Model(start, keras.layers.Identity()(start)),
        rows,
        labels,
        units=num_classes,
        verbose=0,
        **kwargs,
    )
    if epochs:
        _train(head_model, rows, targets, epochs, verbose)
    trained, head = head_model.layers[-2:]
    # The same map from all that is joined, of which the head reads a part.
    kernel = np.zeros((joined.shape[-1], len(read)), "float32")
    kernel[read], bias = trained.get_weights()
    scores = head_model.predict(rows, batch_size=_LARGE_BATCH, verbose=0)
    if num_given:
        given = old_head.probabilities(logits).argmax(axis=-1)
        _compare(given, scores[:, :num_classes].argmax(axis=-1), labels)
    if head.abstain_rate is not None:
        kernel, bias, head = _with_background(
            kernel,
            bias,
            head,
            new_head(num_classes, **kwargs),
            scores,
            components,
        )
    embedding = _dense(
        free_name(model, "halo_embedding"), len(kernel), kernel, bias
    )
    return keras.Model(inputs, head(embedding(features)))


def _with_background(kernel, bias, head, wider, scores, components):
    """Adds what speaks for the far background alone.

    Args:
        kernel: Array of shape `(F, D)`, of the embedding of `F` features.
        bias: Array of shape `(D,)`.
        head: `HALODense` that reads this embedding.
        wider: `HALODense` that is not built, for all components.
        scores: Array of packed scores of `head` on the data.
        components: Array of shape `(N, P)`, the first `P` features of them.

    Returns:
        Tuple of kernel, bias and `wider`, with `D + P` components.
    """
    dim = kernel.shape[-1]
    added = components.shape[-1]
    parts = packing.unpack(scores.astype("float64"))
    gamma = float(ops.convert_to_numpy(head.temperature))
    near = parts.logits.max(axis=-1, keepdims=True)
    lengths = np.einsum("np,np->n", components, components, dtype="float64")
    lengths = lengths[:, None]
    # Each sample as long as if the others alone had made the components, as new
    # inputs will be: few samples for many components would look all alike.
    leverage = np.minimum(lengths / len(lengths), _MOST_LEVERAGE)
    lengths /= 1.0 - leverage
    # Lengths that are all but equal would be blown up without bound.
    spread = max(lengths.std(), _LEAST_SPREAD * lengths.mean())
    weight = _BACKGROUND_SHARE * near.std() / spread if spread else 0.0
    # Class logits stay as they are; squared radii are one on average.
    radii = gamma * parts.squared_norm - near + 2.0 * weight * lengths
    new_gamma = radii.mean()
    scale = math.sqrt(gamma / new_gamma * (dim + added) / dim)
    scale_added = math.sqrt(2.0 * weight / new_gamma * (dim + added))
    kernel = np.concatenate(
        [scale * kernel, scale_added * np.eye(len(kernel), added)], axis=-1
    )
    bias = np.concatenate([scale * bias, np.zeros(added)])
    centroids = scale * ops.convert_to_numpy(head.centroids)
    wider.build((None, dim + added))
    wider.assign_temperature(new_gamma)
    wider.centroids.assign(np.pad(centroids, ((0, 0), (0, added))))
    squared_norm = (near + radii) / new_gamma
    samples = evidence.class_evidence(
        *map(ops.convert_to_tensor, (near, squared_norm, new_gamma))
    )
    wider.assign_evidence(ops.convert_to_numpy(samples))
    return kernel, bias, wider


def _dense(name, num_features, kernel, bias):
    """A linear layer with given weights."""
    layer = PreciseDense(kernel.shape[-1], name=name)
    layer.build((None, num_features))
    layer.set_weights([kernel, bias])
    return layer


def _targets(probabilities, labels):
    """What the head is trained to say, distributions over the classes."""
    targets = _SHARE_OF_ANSWERS * probabilities
    targets[np.arange(len(labels)), labels] += 1.0 - _SHARE_OF_ANSWERS
    return targets.astype("float32")


def _blocks(model, last, blocks):
    """Symbolic tensors that the head reads, and those before the old head."""
    if blocks is None:
        return blocks_and_features(model, last)
    if not isinstance(blocks, (list, tuple)) or not blocks:
        raise ValueError(
            "`blocks` must be a list of names of layers or of symbolic "
            f"tensors. Received: blocks={blocks!r}."
        )
    names = {layer.name: layer for layer in model.layers}
    unknown = [b for b in blocks if isinstance(b, str) and b not in names]
    if unknown:
        raise ValueError(
            "`blocks` must name layers of the model. Received: "
            f"{unknown[0]!r}; the model has {sorted(names)}."
        )
    tensors = [names[b].output if isinstance(b, str) else b for b in blocks]
    return tensors, last


def _features_for(num_samples, num_classes):
    """How many features so many samples have a covariance for."""
    wanted = max(num_samples // _SAMPLES_A_FEATURE, num_classes)
    # Each class takes one of the samples for its mean.
    return max(min(wanted, num_samples - num_classes), 2)


def _best_count(components, labels, num_classes):
    """How many of the first components tell the classes of new inputs best.

    All of them, a half, a quarter and so on are tried: by the likelihood of
    held-out samples under the head that `convert_head` makes of the others, at
    its best temperature. Where the held-out samples are too few to tell, more
    features are kept.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    held_out, kept = np.split(order, [int(_HELD_OUT * len(order))])
    counts = [components.shape[-1]]
    while counts[-1] // 2 >= max(_FEWEST_FEATURES, num_classes):
        counts.append(counts[-1] // 2)
    seen = np.bincount(labels[kept], minlength=num_classes)
    if len(counts) == 1 or not len(held_out) or not seen.all():
        return counts[0]

    def losses(count):
        statistics = ClassStatistics(num_classes, count, pooled=True)
        # In parts: nothing as large as the data is copied.
        for begin in range(0, len(kept), _LARGE_BATCH):
            part = kept[begin : begin + _LARGE_BATCH]
            statistics.update(components[part, :count], labels[part])
        transform, center, centroids = whitened_centroids(statistics)
        new = (components[held_out, :count] - center) @ transform.T
        distances = np.square(centroids).mean(axis=-1)
        distances = distances - 2.0 * new @ centroids.T / count
        gaps = distances - distances.min(axis=-1, keepdims=True)
        own = gaps[np.arange(len(new)), labels[held_out]]
        # Of the temperature `calibrate` takes care: the best one for each.
        of_temperatures = [
            np.log(np.exp(-gamma * gaps).sum(axis=-1)) + gamma * own
            for gamma in count * _TEMPERATURES
        ]
        return min(of_temperatures, key=np.mean)

    found = {count: losses(count) for count in counts}
    best = min(found.values(), key=np.mean)
    for count, values in found.items():
        excess = values - best
        if excess.mean() <= excess.std() / math.sqrt(len(excess)):
            return count
    return counts[-1]


def principal_components(rows, count, resolution=0.0):
    """Kernel and bias of the map to the first principal components.

    Features are scaled to a variance of one before, and components after. Found
    by randomized subspace iteration, in the memory of `count` rows more.

    Args:
        rows: Array of shape `(N, F)`.
        count: Integer, at most `F` and at most `N`.
        resolution: Array of shape `(F,)`. A feature that deviates by no more
            does not vary and has no part in any component. Defaults to `0.0`.

    Returns:
        Tuple of arrays of shapes `(F, count)` and `(count,)`, float32.

    Example:

    >>> rows = np.random.default_rng(0).normal(size=(50, 8))
    >>> kernel, bias = principal_components(rows, 3)
    >>> (rows @ kernel + bias).var(axis=0).round(3).tolist()
    [1.0, 1.0, 1.0]

    References:

    - Nathan Halko, Per-Gunnar Martinsson, Joel A. Tropp, Finding Structure with
      Randomness: Probabilistic Algorithms for Constructing Approximate Matrix
      Decompositions, 2011.
    """
    mean, deviation = _moments(rows)
    scale = np.zeros_like(mean)
    np.divide(1.0, deviation, out=scale, where=deviation > resolution)
    # One copy, not two.
    rows = rows - mean
    rows *= scale
    rng = np.random.default_rng(0)
    width = min(count + _OVERSAMPLED, *rows.shape)
    basis = rng.normal(size=(rows.shape[1], width)).astype(rows.dtype)
    for _ in range(_POWER_STEPS):
        basis, _ = np.linalg.qr(rows.T @ (rows @ basis))
    projected = rows @ basis
    values, vectors = np.linalg.eigh(projected.T @ projected / len(rows))
    floor = max(values.max() * 1e-6, np.finfo("float32").tiny)
    kernel = basis @ (vectors / np.sqrt(np.maximum(values, floor)))
    kernel = scale[:, None] * kernel[:, ::-1][:, :count]
    return kernel.astype("float32"), -(mean @ kernel).astype("float32")


def _moments(rows):
    """Mean of features in their dtype, and standard deviation in float64."""
    # A sum of many float32 numbers in float32 is off by more than rounding.
    mean = rows.mean(axis=0, dtype="float64").astype(rows.dtype)
    apart = rows - mean
    squares = np.einsum("nf,nf->f", apart, apart, dtype="float64")
    return mean, np.sqrt(squares / len(rows))


def _train(model, rows, targets, epochs, verbose):
    """Trains embedding and head on features that were computed once."""
    steps = epochs * -(-len(rows) // _BATCH_SIZE)
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(_LEARNING_RATE, steps)
        ),
        HALOLoss(
            label_smoothing=_LABEL_SMOOTHING,
            radial_weight=_RADIAL_WEIGHT,
            distill=False,
        ),
    )
    model.fit(
        rows, targets, batch_size=_BATCH_SIZE, epochs=epochs, verbose=verbose
    )


def _compare(given, new, labels):
    old, new = np.mean(given == labels), np.mean(new == labels)
    if new < old - _WARN_BELOW:
        warnings.warn(
            f"On the {len(labels)} given samples, which the given model may "
            f"have memorised, it is right in {old:.1%}, the new head in "
            f"{new:.1%}. Compare them on other data; if the head is behind "
            "there, pass more samples or more `epochs`, or other `blocks`.",
            stacklevel=3,
        )
