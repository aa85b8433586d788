"""HALOLoss: labels of every kind, masks, weights, reductions, extremes."""

import keras
import numpy as np
import pytest
from helpers import jit, naive_softmax, packed, to_numpy, value_and_gradients
from keras import ops

import keras_halo
from keras_halo import HALODense, HALOLoss
from keras_halo.losses import halo_loss
from keras_halo.ops.packing import packed_width
from keras_halo.utils.keras_private import set_mask

K, D = 5, 6
WIDTH = packed_width(K)


def _scores(shape=(8,), num_classes=K, seed=0, dtype="float32", scale=1.0):
    rng = np.random.default_rng(seed)
    return packed(
        scale * rng.normal(size=(*shape, D)),
        rng.normal(size=(num_classes, D)),
        dtype=dtype,
    )


def _labels(shape=(8,), num_classes=K, seed=1):
    return np.random.default_rng(seed).integers(0, num_classes, size=shape)


def _naive(labels, scores, smoothing=0.1, distill=True, radial_weight=1.0):
    """The loss by the book, sample by sample, in float64."""
    losses = []
    flat_scores = scores.reshape(-1, scores.shape[-1]).astype("float64")
    flat_labels = labels.reshape(-1, scores.shape[-1] - 6).astype("float64")
    for label, row in zip(flat_labels, flat_scores, strict=True):
        s, b = row[:-6], row[-6]
        norm, gamma, size = row[-5:-2] / -(2.0**40) - 1.0
        num_classes = len(s)
        q = np.zeros(num_classes)
        for y in range(num_classes):
            one_hot = np.eye(num_classes)[y]
            if not smoothing:
                target = one_hot
            elif distill:
                z = np.minimum(s - gamma * norm, 0.0) / smoothing
                z[y] = 0.0
                target = naive_softmax(z)
            else:
                target = (1 - smoothing) * one_hot + smoothing / num_classes
            q += label[y] * target
        p = naive_softmax(np.append(s, b))[:-1]
        radii = norm - s / gamma
        log = np.where(
            radii > 1e-3,
            np.log(np.maximum(radii, 1e-3)),
            np.log(1e-3) + radii / 1e-3 - 1.0,
        )
        radial = 0.5 * radii - (0.5 - 1.0 / size) * log
        losses.append(-q @ np.log(p) + radial_weight * label @ radial)
    return np.reshape(losses, scores.shape[:-1])


@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("radial_weight", [0.0, 1.0, 2.5])
def test_against_the_book(distill, smoothing, radial_weight):
    scores = _scores()
    labels = np.random.default_rng(2).dirichlet(np.ones(K), size=8)
    loss = HALOLoss(smoothing, distill, radial_weight, reduction=None)
    np.testing.assert_allclose(
        to_numpy(loss(labels, scores)),
        _naive(labels, scores, smoothing, distill, radial_weight),
        rtol=1e-4,
    )


@pytest.mark.parametrize("shape", [(8,), (2, 3), (2, 3, 4)])
def test_integer_column_and_one_hot_labels_are_the_same(shape):
    scores, labels = _scores(shape), _labels(shape)
    one_hot = np.eye(K)[labels]
    loss = HALOLoss(reduction=None)
    expected = to_numpy(loss(labels, scores))
    assert expected.shape == shape
    np.testing.assert_array_equal(
        to_numpy(loss(labels[..., None], scores)), expected
    )
    np.testing.assert_allclose(
        to_numpy(loss(one_hot, scores)), expected, rtol=1e-6
    )
    np.testing.assert_allclose(expected, _naive(one_hot, scores), rtol=1e-4)


