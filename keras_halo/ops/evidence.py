"""Running statistics of how surely a head names a class.

Two backgrounds stand against the classes: a narrow one at the origin of the
embedding space, and a wide one around it, which wins far out. The evidence for
the best class `k` against each of them is a log-likelihood ratio up to a
constant:

```python
near = max_k s_k
far = max_k s_k - gamma * |x|^2 / 2
```

A head abstains where a bias exceeds the evidence. It places both biases at a
low quantile of the evidence of its own training batches, as batch
normalization keeps averages: without labels, and without a gradient.

A quantile is kept as `mean + offset * deviation`. The mean and the deviation
follow the network, wherever they started, within about a thousand samples, but
in no fewer than ten batches and no more than some tens: a training of fifty
batches must not end with the averages of its first half. The offset moves by
the difference between the wanted and the observed share of samples below, which
makes it unbiased whatever the batch size and the distribution.
"""

import collections
import statistics

from keras import ops

from keras_halo.ops.tensors import max_of_rows

# The weight of a batch in the running mean and variance: that of its samples
# among so many, within bounds.
WINDOW = 1000.0
STEP = 0.03
MAX_STEP = 0.1

# What one batch may add to the share below, so that a sudden change of the
# evidence does not throw the offset far off.
MAX_EXCESS = 0.1

# New inputs are recognized less surely than training samples. A background
# that reaches into the training samples by the wanted share would reject
# several times as many new inputs, so it stays this much farther away.
WIDENING = 1.25

# Known inputs lie at least this far above either background on average, in
# nats. A network that has learned little tells them hardly apart from the
# origin, and the two backgrounds together would reject all of them.
MIN_MARGIN = 1.5

# The largest ratio of the units of either kind of evidence.
MAX_SCALE = 4.0

# The farthest quantile, in deviations below the mean.
MAX_OFFSET = 8.0

# Samples farther from the mean than so many deviations count as that far: one
# corrupted input must not throw the statistics off. Where half of a batch of at
# least so many is farther away, the statistics are of another network: they
# start anew.
REACH = 30.0
MIN_BATCH = 8.0

# Squares of evidence beyond this would overflow float32.
MAX_EVIDENCE = 1e15

EvidenceStatistics = collections.namedtuple(
    "EvidenceStatistics", ["mean", "variance", "offset", "count"]
)
EvidenceStatistics.__doc__ = """What is kept of the evidence of past batches.

Args:
    mean: Shape `(2,)`, of the near and of the far evidence.
    variance: Shape `(2,)`.
    offset: Shape `(2,)`, that of the quantile, in deviations, not positive.
    count: Scalar, how many batches have been seen.
"""


def initial_offset(share):
    """Returns the offset of a quantile of a normal distribution.

    Args:
        share: Float in `[0, 0.5)`, the share of samples below the quantile.

    Returns:
        Float in `[-8, 0]`.

    Example:

    >>> round(initial_offset(0.01), 3)
    -2.326
    """
    if share <= 0.0:
        return -MAX_OFFSET
    return max(statistics.NormalDist().inv_cdf(share), -MAX_OFFSET)


def class_evidence(logits, squared_norm, temperature):
    """Computes the evidence of the best class against both backgrounds.

    Formula:

    ```python
    near = max_k s_k
    far = max_k s_k - gamma * |x|^2 / 2
    ```

    Args:
        logits: Tensor `s` of shape `(N, K)`.
        squared_norm: Tensor `|x|^2` of shape `(N, 1)`.
        temperature: Tensor `gamma` of shape `(N, 1)` or a scalar.

    Returns:
        Tensor of shape `(N, 2)`.

    Example:

    >>> logits, norm = ops.array([[3.0, -6.0]]), ops.ones((1, 1))
    >>> ops.convert_to_numpy(class_evidence(logits, norm, 2.0)).tolist()
    [[3.0, 2.0]]
    """
    near = max_of_rows(logits)
    far = near - 0.5 * temperature * squared_norm
    return ops.concatenate([near, far], axis=-1)


def margins(state):
    """Returns how far known inputs lie above both backgrounds, in nats.

    Formula:

    ```python
    margins = max(-1.25 * offset * sqrt(variance), 1.5)
    ```

    Args:
        state: `EvidenceStatistics`.

    Returns:
        Tensor of shape `(2,)`.

    Example:

    >>> offset, variance = ops.array([-2.0, -2.0]), ops.array([4.0, 0.01])
    >>> state = EvidenceStatistics(offset, variance, offset, ops.array(9.0))
    >>> ops.convert_to_numpy(margins(state)).tolist()
    [5.0, 1.5]
    """
    margin = -WIDENING * state.offset * ops.sqrt(state.variance)
    return ops.maximum(margin, MIN_MARGIN)


def biases(state):
    """Returns where running statistics place the two backgrounds.

    Formula:

    ```python
    biases = mean - margins
    ```

    Args:
        state: `EvidenceStatistics`.

    Returns:
        Tensor of shape `(2,)`.

    Example:

    >>> one = ops.ones((2,))
    >>> state = EvidenceStatistics(one, 4.0 * one, -2.0 * one, ops.array(9.0))
    >>> ops.convert_to_numpy(biases(state)).tolist()
    [-4.0, -4.0]
    """
    return state.mean - margins(state)


