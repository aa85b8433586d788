"""The report holds what can be computed by hand from `model.predict`."""

import dataclasses
import json
import pickle
import re

import keras
import numpy as np
import pytest
from helpers import naive_softmax, packed

import keras_halo
from keras_halo.ops.packing import packed_width
from keras_halo.workflows import OODReport, evaluate_ood

pytest.importorskip("sklearn", reason="needs scikit-learn")

pytestmark = pytest.mark.slow

NUM_CLASSES, DIM, BIAS = 3, 6, 0.2
CENTROIDS = 1.2 * np.eye(NUM_CLASSES, DIM)


def make_data():
    rng = np.random.default_rng(7)
    y = rng.integers(0, NUM_CLASSES, 192)
    centred = CENTROIDS - CENTROIDS.mean(axis=0)
    x = 1.3 * centred[y] + 0.6 * rng.normal(size=(192, DIM))
    unknown = {
        "near": 0.7 * rng.normal(size=(96, DIM)),
        "far": 5.0 * rng.normal(size=(32, DIM)),
    }
    return (
        x.astype("float32"),
        y,
        {name: u.astype("float32") for name, u in unknown.items()},
    )


X, Y, UNKNOWN = make_data()


def head(gamma=4.0):
    layer = keras_halo.HALODense.reference(NUM_CLASSES)
    layer.build((None, DIM))
    layer.centroids.assign(CENTROIDS)
    layer.assign_temperature(gamma)
    layer.abstain_bias.assign(BIAS)
    return layer


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((DIM,))
    return keras.Model(inputs, head()(inputs))


def by_hand_auroc(known, unknown):
    higher = (unknown[:, None] > known[None, :]).mean()
    return higher + 0.5 * (unknown[:, None] == known[None, :]).mean()


def by_hand_fpr95(positive, negative):
    """Share of negatives at or above the threshold of 95 % of positives."""
    for threshold in sorted(positive, reverse=True):
        if (positive >= threshold).mean() >= 0.95:
            return (negative >= threshold).mean()


def by_hand_ap(positive, negative):
    total, recall = 0.0, 0.0
    for threshold in sorted(set(positive), reverse=True):
        hits, false = (
            (positive >= threshold).sum(),
            (negative >= threshold).sum(),
        )
        total += (hits / len(positive) - recall) * hits / (hits + false)
        recall = hits / len(positive)
    return total


def by_hand_ece(correct, confidence, num_bins):
    index = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    return sum(
        abs(correct[index == b].sum() - confidence[index == b].sum())
        for b in range(num_bins)
    ) / len(correct)


def test_report_equals_numbers_computed_by_hand(model):
    report = evaluate_ood(model, (X, Y), UNKNOWN, verbose=0)
    scores = model.predict(X, verbose=0)
    # The same by a second road: packed scores written out in NumPy.
    expected = packed(X, CENTROIDS, bias=BIAS, smoothing=0.1)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    p = naive_softmax(scores[:, : NUM_CLASSES + 1].astype("float64"))
    answer, best = p.argmax(axis=-1), p[:, :-1].argmax(axis=-1)
    answered = answer < NUM_CLASSES
    known = report.known
    assert 0.02 < known.abstention_rate < 0.9 and known.accuracy_forced < 1
    assert known.count == 192
    assert known.accuracy == pytest.approx((answer == Y).mean())
    assert known.accuracy_forced == pytest.approx((best == Y).mean())
    assert known.accuracy_answered == pytest.approx(
        (answer == Y)[answered].mean()
    )
    assert known.abstention_rate == pytest.approx(1 - answered.mean())
    renormalized = p[:, :-1] / p[:, :-1].sum(axis=-1, keepdims=True)
    rows = np.arange(192)
    one_hot = np.eye(NUM_CLASSES)[Y]
    for name, q in (
        ("renormalized", renormalized),
        ("with_abstain", p[:, :-1]),
    ):
        values = {
            "nll": -np.log(q[rows, Y]).mean(),
            "brier": ((q - one_hot) ** 2).sum(axis=-1).mean(),
            "ece": by_hand_ece(best == Y, q.max(axis=-1), 15),
        }
        for key, value in values.items():
            found = getattr(known, f"{key}_{name}")
            assert found == pytest.approx(value, rel=1e-4), (key, name)
    ood = keras_halo.ops.ood_scores.ood_score(scores)
    np.testing.assert_allclose(known.scores, ood, rtol=1e-4, atol=1e-4)
    errors = (best != Y)[np.argsort(known.scores)]
    risk = np.cumsum(errors) / np.arange(1, 193)
    assert known.aurc == pytest.approx(risk.mean())
    joint = np.concatenate([[0], np.cumsum(errors) / 192])
    assert known.augrc == pytest.approx((joint[1:] + joint[:-1]).mean() / 2)

    for name, x in UNKNOWN.items():
        scores = model.predict(x, verbose=0)
        other = keras_halo.ops.ood_scores.ood_score(scores)
        result = report[name]
        assert result.count == len(x)
        assert result.auroc == pytest.approx(by_hand_auroc(ood, other))
        assert result.aupr_unknown_positive == pytest.approx(
            by_hand_ap(other, ood)
        )
        assert result.aupr_known_positive == pytest.approx(
            by_hand_ap(-ood, -other)
        )
        assert result.fpr95_unknown_positive == by_hand_fpr95(other, ood)
        assert result.fpr95_known_positive == by_hand_fpr95(-ood, -other)
        assert result.abstention_rate == pytest.approx(
            (scores.argmax(axis=-1) == NUM_CLASSES).mean()
        )
    assert report.mean.auroc == pytest.approx(
        (report["near"].auroc + report["far"].auroc) / 2
    )
    assert report.mean.count == 128 and len(report) == 2