@pytest.mark.parametrize(
    "dtype",
    [
        *("int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "float32", "float64"),
    ],
)
def test_labels_of_every_dtype(dtype):
    scores, labels = _scores(), _labels()
    loss = HALOLoss()
    assert float(loss(labels.astype(dtype), scores)) == float(
        loss(labels, scores)
    )


@pytest.mark.parametrize(
    ("dtype", "num_classes"),
    [("uint8", 256), ("uint8", 300), ("int8", 128), ("int8", 600)],
)
def test_labels_need_not_hold_the_number_of_classes(dtype, num_classes):
    scores = ops.convert_to_tensor(_scores(num_classes=num_classes))
    labels = np.array([0, 1, 100, 127, 3, 44, 2, 9])
    for block_size in (None, 100):
        narrow, wide = (
            to_numpy(halo_loss(labels.astype(d), scores, block_size=block_size))
            for d in (dtype, "int32")
        )
        np.testing.assert_array_equal(narrow, wide)
        assert np.isfinite(wide).all()


def test_boolean_labels_of_two_classes():
    scores, labels = _scores(num_classes=2), _labels(num_classes=2)
    loss = HALOLoss()
    assert float(loss(labels.astype(bool), scores)) == float(
        loss(labels, scores)
    )


def test_lists_are_taken():
    scores, labels = _scores(), _labels()
    loss = HALOLoss()
    assert float(loss(labels.tolist(), scores.tolist())) == float(
        loss(labels, scores)
    )


def test_the_mixture_of_soft_labels_is_linear():
    scores = _scores()
    first, second = np.eye(K)[_labels(seed=1)], np.eye(K)[_labels(seed=2)]
    loss = HALOLoss(reduction=None)
    mixed = to_numpy(loss(0.3 * first + 0.7 * second, scores))
    parts = 0.3 * to_numpy(loss(first, scores)) + 0.7 * to_numpy(
        loss(second, scores)
    )
    np.testing.assert_allclose(mixed, parts, rtol=1e-5)


@pytest.mark.parametrize("ignored", [-1, 2, 255, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("column", [False, True])
def test_ignore_class_equals_leaving_the_samples_out(ignored, column):
    scores = _scores((4, 6))
    labels = _labels((4, 6))
    void = np.random.default_rng(3).random((4, 6)) < 0.4
    if ignored == 2:
        void = labels == 2
    labels = np.where(void, ignored, labels)
    given = labels[..., None] if column else labels
    loss = HALOLoss(ignore_class=ignored)
    expected = float(HALOLoss()(labels[~void], scores[~void]))
    assert float(loss(given, scores)) == pytest.approx(expected, rel=1e-6)
    each = HALOLoss(ignore_class=ignored, reduction=None)(given, scores)
    assert np.all(to_numpy(each)[void] == 0.0)


def test_ignoring_everything_gives_zero():
    loss = HALOLoss(ignore_class=-1)
    assert float(loss(np.full(8, -1), _scores())) == 0.0


def test_masked_equals_absent_whatever_the_labels_under_the_mask():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, D)).astype("float32")
    x[rng.random((4, 6)) < 0.4] = 0.0
    mask = np.any(x != 0.0, axis=-1)
    head = HALODense.reference(K)
    scores = head(keras.layers.Masking()(x))
    labels = _labels((4, 6))
    expected = to_numpy(HALOLoss()(labels[mask], head(x[mask])))
    for filler in (0, 3, -1, 77):
        padded = np.where(mask, labels, filler)
        for given in (padded, padded[..., None]):
            loss = to_numpy(HALOLoss()(given, scores))
            assert loss == pytest.approx(expected, rel=1e-5)
    one_hot = np.where(mask[..., None], np.eye(K)[labels], np.nan)
    loss = to_numpy(HALOLoss()(one_hot, scores))
    assert loss == pytest.approx(expected, rel=1e-5)


def test_mask_and_ignore_class_together():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 6, D)).astype("float32")
    x[:, 4:] = 0.0
    head = HALODense.reference(K)
    scores = head(keras.layers.Masking()(x))
    labels = _labels((4, 6))
    labels[:, 0] = -1
    labels[:, 5] = -1
    loss = HALOLoss(ignore_class=-1)
    expected = to_numpy(HALOLoss()(labels[:, 1:4], head(x[:, 1:4])))
    assert to_numpy(loss(labels, scores)) == pytest.approx(expected, rel=1e-5)


