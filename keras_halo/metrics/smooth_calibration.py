import numpy as np

from keras_halo.metrics.calibration import confidence_and_accuracy
from keras_halo.utils.types import ArrayLike

# Cells of the interval of confidences. A confidence moves by half of one.
_NUM_CELLS = 2**14

# Halvings of the interval in which the bandwidth is sought.
_NUM_STEPS = 40


def smooth_calibration_error(
    labels: ArrayLike, probabilities: ArrayLike
) -> float:
    """Computes the calibration error by smoothing, without bins to choose.

    The difference between accuracy and confidence is smoothed over the
    confidence by a Gaussian that is reflected at 0 and 1, and its magnitude is
    averaged. The bandwidth is not chosen either: it is the one that equals the
    error that it gives. So a small change of probabilities changes the error
    little, which is not so with bins, and few samples are smoothed more.

    Formula:

    ```python
    error(sigma) = integral(abs(mean_n((y_n - p_n) * K_sigma(p_n, t))), t=0..1)
    smooth_calibration_error = the sigma for which error(sigma) == sigma
    ```

    with `p_n` the largest probability of a sample, `y_n` whether its class is
    the label, and `K_sigma` the reflected Gaussian.

    Args:
        labels: Integers of shape `(N,)` or `(N, 1)`, or a distribution,
            one-hot or soft, of shape `(N, K)`.
        probabilities: Array of shape `(N, K)`, rows that sum to one or less.

    Returns:
        Float in `[0, 1]`, to within `1e-4`.

    Raises:
        ValueError: If labels and probabilities do not fit each other or are no
            such thing.

    Example:

    >>> p = [[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.75, 0.25]]
    >>> round(smooth_calibration_error([0, 0, 1, 1], p), 3)
    0.25
    >>> smooth_calibration_error([0, 0, 0, 1], p)
    0.0

    References:

    - Jaroslaw Blasiok, Preetum Nakkiran, Smooth ECE: Principled reliability
      diagrams via kernel smoothing, 2024.
    """
    confidence, accuracy = confidence_and_accuracy(labels, probabilities)
    cells = np.minimum((confidence * _NUM_CELLS).astype(int), _NUM_CELLS - 1)
    residuals = np.bincount(
        cells, weights=accuracy - confidence, minlength=_NUM_CELLS
    )
    residuals /= len(confidence)
    # Reflection at 0 and 1 is the same as an even function of period 2, and a
    # Gaussian acts on each of its frequencies as a factor.
    spectrum = np.fft.rfft(np.concatenate([residuals, residuals[::-1]]))
    frequencies = np.pi * np.arange(len(spectrum))

    def error(sigma):
        damping = np.exp(-0.5 * (frequencies * sigma) ** 2)
        smooth = np.fft.irfft(spectrum * damping, 2 * _NUM_CELLS)
        return np.abs(smooth[:_NUM_CELLS]).sum()

    # The error falls with the bandwidth.
    low, high = 0.0, 1.0
    for _ in range(_NUM_STEPS):
        middle = 0.5 * (low + high)
        if error(middle) > middle:
            low = middle
        else:
            high = middle
    return low
