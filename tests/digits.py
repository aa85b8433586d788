"""Real images without a network: the 8 x 8 digits of scikit-learn."""

import pytest


def known_and_unknown():
    """Images and labels of the digits 0 to 4, and images of 5 to 9."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x = (x / 16.0).reshape(-1, 8, 8, 1).astype("float32")
    known = y < 5
    return x[known], y[known], x[~known]