def test_sample_weight_of_zero_and_one_selects():
    scores, labels = _scores(), _labels()
    weights = np.array([1, 0, 1, 1, 0, 0, 1, 0], "float32")
    loss = HALOLoss(reduction="mean_with_sample_weight")
    chosen = weights > 0
    assert float(loss(labels, scores, sample_weight=weights)) == pytest.approx(
        float(loss(labels[chosen], scores[chosen])), rel=1e-6
    )


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("shape", [(8,), (8, 1)])
@pytest.mark.parametrize("kind", ["void", "column", "rows", "tokens"])
def test_labels_of_weight_zero_may_be_anything(kind, shape, tensors):
    """255 for void, or -1: NaN times zero would be NaN."""
    scores, labels = to_numpy(_scores()), to_numpy(_labels()).astype("int32")
    weights = np.array([1, 0, 1, 2, 0, 0, 1, 0], "float32")
    loss = HALOLoss(reduction="sum")
    expected = float(loss(labels, scores, sample_weight=weights))
    bad = np.where(weights > 0, labels, [255, -1] * 4)
    if kind == "column":
        bad = bad[:, None]
    elif kind == "rows":
        bad = np.eye(K, dtype="float32")[labels]
        bad[weights == 0] = 7.0
    elif kind == "tokens":
        bad, scores, weights = bad[:, None], scores[:, None], weights[:, None]
        shape = (8, 1)
    given = weights.reshape(shape)
    if tensors:
        bad, scores, given = map(ops.convert_to_tensor, (bad, scores, given))
    assert float(loss(bad, scores, sample_weight=given)) == pytest.approx(
        expected, rel=1e-5
    )


def test_void_labels_of_weight_zero_train():
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    y = np.where(np.arange(40) % 4 == 3, 255, np.arange(40) % 4)
    model = keras.Sequential([keras.Input((4,)), HALODense(3)])
    model.compile("sgd", HALOLoss())
    history = model.fit(
        x, y, sample_weight=(y < 255).astype("float32"), verbose=0
    )
    assert np.isfinite(history.history["loss"][0])
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize(
    "shape, spread",
    [
        ((), (1, 1)),
        ((1,), (1, 1)),
        ((4,), (4, 1)),
        ((4, 1), (4, 1)),
        ((1, 6), (1, 6)),
        ((4, 6), (4, 6)),
        ((4, 6, 1), (4, 6)),
    ],
)
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_sample_weights_are_those_of_samples_or_positions(shape, spread, kind):
    scores, labels = _scores((4, 6)), _labels((4, 6))
    weights = np.random.default_rng(4).random(shape).astype("float32")
    weights_per_step = weights.reshape(spread)
    if kind == "tensor":
        weights = ops.convert_to_tensor(weights)
    each = to_numpy(HALOLoss(reduction=None)(labels, scores))
    assert float(
        HALOLoss()(labels, scores, sample_weight=weights)
    ) == pytest.approx(float(np.mean(each * weights_per_step)), rel=1e-5)


def test_weights_of_samples_are_none_of_as_many_positions():
    # Keras would multiply the last axis by them.
    scores, labels = _scores((4, 4)), _labels((4, 4))
    weights = np.array([1.0, 0.0, 0.0, 2.0], "float32")
    # No class: what does not count may hold anything.
    labels[1:3] = 255
    loss = HALOLoss(reduction=None)
    each = to_numpy(loss(labels[[0, 3]], scores[[0, 3]]))
    weighted = to_numpy(loss(labels, scores, sample_weight=weights))
    np.testing.assert_allclose(
        weighted[[0, 3]], each * weights[[0, 3], None], rtol=1e-5
    )
    assert not weighted[1:3].any()


