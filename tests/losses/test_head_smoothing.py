"""One label smoothing for the head and its loss, or an error."""

import gc

import keras
import numpy as np
import pytest
from helpers import float64, packed, to_numpy, value_and_gradients
from keras import ops

import keras_halo
from keras_halo import (
    HALOContrastiveLoss,
    HALODense,
    HALOLoss,
    HALOSimilarity,
)
from keras_halo.losses import halo_loss
from keras_halo.ops import head_smoothing, plain_gradients

X = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
Y = np.arange(6) % 3

HEADS = {
    "reference": lambda **kwargs: HALODense.reference(3, **kwargs),
    "with an embedding": lambda **kwargs: HALODense(
        3, abstain_rate=None, **kwargs
    ),
}
LABELS = {
    "integers": (Y, {}),
    "blocks": (Y, {"block_size": 2}),
    "one-hot": (np.eye(3, dtype="float32")[Y], {}),
    "plain targets": (Y, {"distill": False}),
}
# Both values, in this order.
REFUSED = r"same `label_smoothing`.*=0\.1 of the head, .*=0\.02 of the loss"


def _classifier(head, *after):
    return keras.Sequential([keras.Input((8,)), head, *after])


def _is_finite(loss):
    return np.isfinite(to_numpy(loss)).all()


def _two_towers(bidirectional=False, smoothing=0.1):
    queries, keys = keras.Input((8,)), keras.Input((8,))
    layer = HALOSimilarity(smoothing, bidirectional=bidirectional)
    return keras.Model([queries, keys], layer([queries, keys]))


def test_defaults_agree():
    smoothing = HALOLoss().label_smoothing
    assert HALOContrastiveLoss().label_smoothing == smoothing
    assert HALOSimilarity().label_smoothing == smoothing
    for head in HEADS.values():
        assert head().margin_smoothing == smoothing
        assert _is_finite(HALOLoss()(Y, head()(X)))


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("head", HEADS)
def test_another_label_smoothing_is_refused(head, labels):
    y, options = LABELS[labels]
    scores = HEADS[head]()(X)
    with pytest.raises(ValueError, match=REFUSED):
        HALOLoss(0.02, **options)(y, scores)
    with pytest.raises(ValueError, match=REFUSED):
        halo_loss(y, scores, 0.02, **options)
    assert _is_finite(HALOLoss(0.1, **options)(y, scores))
    # A head of tokens returns what it has reshaped.
    tokens = HEADS[head]()(X.reshape(2, 3, 8))
    with pytest.raises(ValueError, match=REFUSED):
        HALOLoss(0.02, **options)(y.reshape(2, 3, *y.shape[1:]), tokens)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_another_label_smoothing_of_two_towers_is_refused(bidirectional):
    scores = HALOSimilarity(bidirectional=bidirectional)([X, X])
    for loss in (HALOContrastiveLoss(0.02), HALOLoss(0.02)):
        ids = np.arange(6)
        if bidirectional and isinstance(loss, HALOLoss):
            ids = np.stack([ids, ids], axis=1)
        for given in (scores, to_numpy(scores)):
            with pytest.raises(ValueError, match=REFUSED):
                loss(ids, given)
    ids = np.arange(6)
    assert _is_finite(HALOContrastiveLoss()(ids, scores))


def _models():
    yield "classifier", _classifier(HEADS["reference"]()), HALOLoss, X, Y
    ids = np.arange(6)
    yield "towers", _two_towers(), HALOContrastiveLoss, [X, X], ids
    both = _two_towers(bidirectional=True)
    yield "both directions", both, HALOContrastiveLoss, [X, X], ids


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_fit_and_evaluate_refuse_another_label_smoothing(method, run_eagerly):
    for name, model, loss, x, y in _models():
        model.compile("sgd", loss(0.02), run_eagerly=run_eagerly)
        with pytest.raises(ValueError, match=REFUSED):
            getattr(model, method)(x, y, verbose=0)
        assert name


def test_the_same_label_smoothing_trains():
    for smoothing in (0.0, 0.02):
        model = _classifier(HEADS["reference"](label_smoothing=smoothing))
        model.compile("sgd", HALOLoss(smoothing))
        assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"][0])
        towers = _two_towers(smoothing=smoothing)
        towers.compile("sgd", HALOContrastiveLoss(smoothing))
        history = towers.fit([X, X], np.arange(6), verbose=0).history
        assert np.isfinite(history["loss"][0])


def test_the_default_head_trains_with_any_label_smoothing():
    for smoothing in (0.0, 0.3):
        model = _classifier(HALODense(3))
        model.compile("sgd", HALOLoss(smoothing))
        assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"][0])


@pytest.mark.parametrize("labels", LABELS)
def test_arrays_of_another_label_smoothing_are_refused(labels):
    y, options = LABELS[labels]
    scores = _classifier(HEADS["reference"]()).predict(X, verbose=0)
    with pytest.raises(ValueError, match=REFUSED):
        HALOLoss(0.02, **options)(y, scores)
    with pytest.raises(ValueError, match=REFUSED):
        halo_loss(y, scores, 0.02, **options)
    # Rows of several heads: one of them is enough.
    scores[2:] = to_numpy(HALODense(3, embedding_dim=8)(X[2:]))
    with pytest.raises(ValueError, match=REFUSED):
        HALOLoss(0.02, **options)(y, scores)
    assert _is_finite(HALOLoss(0.02, **options)(y[2:], scores[2:]))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("labels", LABELS)