class Batches(keras.utils.PyDataset):
    """Shuffles itself before and after every pass, and counts its reads."""

    def __init__(self, *arrays, batch_size=32, **kwargs):
        super().__init__(**kwargs)
        self.arrays, self.batch_size, self.reads = arrays, batch_size, 0
        self.rng = np.random.default_rng(0)
        self.passes = []

    def __len__(self):
        return -(-len(self.arrays[0]) // self.batch_size)

    def __getitem__(self, index):
        self.reads += 1
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return tuple(array[rows] for array in self.arrays)

    def on_epoch_begin(self):
        order = self.rng.permutation(len(self.arrays[0]))
        self.arrays = tuple(array[order] for array in self.arrays)
        self.passes.append("begin")

    def on_epoch_end(self):
        self.on_epoch_begin()
        self.passes[-1] = "end"


def as_generator(*arrays):
    rows = range(0, len(arrays[0]), 32)
    return (tuple(a[i : i + 32] for a in arrays) for i in rows)


def as_tf_dataset(*arrays):
    tf = pytest.importorskip("tensorflow", reason="needs TensorFlow")
    dataset = tf.data.Dataset.from_tensor_slices(arrays)
    return dataset.shuffle(300).batch(32).prefetch(2)


def as_data_loader(*arrays):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    dataset = torch.utils.data.TensorDataset(*map(torch.as_tensor, arrays))
    return torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)


def as_tensors(*arrays):
    tensors = tuple(map(keras.ops.convert_to_tensor, arrays))
    return tensors if len(tensors) > 1 else tensors[0]


READERS = {
    "pydataset": Batches,
    "workers": lambda *a: Batches(*a, workers=2),
    "generator": as_generator,
    "list": lambda *a: list(as_generator(*a)),
    "list of lists": lambda *a: [list(batch) for batch in as_generator(*a)],
    "tensors": as_tensors,
    "tf.data": as_tf_dataset,
    "DataLoader": as_data_loader,
}