def test_a_mask_that_fits_no_positions_is_refused():
    scores = ops.convert_to_tensor(_scores((4, 6)))
    set_mask(scores, ops.ones((4, 5), "bool"))
    with pytest.raises(ValueError, match=r"mask of `y_pred`.*\(4, 5\)"):
        HALOLoss()(_labels((4, 6)), scores)


@pytest.mark.parametrize(
    "reduction",
    ["sum_over_batch_size", "mean", "sum", "mean_with_sample_weight"],
)
def test_reductions(reduction):
    scores, labels = _scores(), _labels()
    weights = np.linspace(0.5, 2.0, 8).astype("float32")
    each = to_numpy(HALOLoss(reduction="none")(labels, scores))
    weighted = np.sum(each * weights)
    divisor = {"sum": 1.0, "mean_with_sample_weight": weights.sum()}.get(
        reduction, 8.0
    )
    value = HALOLoss(reduction=reduction)(labels, scores, sample_weight=weights)
    assert float(value) == pytest.approx(weighted / divisor, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["integer", "column", "one_hot"])
def test_class_weight_in_fit(kind):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(12, D)).astype("float32")
    y = rng.integers(0, 3, size=12)
    labels = {"integer": y, "column": y[:, None], "one_hot": np.eye(3)[y]}
    class_weight = {0: 1.0, 1: 3.0, 2: 0.25}
    model = keras.Sequential([keras.layers.Input((D,)), HALODense(3)])
    model.compile(keras.optimizers.SGD(0.0), HALOLoss())
    each = HALOLoss(reduction=None)(y, model.predict(x, verbose=0))
    weights = np.array([class_weight[label] for label in y])
    history = model.fit(
        x,
        labels[kind],
        class_weight=class_weight,
        batch_size=12,
        verbose=0,
    )
    assert history.history["loss"][0] == pytest.approx(
        float(np.mean(to_numpy(each) * weights)), rel=1e-5
    )


def test_eager_and_jitted_agree():
    scores, labels = _scores(), _labels()
    compiled = jit(lambda y, s: HALOLoss(reduction=None)(y, s))
    np.testing.assert_allclose(
        to_numpy(
            compiled(
                ops.convert_to_tensor(labels), ops.convert_to_tensor(scores)
            )
        ),
        to_numpy(HALOLoss(reduction=None)(labels, scores)),
        rtol=1e-5,
    )


EXTREME_EMBEDDINGS = {
    "zeros": np.zeros((3, D)),
    "1e4": np.full((3, D), 1e4),
    "1e6": np.full((3, D), -1e6),
    "saturated": np.full((3, D), 3e38),
    "tiny": np.full((3, D), 1e-30),
    "on a centroid": None,
}


@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize("raw_gamma", [-200.0, 17.0, 1e3])
@pytest.mark.parametrize("name", EXTREME_EMBEDDINGS)
def test_loss_and_gradients_stay_finite(name, raw_gamma, distill):
    head = HALODense.reference(3)
    head.build((None, D))
    head.raw_gamma.assign(raw_gamma)
    centroids = to_numpy(head.centroids)
    x = EXTREME_EMBEDDINGS[name]
    if x is None:
        x = centroids - centroids.mean(axis=0)
    labels = np.array([0, 1, 2])

    def total(x, centroids, raw_gamma):
        # The layer's own `call`, on arrays that a gradient can be taken of.
        scores, _ = head.stateless_call(
            [centroids, raw_gamma], [head.abstain_bias.value], x
        )
        return HALOLoss(distill=distill)(ops.convert_to_tensor(labels), scores)

    value, gradients = value_and_gradients(
        total, x.astype("float32"), centroids, np.float32(raw_gamma)
    )
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_coinciding_centroids_are_finite():
    scores = packed(np.ones((3, D)), np.zeros((K, D)))

    def total(scores):
        return HALOLoss()(ops.convert_to_tensor(np.array([0, 1, 2])), scores)

    value, (gradient,) = value_and_gradients(total, scores)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_an_embedding_on_its_centroid_is_pushed_off_it():
    x = np.full((1, D), 1e-3, "float32")
    c = np.zeros((2, D), "float32")

    def radial_only(x):
        scores = keras_halo.ops.packing.pack(
            keras_halo.ops.geometry.class_logits(
                x, ops.convert_to_tensor(c), 5.0
            ),
            0.0,
            keras_halo.ops.geometry.mean_square(x),
            5.0,
            D,
        )
        return ops.sum(halo_loss(ops.convert_to_tensor([0]), scores))

    _, (gradient,) = value_and_gradients(radial_only, x)
    # Descent moves along minus the gradient: away from the centroid.
    assert np.all(gradient < 0.0)


