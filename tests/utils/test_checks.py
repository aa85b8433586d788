"""What users pass becomes arrays and numbers, or is refused in words."""

import decimal
import fractions

import cases
import keras
import numpy as np
import pytest
from helpers import float64
from hypothesis import strategies as st
from keras import ops

from keras_halo.utils import checks

NAN, INF = float("nan"), float("inf")


def refused(call, *parts):
    """The error says what was expected, received, and each of the parts."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    for part in ("Received: ", *parts):
        assert part in message
    return message


# Numbers of Python


@pytest.mark.any_backend
@cases.for_all(
    value=st.integers(-(2**70), 2**70), least=st.sampled_from([None, 0, 1, 5])
)
def test_integers_are_those_that_are_large_enough(value, least):
    if least is None or value >= least:
        assert checks.as_integer(value, "n", least) == value
    else:
        kind = {0: "a non-negative", 1: "a positive", 5: "an integer of at"}
        refused(
            lambda: checks.as_integer(value, "n", least, ", so", "Do."),
            f"`n` must be {kind[least]}",
            ", so. ",
            f"n={value}",
        )


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64])
def test_integers_of_numpy_become_those_of_python(kind):
    found = checks.as_integer(kind(3), "n", 1)
    assert type(found) is int and found == 3


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "bad", [True, 3.0, "3", None, [3], np.array(3.0), np.array([3]), NAN, 3j]
)
def test_what_is_no_integer_is_refused(bad):
    refused(
        lambda: checks.as_integer(bad, "n", remedy="Count them."),
        "`n` must be an integer. ",
        " Count them.",
    )


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "value", [2, 0.5, np.float32(0.5), np.int8(1), fractions.Fraction(1, 3)]
)
def test_numbers_become_floats(value):
    found = checks.as_number(value, "x", lambda x: True, "real")
    assert type(found) is float and found == float(value)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "bad",
    [
        True,
        "0.5",
        None,
        [0.5],
        0.5j,
        NAN,
        np.float32("nan"),
        decimal.Decimal(1),
    ],
)
def test_what_is_no_number_is_refused_whatever_fits(bad):
    refused(
        lambda: checks.as_number(bad, "x", lambda x: True, "real", "Do."),
        "`x` must be real. Received: x=",
        " Do.",
    )


@pytest.mark.any_backend
def test_numbers_that_do_not_fit_are_refused():
    def read(value):
        return checks.as_number(value, "x", lambda x: 0 < x <= 1, "in (0, 1]")

    assert read(1) == 1.0
    for value in (0, -0.5, 1.1, INF, -INF):
        refused(lambda value=value: read(value), f"x={value!r}")

    def read_any(value):
        return checks.as_number(value, "x", lambda x: True, "a number")

    # No float holds them.
    assert read_any(10**400) == INF and read_any(-(10**400)) == -INF


@pytest.mark.any_backend
def test_booleans_are_booleans_alone():
    for value in (True, False, np.True_, np.False_):
        found = checks.as_boolean(value, "flag")
        assert type(found) is bool and found == value
    for bad in (0, 1, "no", "False", None, [], [True], np.array([True])):
        refused(lambda bad=bad: checks.as_boolean(bad, "flag"), "`flag` must")


@pytest.mark.any_backend
def test_strings_are_strings_alone():
    checks.check_string("", "name")
    for bad in (b"bytes", None, 3, ["a"]):
        refused(lambda bad=bad: checks.check_string(bad, "name"), "`name` must")


@pytest.mark.any_backend
def test_arguments_that_are_not_taken_are_explained():
    reasons = {"axis": "classes are last", "from_logits": "they are"}
    checks.check_not_taken({"name": 1}, reasons, "Loss")
    message = refused(
        lambda: checks.check_not_taken(
            {"name": 1, "axis": -1}, reasons, "Loss"
        ),
        "`Loss` takes no `axis`: classes are last",
    )
    assert message.endswith("axis=-1.")


@pytest.mark.any_backend
def test_lists_are_what_can_be_gone_through():
    for values in (["a", "b"], ("a", "b"), np.array(["a", "b"]), iter("ab")):
        found = checks.as_list(values, "names", str, "strings", least=2)
        assert type(found) is list and found == ["a", "b"]
    assert checks.as_list([], "names", str, "strings") == []
    for bad in ("ab", b"ab", {"a": 1}, None, 3, ["a", 3], np.array("a"), ["a"]):
        refused(
            lambda bad=bad: checks.as_list(bad, "n", str, "text", "Do.", 2),
            "`n` must be text. Received: n=",
            "Do.",
        )


# One meaning each


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "check, good, bad",
    [
        (checks.check_units, [2, 10**6], [1, 0, -3, 2.0, None]),
        (
            checks.check_embedding_dim,
            [2, None, "auto", 512],
            [1, "none", 2.5, True, np.array(["auto", "auto"])],
        ),
        (
            checks.check_abstain_rate,
            [None, 0.0, 0.01, 0.4999],
            [0.5, -0.01, 1, NAN, "0.1"],
        ),
        (checks.check_label_smoothing, [0.0, 0.1, 0.999], [1.0, -0.1, NAN]),
        (checks.check_block_size, [None, 1, 4096], [0, -1, 1.5]),
        (
            checks.check_ignore_class,
            [None, -1, 255, 2**31 - 1, -(2**31)],
            [2**31, -(2**31) - 1, 1.0, "void", True],
        ),
        (checks.check_batch_size, [None, 1, 32], [0, -1, 32.0, "32"]),
        (checks.check_verbose, [0, 1, 2, "auto"], [3, -1, 0.5, None, "loud"]),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_limits_of_an_argument(check, good, bad):
    for value in good:
        found = check(value)
        assert found == value and type(found) is type(value)
    for value in bad:
        argument = check.__name__.removeprefix("check_")
        refused(lambda value=value: check(value), argument)


@pytest.mark.any_backend
def test_booleans_are_verbosities_as_for_keras():
    assert checks.check_verbose(True) == 1 and checks.check_verbose(False) == 0
    assert type(checks.check_verbose(np.True_)) is int


@pytest.mark.any_backend
def test_models_are_those_of_keras():
    checks.check_model(keras.Sequential([keras.layers.Dense(2)]))
    for bad in (keras.layers.Dense(2), "model.keras", None, keras.Model):
        refused(lambda bad=bad: checks.check_model(bad), "`keras.Model`")


@pytest.mark.any_backend
def test_features_are_floating_point_with_an_axis():
    layer = keras.layers.Dense(2)
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        checks.check_floating(dtype, layer)
    for dtype in ("int32", "uint8", "bool", "string"):
        refused(
            lambda dtype=dtype: checks.check_floating(dtype, layer),
            "`Dense`",
            f"dtype={dtype}",
        )
    checks.check_feature_axis((3,), layer)
    checks.check_feature_axis((None, 3), layer)
    refused(lambda: checks.check_feature_axis((), layer), "`Dense`", "shape=()")


# Arrays


@pytest.mark.parametrize("bad", sorted(cases.NO_NUMBERS))
@pytest.mark.parametrize(
    "read", [checks.number_array, checks.to_array, checks.label_array]
)
def test_what_is_no_array_of_numbers_is_refused(bad, read):
    refused(lambda: read(cases.NO_NUMBERS[bad], "values"), "`values` must")


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "int8", "uint8", "int32", "bool"]
)
@pytest.mark.parametrize("make", ["array", "tensor", "list"])
def test_numbers_come_back_as_they_are(dtype, make):
    values = np.array([[0, 1], [3, 100]]).astype(dtype)
    with float64():
        given = {
            "array": lambda: values,
            "tensor": lambda: ops.convert_to_tensor(values),
            "list": values.tolist,
        }[make]()
        found = checks.number_array(given, "values")
        floats = checks.to_array(given, "values")
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, values)
    if make == "list":
        assert found.dtype.kind == np.dtype(dtype).kind.replace("u", "i")
    else:
        assert found.dtype == dtype
    assert floats.dtype == "float64"
    np.testing.assert_array_equal(floats, values)


def test_sixteen_bits_of_the_other_kind_are_numbers():
    values = ops.cast(ops.array([1.0, 2.5]), "bfloat16")
    assert checks.to_array(values, "values").tolist() == [1.0, 2.5]


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_integers_that_float64_cannot_tell_apart_are_refused(dtype):
    signs = (1, -1) if dtype == "int64" else (1,)
    for sign in signs:
        fits = np.array([0, sign * 2**53], dtype)
        assert checks.number_array(fits, "ids") is fits
        wide = np.array([0, sign * (2**53 + 1)], dtype)
        refused(
            lambda wide=wide: checks.number_array(wide, "ids"),
            "2**53",
            str(sign * (2**53 + 1)),
        )
        assert checks.number_array(wide, "ids", to_float=False) is wide
    least = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    refused(lambda: checks.number_array(least, "ids"), "2**53")
    assert checks.number_array(np.array([], dtype), "ids").size == 0


@pytest.mark.any_backend
def test_masked_arrays_are_found_in_lists():
    masked = np.ma.array([1.0, 2.0, 3.0], mask=[True, False, True])
    for values in (masked, [masked], [[0.0], (1.0, [masked])], [np.ma.masked]):
        with pytest.raises(ValueError, match="`x` must not be a masked array"):
            checks.check_not_masked(values, "x")
    refused(lambda: checks.check_not_masked([masked], "x"), "2 of 3 values")
    endless = [1.0]
    endless.append(endless)
    for values in (endless, [1.0, [2.0]], np.ones(3), None, "text", []):
        checks.check_not_masked(values, "x")


@pytest.mark.any_backend
def test_weights_are_finite_and_not_negative():
    found = checks.weight_array([1, 0, 2])
    assert found.dtype == "float64" and found.tolist() == [1.0, 0.0, 2.0]
    assert checks.weight_array(np.zeros((2, 3))).shape == (2, 3)
    refused(lambda: checks.weight_array(1.0), "one number a sample")
    for bad in (-1.0, NAN, INF, -INF):
        refused(
            lambda bad=bad: checks.weight_array([0.0, bad, bad], "w"),
            "`w` must hold finite numbers",
            f"2 of 3 others, among them {bad}",
        )


@pytest.mark.any_backend
def test_vectors_are_finite_and_not_empty():
    assert checks.finite_vector([1, 2], "x").tolist() == [1.0, 2.0]
    refused(lambda: checks.finite_vector([], "x"), "at least one sample")
    refused(lambda: checks.finite_vector([[1.0]], "x"), "shape=(1, 1)")
    refused(lambda: checks.finite_vector(1.0, "x"), "shape=()")
    for bad in (NAN, INF, -INF):
        refused(lambda bad=bad: checks.finite_vector([0.0, bad], "x"), "1 of 2")


@pytest.mark.any_backend
def test_what_is_not_finite_is_counted():
    checks.check_finite(np.zeros((2, 2)), "x")
    checks.check_finite(np.zeros(0), "x")
    values = np.array([[NAN, 1.0], [INF, -INF]])
    refused(lambda: checks.check_finite(values, "x"), "3 of 4", "diverged")
    message = refused(lambda: checks.check_finite(values, "x", "Do."), "Do.")
    assert "diverged" not in message
