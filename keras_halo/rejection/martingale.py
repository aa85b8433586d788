"""Evidence against "nothing has changed", at any time, as pure functions.

A test martingale is the wealth of somebody who bets on p-values. As long as
these are uniform and independent, the wealth is fair, starts at one and
reaches `1 / alpha` with probability at most `alpha`, however long the stream
and whenever one looks (Ville's inequality).
"""

import numpy as np

from keras_halo.utils.extras import require

# The bets: a share of inputs whose scores, on the scale where those of known
# inputs are standard normal, are shifted upwards.
_SHARES = np.array([0.05, 0.2, 0.7])
_SHIFTS = np.array([1.0, 2.0, 3.5])
NUM_BETS = len(_SHARES) * len(_SHIFTS)

# Inputs after which half of the stake has been put into bets.
_SCALE = 16.0

# Far below any p-value that ranks give.
_SMALLEST = 1e-15

# Pairs of inputs are compared within blocks of this size.
_BLOCK = 256


def log_bets(p_values):
    """What each bet multiplies its wealth by, as logarithms.

    Formula:

    ```python
    z = -normal_quantile(p)
    bet = 1 + share * (exp(shift * z - shift**2 / 2) - 1)
    ```

    Every bet integrates to one over p in `[0, 1]`: it is fair.

    Args:
        p_values: Array of shape `(N,)`, in `[0, 1]`.

    Returns:
        Array of shape `(N, NUM_BETS)`.

    Example:

    >>> log_bets(np.array([0.5])).shape
    (1, 9)
    >>> bool((log_bets(np.array([0.001])) > 0.0).all())
    True
    """
    p_values = np.clip(p_values, _SMALLEST, 1.0 - _SMALLEST)
    z = -require("scipy.special").ndtri(p_values)[:, None, None]
    ratios = np.exp(_SHIFTS * z - 0.5 * _SHIFTS**2)
    return np.log1p(_SHARES[:, None] * (ratios - 1.0)).reshape(-1, NUM_BETS)


def stake_left(num_inputs):
    """The part of the stake that waits for a change yet to come.

    It falls so slowly that a late change is noticed almost as fast as an early
    one.

    Formula:

    ```python
    1 / (1 + log(1 + num_inputs / 16))
    ```

    Args:
        num_inputs: Array of integers.

    Returns:
        Array of floats in `(0, 1]`.

    Example:

    >>> stake_left(np.array([0, 1_000_000])).round(3).tolist()
    [1.0, 0.083]
    """
    return 1.0 / (1.0 + np.log1p(np.asarray(num_inputs) / _SCALE))


def grown(log_wealth, num_inputs, p_values):
    """Lets the wealth of all bets grow, or shrink, by new p-values.

    At every input a part of what is left of the stake joins the bets, so that
    some wealth has never lost on what came before a change.

    Formula:

    ```python
    wealth[k] = (wealth[k] + joining / NUM_BETS) * bet[k](p)
    evidence = sum(wealth) + stake_left
    ```

    Args:
        log_wealth: Array of shape `(NUM_BETS,)`, logarithms; minus infinity
            before the first input.
        num_inputs: Integer, the number of inputs before.
        p_values: Array of shape `(N,)`, of which each is uniform given those
            before, as long as nothing has changed.

    Returns:
        Tuple: the new logarithms, of shape `(NUM_BETS,)`, and the natural
        logarithm of the evidence after each input, of shape `(N,)`.

    Example:

    >>> start = np.full(NUM_BETS, -np.inf)
    >>> _, evidence = grown(start, 0, np.full(20, 0.001))
    >>> bool(evidence[-1] > np.log(100) > evidence[0])
    True

    References:

    - Vladimir Vovk, Ilia Nouretdinov, Alexander Gammerman, Testing
      Exchangeability On-Line, 2003.
    - Glenn Shafer, Alexander Shen, Nikolai Vereshchagin, Vladimir Vovk, Test
      Martingales, Bayes Factors and p-Values, 2011.
    """
    bets = log_bets(p_values)
    times = num_inputs + np.arange(len(bets) + 1)
    left = stake_left(times)
    joining = np.log(left[:-1] - left[1:]) - np.log(NUM_BETS)
    gains = np.cumsum(bets, axis=0)
    # Relative to the gains so far, what joins is a plain sum.
    parts = np.concatenate([log_wealth[None], joining[:, None] - gains + bets])
    paths = gains + np.logaddexp.accumulate(parts, axis=0)[1:]
    total = np.logaddexp(np.logaddexp.reduce(paths, axis=1), np.log(left[1:]))
    return paths[-1] if len(paths) else log_wealth, total