@pytest.mark.parametrize("bad", [-1, K, 1000])
def test_numpy_labels_out_of_range_are_refused(bad):
    labels = _labels()
    labels[3] = bad
    with pytest.raises(ValueError, match=rf"in \[0, {K}\).*1 of 8.*{bad}"):
        HALOLoss()(labels, _scores())


@pytest.mark.parametrize("bad", [-1, K, 1000])
def test_tensor_labels_out_of_range_give_nan_and_harm_no_gradient(bad):
    scores, labels = _scores(), _labels()
    labels[3] = bad
    given = ops.convert_to_tensor(labels)
    each = to_numpy(
        HALOLoss(reduction=None)(given, ops.convert_to_tensor(scores))
    )
    assert np.isnan(each[3])
    assert np.all(np.isfinite(np.delete(each, 3)))
    _, (gradient,) = value_and_gradients(
        lambda s: HALOLoss(reduction="sum")(given, s), scores
    )
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[3] == 0.0)


def test_training_on_labels_out_of_range_is_loud():
    x = np.random.default_rng(0).normal(size=(8, D)).astype("float32")
    model = keras.Sequential([keras.layers.Input((D,)), HALODense(3)])
    model.compile("sgd", HALOLoss())
    history = model.fit(x, np.arange(8), batch_size=8, verbose=0)
    assert np.isnan(history.history["loss"][0])


@pytest.mark.parametrize("labels", [np.arange(8) % 4, np.eye(4)[[0, 1] * 4]])
def test_training_without_the_head_is_loud(labels):
    x = np.random.default_rng(0).normal(size=(8, D)).astype("float32")
    model = keras.Sequential([keras.layers.Input((D,)), keras.layers.Dense(10)])
    model.compile("sgd", HALOLoss())
    history = model.fit(x, labels, batch_size=8, verbose=0)
    assert np.isnan(history.history["loss"][0])


def test_numpy_scores_that_are_not_packed_are_refused():
    logits = np.random.default_rng(0).normal(size=(8, 10)).astype("float32")
    with pytest.raises(ValueError, match="last layer.*must be.*HALODense"):
        HALOLoss()(_labels(), logits)