def assert_same(one, other):
    flat = [keras.tree.flatten(report.to_dict()) for report in (one, other)]
    assert len(flat[0]) == len(flat[1]) > 30
    for a, b in zip(*flat, strict=True):
        assert a == b or a == pytest.approx(b, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def reference(model):
    return evaluate_ood(model, (X, Y), UNKNOWN, verbose=0)


@pytest.mark.parametrize("reader", READERS)
def test_every_kind_of_dataset_gives_the_same_report(reader, model, reference):
    read = READERS[reader]
    report = evaluate_ood(
        model,
        read(X, Y),
        {name: read(x) for name, x in UNKNOWN.items()},
        verbose=0,
    )
    assert_same(report, reference)


def test_a_dataset_is_read_once_from_begin_to_end(model):
    known, unknown = Batches(X, Y), Batches(UNKNOWN["near"])
    evaluate_ood(model, known, {"near": unknown}, verbose=0)
    for dataset in (known, unknown):
        assert dataset.passes == ["begin", "end"]
        assert dataset.reads == len(dataset)


def test_labels_may_be_a_list(model, reference):
    assert_same(evaluate_ood(model, (X, Y.tolist()), UNKNOWN), reference)


def test_labels_of_unknown_data_are_not_looked_at(model, reference):
    unknown = {n: Batches(x, np.full(len(x), -9)) for n, x in UNKNOWN.items()}
    assert_same(evaluate_ood(model, (X, Y), unknown, verbose=0), reference)
    unknown = {n: (x, np.full(len(x), -9)) for n, x in UNKNOWN.items()}
    assert_same(evaluate_ood(model, (X, Y), unknown, verbose=0), reference)


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_batch_size_changes_nothing(batch_size, model, reference):
    small = {name: x[:30] for name, x in UNKNOWN.items()}
    arguments = {"unknown": small, "verbose": 0, "num_bins": 5}
    expected = evaluate_ood(model, (X[:40], Y[:40]), **arguments)
    report = evaluate_ood(
        model, (X[:40], Y[:40]), **arguments, batch_size=batch_size
    )
    assert_same(report, expected)


@pytest.mark.parametrize(
    "labels", [Y[:, None], np.eye(NUM_CLASSES)[Y], Y.astype("uint8")]
)
def test_every_form_of_labels_gives_the_same_report(labels, model, reference):
    report = evaluate_ood(model, (X, labels), UNKNOWN, verbose=0)
    assert_same(report, reference)


def test_soft_labels_give_shares(model):
    soft = 0.8 * np.eye(NUM_CLASSES)[Y] + 0.2 / NUM_CLASSES
    report = evaluate_ood(model, (X, soft), UNKNOWN, verbose=0)
    hard = evaluate_ood(model, (X, Y), UNKNOWN, verbose=0)
    assert report.known.accuracy_forced == pytest.approx(
        0.8 * hard.known.accuracy_forced + 0.2 / NUM_CLASSES
    )


def test_positions_are_samples(model, reference):
    tokens = keras.Input((None, DIM))
    token_model = keras.Model(tokens, head()(tokens))
    known = (X.reshape(24, 8, DIM), Y.reshape(24, 8))
    unknown = {
        "near": UNKNOWN["near"].reshape(12, 8, DIM),
        "far": UNKNOWN["far"].reshape(4, 8, DIM),
    }
    report = evaluate_ood(token_model, known, unknown, verbose=0)
    assert_same(report, reference)


def test_padding_is_left_out(model, reference):
    padded_x = np.concatenate([X, np.full((32, DIM), 9.0, "float32")])
    padded_y = np.concatenate([Y, np.full(32, -1)])
    weight = np.concatenate([np.full(192, 0.5), np.zeros(32)])
    for known, ignore_class in (
        ((padded_x, padded_y), -1),
        ((padded_x, padded_y, weight), None),
        (Batches(padded_x, padded_y, weight), None),
    ):
        report = evaluate_ood(
            model, known, UNKNOWN, verbose=0, ignore_class=ignore_class
        )
        assert_same(report, reference)


def test_a_class_to_ignore_needs_integer_labels(model):
    with pytest.raises(ValueError, match="`ignore_class` needs integer labels"):
        evaluate_ood(
            model, (X, np.eye(3)[Y]), UNKNOWN, verbose=0, ignore_class=1
        )


def test_weights_of_whole_sequences_and_of_tokens():
    tokens = keras.Input((8, DIM))
    token_model = keras.Model(tokens, head()(tokens))
    x, y = X.reshape(24, 8, DIM), Y.reshape(24, 8)
    unknown = {"near": UNKNOWN["near"].reshape(12, 8, DIM)}
    keep = np.arange(24) % 2
    expected = evaluate_ood(
        token_model, (x[keep == 1], y[keep == 1]), unknown, verbose=0
    )
    for weight in (keep, np.repeat(keep[:, None], 8, axis=1)):
        report = evaluate_ood(token_model, (x, y, weight), unknown, verbose=0)
        assert_same(report, expected)


def test_several_inputs_are_a_list_or_a_dictionary(reference):
    inputs = {name: keras.Input((3,), name=name) for name in ("a", "b")}
    x = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    outputs = head()(x)

    def split(x):
        return {"a": x[:, :3], "b": x[:, 3:]}

    by_name = keras.Model(inputs, outputs)
    report = evaluate_ood(
        by_name,
        (split(X), Y),
        {name: split(x) for name, x in UNKNOWN.items()},
        verbose=0,
    )
    assert_same(report, reference)
    by_place = keras.Model(list(inputs.values()), outputs)
    report = evaluate_ood(
        by_place,
        ([X[:, :3], X[:, 3:]], Y),
        {n: [x[:, :3], x[:, 3:]] for n, x in UNKNOWN.items()},
        verbose=0,
    )
    assert_same(report, reference)


def test_method_by_name_and_by_function(model, reference):
    named = evaluate_ood(model, (X, Y), UNKNOWN, method="nearest", verbose=0)
    assert named.method == "nearest"
    assert named["near"].auroc != reference["near"].auroc

    def my_score(scores):
        return keras_halo.ops.ood_scores.ood_score(scores, "nearest")

    own = evaluate_ood(model, (X, Y), UNKNOWN, method=my_score, verbose=0)
    assert own.method == "my_score"
    assert dataclasses.replace(own, method="nearest").to_dict() == (
        named.to_dict()
    )


@pytest.fixture(scope="module")
def fitted_model():
    inputs = keras.Input((DIM,))
    outputs = {
        "scores": head()(inputs),
        "ood": keras.layers.Lambda(
            lambda x: keras.ops.sum(keras.ops.abs(x), axis=-1),
            output_shape=(),
        )(inputs),
    }
    return keras.Model(inputs, outputs)


def test_fitted_score_is_the_models_own(fitted_model, reference):
    report = evaluate_ood(
        fitted_model, (X, Y), UNKNOWN, method="fitted", verbose=0
    )
    expected = by_hand_auroc(
        np.abs(X).sum(axis=-1), np.abs(UNKNOWN["near"]).sum(axis=-1)
    )
    assert report["near"].auroc == pytest.approx(expected, abs=1e-4)
    assert report.known.accuracy == reference.known.accuracy
    joint = evaluate_ood(fitted_model, (X, Y), UNKNOWN, verbose=0)
    assert_same(joint, reference)


def test_all_abstained_has_a_stated_nan(model):
    origin = (np.zeros((20, DIM), "float32"), np.arange(20) % NUM_CLASSES)
    report = evaluate_ood(model, origin, UNKNOWN, verbose=0)
    assert report.known.abstention_rate == 1.0
    assert report.known.accuracy == 0.0
    assert np.isnan(report.known.accuracy_answered)
    assert report.to_dict()["known"]["accuracy_answered"] is None
    assert "n/a" in str(report) and "n/a" in report.to_markdown()


def test_all_wrong_is_defined(model):
    wrong = (X[:, [1, 2, 0, 3, 4, 5]] * 3, Y)
    report = evaluate_ood(model, wrong, {"same": wrong[0]}, verbose=0)
    assert report.known.accuracy < 0.1
    assert report["same"].auroc == pytest.approx(0.5)


def test_report_cannot_be_changed_and_survives_pickling(reference):
    for record in (reference, reference.known, reference["near"]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.method = 1
    with pytest.raises(ValueError, match="read-only"):
        reference.known.scores[0] = 0.0
    again = pickle.loads(pickle.dumps(reference))
    assert isinstance(again, OODReport)
    assert again.to_dict() == reference.to_dict()
    np.testing.assert_array_equal(again["far"].scores, reference["far"].scores)
    with pytest.raises(KeyError, match="mist"):
        reference["mist"]


def test_dictionary_is_plain_json(reference):
    values = json.loads(json.dumps(reference.to_dict(), allow_nan=False))
    assert values["unknown"]["near"]["auroc"] == reference["near"].auroc
    assert values["known"]["count"] == 192
    assert values["mean"]["auroc"] == reference.mean.auroc


def test_table_is_aligned_and_states_its_conventions(reference):
    lines = str(reference).splitlines()
    assert max(map(len, lines)) <= 80
    start = lines.index("") + 1
    header, rule = lines[start], lines[start + 2]
    rows = [
        line for line in lines if line.startswith(("near ", "far ", "mean "))
    ]
    assert len(rows) == 3 and set(rule) == {"-"}
    assert {len(line) for line in (header, *rows)} == {len(rule)}
    assert rows[0].split() == [
        "near",
        "96",
        *(
            f"{100 * value:.1f}"
            for value in (
                reference["near"].auroc,
                reference["near"].aupr_unknown_positive,
                reference["near"].aupr_known_positive,
                reference["near"].fpr95_known_positive,
                reference["near"].fpr95_unknown_positive,
                reference["near"].abstention_rate,
            )
        ),
    ]
    text = str(reference)
    for word in ("OpenOOD", "ODIN", "average precision", "with abstain"):
        assert word in text


def test_markdown_is_two_tables(model):
    report = evaluate_ood(model, (X, Y), {"a|b": UNKNOWN["near"]}, verbose=0)
    lines = report.to_markdown().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    first = [line for line in tables if line.count("|") > 3]
    assert len(first) == 4
    assert r"a\|b" in first[2]
    assert {line.replace(r"\|", "").count("|") for line in first} == {9}
    assert f"| {100 * report.mean.auroc:.1f} |" in first[3]
    assert "OpenOOD" in lines[-1]


def test_plot_has_axes_for_every_set(reference):
    plt = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    figure = reference.plot()
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:2] == [
        f"{r.name}: AUROC {100 * r.auroc:.1f} %" for r in reference.unknown
    ]
    assert "renormalized" in titles[2] and len(titles) == 4
    ece = 100 * reference.known.ece_renormalized
    assert f"ECE {ece:.2g} %" in titles[2]
    threshold = figure.axes[0].get_lines()[0].get_xdata()[0]
    accepted = (reference.known.scores <= threshold).mean()
    assert 0.95 <= accepted < 0.96
    unknown_accepted = (reference["near"].scores <= threshold).mean()
    assert unknown_accepted == reference["near"].fpr95_known_positive
    plt.close("all")


def test_silence_and_one_line_for_each_set(model, capsys):
    evaluate_ood(model, (X, Y), UNKNOWN, verbose=0)
    assert capsys.readouterr().out == ""
    for verbose in (1, 2, "auto"):
        evaluate_ood(model, (X, Y), UNKNOWN, verbose=verbose)
        out = capsys.readouterr().out
        assert [line.split(" -")[0] for line in out.splitlines()] == [
            "1/3 known: 192 samples",
            "2/3 near: 96 samples",
            "3/3 far: 32 samples",
        ]
        assert out.isprintable() or set("\b\r\x1b").isdisjoint(out)


def test_a_bar_on_a_terminal(model, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    known = as_generator(X, Y)
    evaluate_ood(model, known, {"near": UNKNOWN["near"]})
    out = capsys.readouterr().out
    assert "1/2 known\n" in out and "2/2 near\n" in out
    assert "3/3" in out and "\r" in out
    assert out.endswith("\n")


def refused():
    x, y, unknown = X[:30], Y[:30], {"near": X[:5]}
    nothing = np.zeros((0, DIM), "float32")
    nan = np.full((5, DIM), np.nan, "float32")
    known = (x, y)
    return {
        "no unknown set": ((known, {}), "at least one entry"),
        "unknown is an array": ((known, x), "dictionary of name"),
        "name is no string": ((known, {3: x}), "names of unknown sets"),
        "name is empty": ((known, {" ": x}), "names of unknown sets"),
        "empty unknown": (
            (known, {"a": nothing}),
            r"`unknown\['a'\]` must hold",
        ),
        "empty known": (
            ((nothing, np.zeros(0, int)), unknown),
            "`known` must hold",
        ),
        "no labels": ((x, unknown), "no labels"),
        "no labels in a dataset": ((Batches(x), unknown), "no labels"),
        "labels of another shape": (
            ((x, np.zeros((30, 2))), unknown),
            r"shape \(30,\)",
        ),
        "labels of another length": (
            ((x, y[:7]), unknown),
            "one label for every input. Received: 30 inputs and 7",
        ),
        "labels out of range": (((x, y + 1), unknown), "Labels must be"),
        "NaN inputs": (((x, y), {"a": nan}), r"unknown\['a'\].*finite"),
        "unknown data type": (((x, y), {"a": "mnist"}), "Unrecognized"),
        "weights": (
            ((x, y, np.ones((30, 2))), unknown),
            "sample weights|sample_weight",
        ),
        "everything ignored": (
            ((x, y, np.zeros(30)), unknown),
            "`known` must hold",
        ),
        "infinite": ((Endless(), unknown), "infinite"),
    }


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        raise AssertionError("read although infinite")


@pytest.mark.parametrize("case", refused())
def test_bad_data_are_refused(case, model):
    arguments, message = refused()[case]
    with pytest.raises(ValueError, match=message):
        evaluate_ood(model, *arguments, verbose=0)


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"method": "mahalanobis"}, "'abstain'.*'fitted'"),
        ({"method": None}, "'abstain'.*'fitted'"),
        ({"verbose": 3}, "verbose"),
        ({"num_bins": 0}, "num_bins"),
        ({"unknown": {"a": Endless()}}, "infinite"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(
    argument, message, model
):
    known = Batches(X, Y)
    arguments = {"known": known, "unknown": UNKNOWN, "verbose": 0, **argument}
    with pytest.raises(ValueError, match=message):
        evaluate_ood(model, **arguments)
    assert known.reads == 0


def test_an_infinite_tf_dataset_is_refused(model):
    with pytest.raises(ValueError, match="infinite"):
        evaluate_ood(model, as_tf_dataset(X, Y).repeat(), UNKNOWN, verbose=0)


@pytest.mark.parametrize(
    "method, message",
    [
        (lambda scores: scores, "192 finite numbers"),
        (lambda scores: scores[:, 0] * np.nan, "lambda.*known.* 192 of 192"),
        ("fitted", "dictionary with the entries"),
    ],
)
def test_bad_scores_are_refused(method, message, model):
    with pytest.raises(ValueError, match=message):
        evaluate_ood(model, (X, Y), UNKNOWN, method=method, verbose=0)


def test_models_without_packed_scores_are_refused():
    inputs = keras.Input((DIM,))
    dense = keras.layers.Dense(packed_width(NUM_CLASSES))(inputs)
    with pytest.raises(ValueError, match="HALODense"):
        evaluate_ood(keras.Model(inputs, dense), (X, Y), UNKNOWN, verbose=0)
    two = keras.Model(inputs, [head()(inputs), dense])
    with pytest.raises(ValueError, match="select an output"):
        evaluate_ood(two, (X, Y), UNKNOWN, verbose=0)


def test_fewer_samples_than_bins_get_fewer_bins(model):
    report = evaluate_ood(model, (X[:9], Y[:9]), UNKNOWN, verbose=0)
    assert report.num_bins == 9
    assert np.isfinite(report.known.ece_renormalized)


def abstaining(model, nats):
    """The model with abstaining further ahead."""
    columns = np.zeros(packed_width(NUM_CLASSES), "float32")
    columns[NUM_CLASSES] = nats
    ahead = keras.layers.Lambda(lambda scores: keras.ops.add(scores, columns))
    return keras.Model(model.input, ahead(model.output))


@pytest.mark.parametrize("nats", [30.0, 100.0, 300.0, 1000.0])
def test_nothing_underflows_where_abstaining_is_far_ahead(nats, model):
    packed = model.predict(X, verbose=0)
    logits = packed[:, : NUM_CLASSES + 1].astype("float64")
    predicted = logits[:, :NUM_CLASSES].argmax(axis=-1)
    far = abstaining(model, nats)
    report = evaluate_ood(far, (X, predicted), UNKNOWN, verbose=0)
    plain = evaluate_ood(model, (X, predicted), UNKNOWN, verbose=0)
    assert report.known.accuracy_forced == 1.0
    best = report.known.probabilities.argmax(axis=-1)
    np.testing.assert_array_equal(best, predicted)
    # All answers are right, and none is believed in.
    assert report.known.ece_with_abstain == pytest.approx(1.0, abs=1e-6)
    # Beside that of abstaining the mass of all classes is nothing.
    expected = np.mean(logits[:, -1] + nats - logits[:, :-1].max(axis=-1))
    for labels in (predicted, np.eye(NUM_CLASSES)[predicted]):
        known = evaluate_ood(far, (X, labels), UNKNOWN, verbose=0).known
        assert known.nll_with_abstain == pytest.approx(expected, rel=1e-5)
    assert report.known.ece_renormalized == pytest.approx(
        plain.known.ece_renormalized, abs=1e-5
    )
    assert report.known.nll_renormalized == pytest.approx(
        plain.known.nll_renormalized, abs=1e-5
    )


def test_the_drawn_calibration_does_not_underflow_either(model):
    plt = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    reports = [
        evaluate_ood(answers, (X, Y), UNKNOWN, verbose=0)
        for answers in (model, abstaining(model, 1000.0))
    ]
    titles = [report.plot().axes[2].get_title() for report in reports]
    assert titles[0] == titles[1]
    plt.close("all")


# What Keras masks does not count ---------------------------------------------


def token_model(kind):
    """A model that masks zeros, and makes of other tokens their embedding."""
    table = np.concatenate([np.zeros((1, DIM)), X]).astype("float32")

    def embedding(mask_zero=True):
        return keras.layers.Embedding(
            len(table),
            DIM,
            mask_zero=mask_zero,
            embeddings_initializer=lambda shape, dtype=None: table,
        )

    if kind == "sequential":
        return keras.Sequential(
            [keras.Input((4,), dtype="int32"), embedding(), head()]
        )
    inputs = keras.Input((4,), dtype="int32")
    scores = head()(embedding()(inputs))
    if kind == "nested":
        inner = keras.Model(inputs, scores)
        outer = keras.Input((4,), dtype="int32")
        return keras.Model(outer, inner(outer))
    if kind == "dictionary":
        ood = keras_halo.layers.OODScore("nearest")(scores)
        return keras.Model(inputs, {"scores": scores, "ood": ood})
    if kind == "subclassed":
        return Subclassed(embedding(), head())
    if kind == "own step":
        return OwnStep(inputs, scores)
    if kind == "masking":
        vectors = keras.layers.Masking()(embedding(mask_zero=False)(inputs))
        return keras.Model(inputs, head()(vectors))
    return keras.Model(inputs, scores)


class Subclassed(keras.Model):
    def __init__(self, embedding, head):
        super().__init__()
        self.embedding, self.head = embedding, head

    def call(self, inputs):
        return self.head(self.embedding(inputs))


class OwnStep(keras.Model):
    def predict_step(self, *args, **kwargs):
        return super().predict_step(*args, **kwargs)


MASKED = [
    "functional",
    "sequential",
    "nested",
    "dictionary",
    "subclassed",
    "own step",
    "masking",
]

# Tokens 1 to 80 are samples, 0 is padding: half of every sequence, so that
# every number differs where padding counts.
TOKENS = np.zeros((40, 4), "int32")
TOKENS[:, :2] = np.arange(1, 81).reshape(40, 2)
TOKEN_LABELS = np.full((40, 4), -1)
TOKEN_LABELS[:, :2] = Y[:80].reshape(40, 2)


@pytest.mark.parametrize("kind", MASKED)
def test_positions_that_keras_masks_do_not_count(kind, model):
    masking = token_model(kind)
    real = {"tokens": X[:60]}
    expected = evaluate_ood(model, (X[:80], Y[:80]), real, verbose=0)
    unknown = {"tokens": TOKENS[:30]}
    report = evaluate_ood(masking, (TOKENS, TOKEN_LABELS), unknown, verbose=0)
    assert report.known.count == 80 and report["tokens"].count == 60
    assert_same(report, expected)
    # Loss and metrics count the same.
    masking.compile(
        loss=keras_halo.HALOLoss(),
        metrics=[keras_halo.metrics.AbstentionRate()],
    )
    if kind != "dictionary":
        rate = masking.evaluate(
            TOKENS, TOKEN_LABELS.clip(0), verbose=0, return_dict=True
        )["abstention_rate"]
        assert report.known.abstention_rate == pytest.approx(rate)


@pytest.mark.parametrize("weights", ["samples", "positions"])
def test_a_mask_and_weights_both_count(weights, model):
    weight = np.arange(40) % 2
    kept = np.repeat(weight == 1, 2)
    expected = evaluate_ood(
        model, (X[:80][kept], Y[:80][kept]), UNKNOWN, verbose=0
    )
    if weights == "positions":
        weight = np.repeat(weight[:, None], 4, axis=1)
    masking = token_model("functional")
    report = evaluate_ood(
        masking,
        (TOKENS, TOKEN_LABELS, weight),
        {"near": TOKENS[:1], "far": TOKENS[:1]},
        verbose=0,
    )
    assert report.known.count == 40
    assert report.known.to_dict() == pytest.approx(
        expected.known.to_dict(), rel=1e-5, abs=1e-6
    )


def test_calibration_leaves_out_what_is_masked(model):
    pytest.importorskip("scipy", reason="needs SciPy")
    labels = np.where(np.arange(80) % 7 == 0, (Y[:80] + 1) % 3, Y[:80])
    expected = keras_halo.calibrate(
        model, X[:80], labels, unknown=X[80:100], verbose=0
    )
    expected.undo()
    masking = token_model("functional")
    padded = TOKEN_LABELS.copy()
    padded[:, :2] = labels.reshape(40, 2)
    unknown = np.zeros((10, 4), "int32")
    unknown[:, 1:3] = np.arange(81, 101).reshape(10, 2)
    for x, y, other in (
        (TOKENS, padded, unknown),
        (Batches(TOKENS, padded), None, Batches(unknown)),
    ):
        found = keras_halo.calibrate(masking, x, y, unknown=other, verbose=0)
        found.undo()
        assert found.temperature == pytest.approx(expected.temperature, 1e-4)
        assert found.abstain_bias == pytest.approx(
            expected.abstain_bias, rel=1e-4, abs=1e-5
        )


def test_a_converted_head_is_measured_without_what_is_masked():
    converted = []
    for x, y in (
        (TOKENS, TOKEN_LABELS),
        (TOKENS[:, :2], TOKEN_LABELS[:, :2]),
    ):
        inputs = keras.Input((None,), dtype="int32")
        embedding = token_model("functional").layers[1]
        dense = keras.layers.Dense(NUM_CLASSES, kernel_initializer="ones")
        classifier = keras.Model(inputs, dense(embedding(inputs)))
        converted.append(keras_halo.convert_head(classifier, x, y))
    for one, other in zip(
        *(model.layers[-1].get_weights() for model in converted), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_models_of_strings_are_measured():
    tf = pytest.importorskip("tensorflow", reason="needs TensorFlow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only tensors of TensorFlow hold strings")
    words = np.array([["a b"], ["c d"], ["a d"]] * 10, dtype=object)
    labels = np.arange(30) % 3
    vectorize = keras.layers.TextVectorization(output_mode="multi_hot")
    vectorize.adapt(words[:, 0].astype(str))
    inputs = keras.Input((1,), dtype="string")
    features = keras.layers.Dense(8)(vectorize(inputs))
    model = keras.Model(inputs, keras_halo.HALODense(3)(features))
    tensor = tf.constant(words)
    dataset = tf.data.Dataset.from_tensor_slices((words, labels)).batch(8)
    for known in ((tensor, labels), dataset):
        report = evaluate_ood(model, known, {"u": dataset}, verbose=0)
        assert report.known.count == report["u"].count == 30


class PredictsItsWay:
    """As the tasks of KerasHub, which preprocess what they are given."""

    def predict(self, x, **kwargs):
        return super().predict(np.asarray(x) / 255.0, **kwargs)


class PredictsBatchesItsWay:
    def predict_on_batch(self, x):
        return super().predict_on_batch(np.asarray(x) / 255.0)


class Task(PredictsItsWay, PredictsBatchesItsWay, keras.Model):
    pass


class TaskOfOneMethod(PredictsItsWay, keras.Model):
    pass


class TaskOfBatches(PredictsBatchesItsWay, keras.Model):
    pass


@pytest.mark.parametrize("cls", [Task, TaskOfOneMethod, TaskOfBatches])
@pytest.mark.parametrize("may_mask", [False, True])
def test_a_model_that_predicts_its_own_way_is_asked_itself(
    cls, may_mask, model, reference
):
    inputs = keras.Input((DIM,))
    features = keras.layers.Lambda(lambda x: x)(inputs) if may_mask else inputs
    task = cls(inputs, head()(features))
    raw = {name: 255.0 * x for name, x in UNKNOWN.items()}
    for known in ((255.0 * X, Y), Batches(255.0 * X, Y)):
        report = evaluate_ood(task, known, raw, verbose=0)
        # The data set shuffles itself.
        np.testing.assert_allclose(
            np.sort(report.known.scores),
            np.sort(reference.known.scores),
            rtol=1e-3,
            atol=1e-3,
        )
    monitor = keras_halo.OODMonitor(255.0 * X, raw)
    monitor.set_model(task)
    assert monitor.measure()["ood_auroc"] == pytest.approx(
        reference.mean.auroc, abs=1e-3
    )
    pytest.importorskip("scipy", reason="needs SciPy")
    expected = keras_halo.calibrate(model, X, Y, unknown=X, verbose=0)
    expected.undo()
    # Arrays are what `predict` makes of them; datasets come in batches.
    for x, y in ((255.0 * X, Y), (Batches(255.0 * X, Y), None)):
        if cls is TaskOfBatches and y is not None:
            continue
        found = keras_halo.calibrate(task, x, y, unknown=255.0 * X, verbose=0)
        found.undo()
        assert found.temperature == pytest.approx(expected.temperature, 1e-3)


def test_masks_of_a_model_that_predicts_its_own_way_are_missed():
    inputs = keras.Input((4,), dtype="int32")
    masking = token_model("functional")

    class Own(keras.Model):
        def predict_on_batch(self, x):
            return super().predict_on_batch(x)

    with pytest.warns(UserWarning, match="masks cannot be told"):
        report = evaluate_ood(
            Own(inputs, masking(inputs)),
            (TOKENS, TOKEN_LABELS.clip(0)),
            {"tokens": TOKENS[:30]},
            verbose=0,
        )
    assert report["tokens"].count == 120


@pytest.mark.parametrize(
    "name", ["two\nlines", "a | b", "a \\| b", "carriage\rreturn", "\u2028 x"]
)
def test_names_of_sets_do_not_break_the_tables(name, model):
    report = evaluate_ood(
        model, (X[:20], Y[:20]), {name: UNKNOWN["far"]}, verbose=0
    )
    plain = evaluate_ood(
        model, (X[:20], Y[:20]), {"far": UNKNOWN["far"]}, verbose=0
    )
    assert len(str(report).splitlines()) == len(str(plain).splitlines())
    tables = [r.to_markdown().splitlines() for r in (report, plain)]
    assert len(tables[0]) == len(tables[1])

    def cells(line):
        # As GitHub splits a row: at every bar that no backslash escapes.
        return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line))

    assert [cells(line) for line in tables[0]] == [
        cells(line) for line in tables[1]
    ]