def smoothed_ranks(counts, bins, uniforms):
    """P-values of bins among all that came before, and the new counts.

    Formula:

    ```python
    p = (#{earlier in a higher bin} + u * (1 + #{earlier in the same bin}))
        / (1 + #{earlier})
    ```

    Exactly uniform, and independent of each other, as long as the inputs and
    those counted before are exchangeable.

    Args:
        counts: Integer array of shape `(bins,)`, how many came before.
        bins: Integer array of shape `(N,)`, the bin of each new input.
        uniforms: Array of shape `(N,)`, random numbers in `[0, 1)`.

    Returns:
        Tuple: p-values of shape `(N,)`, and the counts after all of them.

    Example:

    >>> p, counts = smoothed_ranks(
    ...     np.array([3, 0]), np.array([1, 1]), np.array([0.5, 0.5])
    ... )
    >>> p.tolist(), counts.tolist()
    ([0.125, 0.2], [3, 2])

    References:

    - Vladimir Vovk, Alex Gammerman, Glenn Shafer, Algorithmic Learning in a
      Random World, 2005.
    """
    counts = counts.copy()
    p_values = []
    for start in range(0, len(bins), _BLOCK):
        new = bins[start : start + _BLOCK]
        earlier = np.tri(len(new), k=-1, dtype=bool)
        same = counts[new] + ((new[:, None] == new) & earlier).sum(axis=1)
        above = counts[::-1].cumsum()[::-1] - counts
        higher = above[new] + ((new[:, None] < new) & earlier).sum(axis=1)
        total = counts.sum() + np.arange(len(new))
        u = uniforms[start : start + _BLOCK]
        p_values.append((higher + u * (same + 1.0)) / (total + 1.0))
        counts += np.bincount(new, minlength=len(counts))
    return np.concatenate(p_values) if p_values else np.zeros(0), counts


def risk_interval(errors, num_samples, delta):
    """An interval that contains the error rate at all times together.

    Unlike a binomial interval it may be looked at after every sample: the
    probability that it ever misses the error rate is at most `delta`.

    Formula:

    ```python
    evidence(r) = B(e + 1/2, n - e + 1/2) / B(1/2, 1/2) / r**e / (1-r)**(n-e)
    interval = {r : evidence(r) < 1 / delta}
    ```

    Args:
        errors: Integer `e`.
        num_samples: Integer `n`.
        delta: Float in `(0, 1)`.

    Returns:
        Tuple of floats, the ends of the interval.

    Example:

    >>> low, high = risk_interval(5, 100, 0.05)
    >>> round(low, 3), round(high, 3)
    (0.007, 0.156)

    References:

    - Herbert Robbins, Statistical Methods Related to the Law of the Iterated
      Logarithm, 1970.
    """
    if num_samples == 0:
        return 0.0, 1.0
    special = require("scipy.special")
    correct = num_samples - errors
    mixture = special.betaln(errors + 0.5, correct + 0.5) - special.betaln(
        0.5, 0.5
    )

    def excess(rate):
        likelihood = special.xlogy(errors, rate)
        likelihood += special.xlog1py(correct, -rate)
        return mixture - likelihood + np.log(delta)

    find = require("scipy.optimize").brentq
    rate = errors / num_samples
    low = find(excess, 1e-300, rate) if errors else 0.0
    high = find(excess, rate, 1.0 - 1e-16) if correct else 1.0
    return float(low), float(high)