@pytest.mark.parametrize(
    ("labels", "scores"),
    [
        ((8, 3), (8, WIDTH)),  # one-hot of the wrong width
        ((8, WIDTH), (8, WIDTH)),  # one-hot as wide as the scores
        ((8, K), (8, K)),  # Dense in the place of HALODense
        ((7,), (8, WIDTH)),
        ((8, 2), (8, 3, WIDTH)),
        ((8, 3, 4, 1), (8, 3, WIDTH)),
        ((), (8, WIDTH)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(labels, scores):
    with pytest.raises(ValueError, match="HALODense"):
        HALOLoss()(ops.zeros(labels), ops.zeros(scores))


@pytest.mark.parametrize("ignored", [-(2**31) - 1, 2**31, 2**63, 10**30])
def test_an_ignored_class_that_int32_cannot_hold_is_refused(ignored):
    for make in (
        HALOLoss,
        lambda **kwargs: halo_loss(_labels(), _scores(), **kwargs),
        keras_halo.metrics.BestClassAccuracy,
        lambda **kwargs: keras_halo.metrics.ProbabilityMetric(
            keras.metrics.SparseCategoricalCrossentropy(), **kwargs
        ),
    ):
        with pytest.raises(ValueError, match="int32 holds.*Received: ignore_c"):
            make(ignore_class=ignored)


@pytest.mark.parametrize("kind", ["integers", "floats", "one-hot"])
@pytest.mark.parametrize("loss", [HALOLoss(), halo_loss])
def test_scores_in_the_place_of_labels_are_told(kind, loss):
    labels = {
        "integers": _labels(),
        "floats": _labels().astype("float32"),
        "one-hot": np.eye(K, dtype="float32")[_labels()],
    }[kind]
    scores = to_numpy(_scores())
    for convert in (np.asarray, ops.convert_to_tensor):
        with pytest.raises(ValueError, match="Labels come first"):
            loss(convert(scores), convert(labels))


def test_ignore_class_with_one_hot_labels_is_refused():
    with pytest.raises(
        ValueError, match="needs integer labels.*ignore_class=1"
    ):
        HALOLoss(ignore_class=1)(np.eye(K)[_labels()], _scores())


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2.0, float("nan")])
def test_label_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"in \[0, 1\).*Received"):
        HALOLoss(label_smoothing=smoothing)


@pytest.mark.parametrize("weight", [-1e-9, -1.0, float("nan")])
def test_negative_radial_weight_is_refused(weight):
    with pytest.raises(ValueError, match="non-negative.*Received"):
        HALOLoss(radial_weight=weight)