def test_tensors_from_elsewhere_give_nan_and_a_gradient_of_zero(labels, plain):
    y, options = LABELS[labels]
    ours = packed(X, np.eye(3, 8), smoothing=0.1)
    other = packed(X, np.eye(3, 8), smoothing=0.02)
    scores = np.concatenate([ours[:3], other[3:]])
    loss = HALOLoss(0.1, reduction=None, **options)

    def total(scores, weights):
        if plain:
            with plain_gradients():
                losses = loss(y, scores)
        else:
            losses = loss(y, scores)
        return ops.sum(losses * weights)

    # The gradient with respect to the weights is the loss of each sample.
    _, (slopes, losses) = value_and_gradients(
        total, scores, np.ones(6, "float32")
    )
    assert np.isnan(losses[3:]).all() and np.isfinite(losses[:3]).all()
    np.testing.assert_array_equal(slopes[3:], 0.0)
    assert np.all(np.abs(slopes[:3]).max(axis=-1) > 0.0)


def test_behind_another_layer_the_loss_is_nan_and_weights_stay():
    head = HEADS["reference"]()
    model = _classifier(head, keras.layers.Rescaling(1.0))
    model.compile(keras.optimizers.SGD(0.1), HALOLoss(0.02))
    before = model.get_weights()
    assert np.isnan(model.fit(X, Y, verbose=0).history["loss"][0])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    model = _classifier(head, keras.layers.Rescaling(1.0))
    model.compile(keras.optimizers.SGD(0.1), HALOLoss(0.1))
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"][0])


@pytest.mark.parametrize("labels", LABELS)
def test_what_is_packed_changes_no_bit_of_the_loss(labels):
    y, options = LABELS[labels]
    loss = HALOLoss(0.1, **options)

    def total(scores):
        return loss(y, scores)

    # As 0.1.0, and this version at first, packed them.
    silent = packed(X, np.eye(3, 8))
    spoken = packed(X, np.eye(3, 8), smoothing=0.1)
    assert not np.array_equal(silent, spoken)
    expected, (expected_slopes,) = value_and_gradients(total, silent)
    found, (slopes,) = value_and_gradients(total, spoken)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(slopes, expected_slopes)
    np.testing.assert_array_equal(
        keras_halo.ood_score(silent), keras_halo.ood_score(spoken)
    )
    # What does not say so trains with any.
    assert _is_finite(HALOLoss(0.3, **options)(y, silent))
    tensor = ops.convert_to_tensor(silent)
    assert _is_finite(HALOLoss(0.3, **options)(y, tensor))


@pytest.mark.parametrize(
    "policy", ["mixed_float16", "mixed_bfloat16", "bfloat16", "float64"]
)
def test_every_policy_tells_label_smoothings_apart(policy):
    with float64():
        for smoothing in (0.003, 0.1, 1.0 / 3.0):
            head = HALODense.reference(3, smoothing, dtype=policy)
            # The values alone, without what is noted beside the tensor.
            scores = ops.convert_to_tensor(to_numpy(head(X)))
            for dtype in ("float32", "float64"):
                same = HALOLoss(smoothing, dtype=dtype)
                assert _is_finite(same(Y, scores))
                other = HALOLoss(smoothing + 1e-6, dtype=dtype)
                assert np.isnan(to_numpy(other(Y, scores)))


def test_a_head_of_a_gallery_and_a_converted_one_say_theirs():
    similarity = HALOSimilarity(0.02)
    similarity([X, X])
    head = similarity.to_head(X)
    with pytest.raises(ValueError, match=r"=0\.02 of the head, .*=0\.1 of"):
        HALOLoss()(np.arange(6), head(X))
    base = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 8)).astype("float32")
    y = np.arange(90) % 3
    x[np.arange(90), y] += 4.0
    published = keras_halo.convert_head(
        base, x, y, 0.02, abstain_rate=None, verbose=0
    )
    with pytest.raises(ValueError, match=r"=0\.02 of the head, .*=0\.1 of"):
        HALOLoss()(y, published(x))
    assert _is_finite(HALOLoss(0.02)(y, published(x)))
    running = keras_halo.convert_head(base, x, y, verbose=0)
    for smoothing in (0.0, 0.3):
        assert _is_finite(HALOLoss(smoothing)(y, running(x)))


def test_it_is_said_again_after_loading(tmp_path):
    model = _classifier(HEADS["reference"](label_smoothing=0.1))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=REFUSED):
        HALOLoss(0.02)(Y, loaded(X))
    np.testing.assert_array_equal(
        loaded.predict(X, verbose=0), model.predict(X, verbose=0)
    )


def test_notes_go_with_their_tensors():
    gc.collect()
    before = len(head_smoothing._NOTES)
    head = HEADS["reference"]()
    scores = [head(X) for _ in range(3)]
    assert len(head_smoothing._NOTES) == before + 3
    del scores
    gc.collect()
    assert len(head_smoothing._NOTES) == before


def test_a_note_is_of_one_tensor_alone():
    scores = HEADS["reference"]()(X)
    other = ops.convert_to_tensor(packed(X, np.eye(3, 8)))
    # As if it had got the place in memory of one that is gone.
    head_smoothing._NOTES[id(other)] = head_smoothing._NOTES[id(scores)]
    try:
        assert _is_finite(HALOLoss(0.02)(Y, other))
    finally:
        del head_smoothing._NOTES[id(other)]