def far_scale(state):
    """Returns the unit of the far evidence in units of the near one.

    Either kind of evidence lies above its bias by so much on average; what a
    head lacks of it counts in this unit.

    Formula:

    ```python
    far_scale = clip(margins[0] / margins[1], 1 / 4, 4)
    ```

    Args:
        state: `EvidenceStatistics`.

    Returns:
        Scalar tensor.

    Example:

    >>> offset, variance = ops.array([-2.0, -2.0]), ops.array([9.0, 4.0])
    >>> state = EvidenceStatistics(offset, variance, offset, ops.array(9.0))
    >>> float(far_scale(state))
    1.5
    """
    near, far = ops.unstack(margins(state), 2)
    return ops.clip(near / far, 1.0 / MAX_SCALE, MAX_SCALE)


def updated(state, evidence, share, mask=None):
    """Returns the running statistics after one more batch.

    Formula, with `n` samples in the batch:

    ```python
    step = max(1 / (count + 1), clip(n / (n + 1000), 0.03, 0.1))
    below = mean_i(evidence_i < mean + offset * sqrt(variance))
    offset += share - min(below, share + max(0.1, 1 / n))
    mean += step * (mean_i(evidence_i) - mean)
    variance += step * (mean_i((evidence_i - mean) ** 2) - variance)
    ```

    Samples that are masked or not finite do not count, and a batch without any
    other changes nothing. Samples farther than `30 * (1 + sqrt(variance))` from
    the mean count as that far; where half of a batch of eight or more is, it
    counts as the first one. In the first one, samples count as far as from
    `sinh(mean_i(arcsinh(evidence_i)))`.

    Args:
        state: `EvidenceStatistics`.
        evidence: Tensor of shape `(N, 2)`.
        share: Float in `[0, 0.5)`, the share of samples to be below each
            quantile.
        mask: Optional boolean tensor of shape `(N,)`.

    Returns:
        `EvidenceStatistics`.

    Example:

    >>> zero = ops.zeros((2,))
    >>> state = EvidenceStatistics(zero, zero, zero - 2.0, ops.array(0.0))
    >>> state = updated(state, ops.array([[1.0, 0.0], [3.0, 0.0]]), 0.01)
    >>> ops.convert_to_numpy(state.mean).tolist()
    [2.0, 0.0]
    """
    counted = ops.all(ops.isfinite(evidence), axis=-1)
    if mask is not None:
        counted = ops.logical_and(counted, mask)
    counted = ops.expand_dims(counted, axis=-1)
    number = ops.sum(ops.cast(counted, evidence.dtype))
    some = number > 0.5
    per_sample = 1.0 / ops.maximum(number, 1.0)

    def average(values):
        # Not a product with zero: that of NaN is NaN.
        return ops.sum(ops.where(counted, values, 0.0), axis=0) * per_sample

    evidence = ops.clip(evidence, -MAX_EVIDENCE, MAX_EVIDENCE)
    deviation = ops.sqrt(state.variance)
    reach = REACH * (1.0 + deviation)
    shift = average(_within(evidence - state.mean, reach))
    is_another = ops.any(ops.abs(shift) > 0.5 * reach)
    is_another = ops.logical_and(is_another, number >= MIN_BATCH)
    count = ops.where(is_another, 0.0, state.count)
    is_first = count < 0.5
    # The first batch is compared with a mean of its own that outliers hardly
    # move.
    center = ops.sinh(average(ops.arcsinh(evidence)))
    center = ops.where(is_first, center, state.mean)
    reach = ops.where(is_first, REACH * (1.0 + ops.abs(center)), reach)
    evidence = center + _within(evidence - center, reach)

    quantile = state.mean + state.offset * deviation
    below = average(ops.cast(evidence < quantile, evidence.dtype))
    excess = below - share
    excess = ops.minimum(excess, ops.maximum(per_sample, MAX_EXCESS))
    # The first batch has no quantile to be compared with.
    excess = ops.where(is_first, 0.0, excess)
    offset = ops.clip(state.offset - excess, -MAX_OFFSET, 0.0)
    share_of_window = ops.clip(number / (number + WINDOW), STEP, MAX_STEP)
    step = ops.maximum(1.0 / (count + 1.0), share_of_window)
    mean = state.mean + step * (average(evidence) - state.mean)
    residual = evidence - mean
    variance = state.variance + step * (
        average(residual * residual) - state.variance
    )
    after = EvidenceStatistics(mean, variance, offset, count + 1.0)
    return EvidenceStatistics(
        *(
            ops.where(some, new, old)
            for new, old in zip(after, state, strict=True)
        )
    )


def _within(distance, reach):
    """Distances that end at a reach, which differs by column."""
    return ops.where(
        ops.abs(distance) > reach, ops.sign(distance) * reach, distance
    )