@pytest.mark.any_backend
@pytest.mark.parametrize("loss", [HALOLoss, keras_halo.HALOContrastiveLoss])
def test_arguments_of_other_losses_are_explained(loss):
    with pytest.raises(ValueError, match=f"`{loss.__name__}`.*are logits"):
        loss(from_logits=True)
    with pytest.raises(ValueError, match="last axis.*Received: axis=1"):
        loss(axis=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'smooth'"):
        loss(smooth=0.1)


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction"):
        HALOLoss(reduction="median")


def test_serialization_keeps_every_argument():
    loss = HALOLoss(
        label_smoothing=0.02,
        distill=False,
        radial_weight=0.5,
        ignore_class=255,
        block_size=4096,
        reduction="sum",
        name="mine",
        dtype="float64",
    )
    revived = keras.losses.deserialize(keras.losses.serialize(loss))
    assert isinstance(revived, HALOLoss)
    assert revived.get_config() == loss.get_config()
    assert revived.get_config() == {
        "name": "mine",
        "reduction": "sum",
        "label_smoothing": 0.02,
        "distill": False,
        "radial_weight": 0.5,
        "ignore_class": 255,
        "block_size": 4096,
        "dtype": "float64",
    }


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("mixed_float16", "float32"),
        ("mixed_bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_never_below_float32(policy, dtype):
    assert HALOLoss(dtype=policy).dtype == dtype
    keras.config.set_dtype_policy(policy)
    assert HALOLoss().dtype == dtype


FRACTIONAL = [
    np.array([[0.1], [0.9]], "float32"),
    np.array([0.0, 1.7], "float32"),
]


@pytest.mark.parametrize("y_true", FRACTIONAL)
def test_fractional_labels_are_no_classes(y_true):
    scores = keras_halo.HALODense(2)(np.eye(2, 3, dtype="float32"))
    for loss in (HALOLoss(reduction=None), HALOLoss(block_size=1)):
        with pytest.raises(ValueError, match=r"integers in \[0, 2\)"):
            loss(y_true, scores)
    losses = to_numpy(
        HALOLoss(reduction=None)(ops.convert_to_tensor(y_true), scores)
    )
    integral = y_true.ravel() == np.floor(y_true.ravel())
    np.testing.assert_array_equal(np.isfinite(losses), integral)


@pytest.mark.parametrize(
    "row", [[1.0, 1.0, 0.0], [0.5, 0.2, 0.0], [1.5, -0.5, 0.0]]
)
def test_rows_that_are_no_distributions_are_refused_or_nan(row):
    scores = keras_halo.HALODense(3)(np.eye(2, 3, dtype="float32"))
    y_true = np.array([row, [0.0, 0.4, 0.6]], "float32")
    with pytest.raises(ValueError, match="1 of 2 rows that are not"):
        HALOLoss()(y_true, scores)
    losses = to_numpy(
        HALOLoss(reduction=None)(ops.convert_to_tensor(y_true), scores)
    )
    assert np.isnan(losses).tolist() == [True, False]


def test_a_row_of_zeros_has_no_part_and_16_bits_are_near_enough():
    scores = keras_halo.HALODense(3)(np.eye(2, 3, dtype="float32"))
    y_true = np.array([[0.0, 0.0, 0.0], [0.333, 0.333, 0.333]], "float16")
    losses = to_numpy(HALOLoss(reduction=None)(y_true, scores))
    assert losses[0] == 0.0
    assert np.isfinite(losses[1])


def test_labels_that_are_names_are_refused_with_what_to_do():
    scores = keras_halo.HALODense(3)(np.eye(2, 3, dtype="float32"))
    with pytest.raises(ValueError, match="Encode them"):
        HALOLoss()(np.array(["cat", "dog"]), scores)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_scores_in_16_bits_are_refused_everywhere(dtype):
    scores = keras_halo.HALODense(3)(np.eye(2, 3, dtype="float32"))
    cast = ops.cast(scores, dtype)
    readers = [
        lambda: HALOLoss()(np.array([0, 1]), cast),
        lambda: keras_halo.ood_score(cast),
        lambda: keras_halo.metrics.AbstentionRate()(None, cast),
        lambda: keras_halo.HALOSoftmax()(cast),
        lambda: keras_halo.layers.Decision()(cast),
        lambda: keras_halo.decode_predictions(ops.convert_to_numpy(cast)),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=f"in {dtype}, which cannot hold"):
            read()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_layer_after_the_head_that_casts_is_named(policy):
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential(
        [keras.Input((4,)), HALODense(3), keras.layers.Identity()]
    )
    model.compile("sgd", HALOLoss())
    x = np.zeros((4, 4), "float32")
    with pytest.raises(Exception, match="A layer after the head casts"):
        model.fit(x, np.zeros(4, int), verbose=0)
    kept = keras.Sequential(
        [
            keras.Input((4,)),
            HALODense(3),
            keras.layers.Identity(dtype="float32"),
        ]
    )
    kept.compile("sgd", HALOLoss())
    history = kept.fit(x, np.zeros(4, int), verbose=0)
    assert np.isfinite(history.history["loss"][0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_scores_that_were_in_16_bits_are_known_again(dtype):
    """Whatever they are cast to afterwards: their geometry is rounded."""
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    scores = ops.convert_to_tensor(HALODense(3)(x))
    cast_back = ops.cast(ops.cast(scores, dtype), "float32")
    y = np.array([0, 1, 2, 0, 1, 2])
    assert np.isfinite(to_numpy(HALOLoss()(y, scores)))
    assert np.isnan(to_numpy(HALOLoss()(ops.convert_to_tensor(y), cast_back)))
    if dtype == "bfloat16":
        with pytest.raises(ValueError, match="rounded to 16 bits"):
            keras_halo.decode_predictions(to_numpy(cast_back))
    else:
        with pytest.warns(UserWarning, match="infinite values"):
            found = keras_halo.decode_predictions(to_numpy(cast_back))
        assert found.abstained.all()