@pytest.mark.parametrize("name", ["two\nlines", "a `b` c", "\u2028 x", "\n"])
def test_the_name_of_a_function_does_not_break_a_report(name, model):
    def score(scores):
        return scores[:, 0]

    def report():
        return evaluate_ood(model, (X, Y), UNKNOWN, score, verbose=0)

    plain = report()
    score.__name__ = name
    found = report()
    assert len(str(found).splitlines()) == len(str(plain).splitlines())
    lines = found.to_markdown().splitlines()
    assert len(lines) == len(plain.to_markdown().splitlines())
    assert lines[0].count("`") == 2


def test_a_mask_is_found_without_running_the_model_twice():
    x = np.zeros((12, 4), "int32")
    x[:, :2] = np.random.default_rng(0).integers(1, 9, (12, 2))

    def stateful():
        keras.utils.set_random_seed(0)
        inputs = keras.Input(batch_shape=(4, 4), dtype="int32")
        embedded = keras.layers.Embedding(9, 3, mask_zero=True)(inputs)
        recurrent = keras.layers.SimpleRNN(
            DIM, return_sequences=True, stateful=True
        )
        return keras.Model(inputs, head()(recurrent(embedded)))

    scores = stateful().predict(x, batch_size=4, verbose=0)[:, :2]
    report = evaluate_ood(
        stateful(), (x, x % 3), {"same": x}, batch_size=4, verbose=0
    )
    np.testing.assert_allclose(
        report.known.scores,
        keras_halo.ood_score(scores).ravel(),
        rtol=1e-5,
        atol=1e-5,
    )
