import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from keras_halo.rejection import bounds, martingale, storage
from keras_halo.rejection.answers import (
    are_answers,
    check_own,
    read_answers,
)
from keras_halo.rejection.readings import (
    Reading,
    check_fraction,
    read_errors,
    read_scores,
)
from keras_halo.rejection.rejection_rule import RejectionRule
from keras_halo.utils.checks import (
    as_integer,
    as_list,
    as_number,
    finite_vector,
    number_array,
)
from keras_halo.utils.types import ArrayLike, Scores

_FORMAT = "keras_halo.monitor"
_VERSION = 1

_MIN_SAMPLES = 40

# The part of the calibration data that places the bins, and how many it may
# place. The rest is counted in them.
_PLACING = 0.25
_MAX_EDGES = 200

# The share of unknown inputs is that of about so many inputs.
_MEMORY = 256.0


@dataclasses.dataclass(frozen=True)
class MonitorStatus:
    """What a monitor has seen of a stream.

    Args:
        inputs: Integer, how many inputs so far.
        rejected: Integer, how many of them the rule rejects.
        evidence: Float, the decimal logarithm of the evidence that inputs have
            changed: at 2 the odds are one hundred to one.
        alarm: Boolean, whether the evidence has ever been enough.
        alarm_at: Integer, the number of the input at which it first was; `None`
            without an alarm.
        unknown_share: Float in `[0, 1]`, an estimate of how many of the last
            few hundred inputs are of another kind than the calibration data.
        labelled: Integer, how many accepted inputs came with a label.
        risk: Tuple of floats, an interval that holds the error rate of
            accepted inputs at all times together.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> known = rng.normal(size=500)
    >>> rule = keras_halo.rejection.CoverageRule(method=None).fit(known)
    >>> monitor = keras_halo.rejection.StreamMonitor(rule).fit(known)
    >>> monitor.update(rng.normal(size=100)).inputs
    100
    """

    inputs: int
    rejected: int
    evidence: float
    alarm: bool
    alarm_at: int | None
    unknown_share: float
    labelled: int
    risk: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _State:
    edges: list
    calibration: list
    counts: list
    wealth: list | None
    evidence: float
    inputs: int
    rejected: int
    alarm_at: int | None
    low_ranks: float
    labelled: int
    errors: int


class StreamMonitor:
    """Tells when the inputs of a deployed model are no longer those it knows.

    It needs no labels. Every score is ranked among the scores of the
    calibration data and of the inputs before it, and the evidence that ranks
    are higher than those of known inputs is kept as the wealth of fair bets.
    As long as inputs are drawn as the calibration data were, the probability
    that there is ever an alarm, however long the stream and whenever one looks,
    is at most `false_alarm`. Memory is constant.

    With labels, of all accepted inputs or of a random part of them, the monitor
    also keeps an interval of the error rate that holds at all times.

    The bound holds for independent inputs. Frames of a video or readings of a
    sensor depend on each other: pass one of many, far apart.

    Formula:

    ```python
    p = smoothed rank of the score among calibration data and stream
    evidence = mixture over bets and times of change of prod(bet(p))
    alarm = max(evidence) >= 1 / false_alarm
    ```

    Args:
        rule: A fitted rule of `keras_halo.rejection`, whose score is monitored.
        false_alarm: Float in `(0, 1)`, the probability of an alarm over the
            whole stream where nothing changes. Defaults to `0.01`.
        delta: Float in `(0, 1)`, the probability that the interval of the risk
            ever misses it. Defaults to `0.05`.
        seed: Integer. Ranks are smoothed by random numbers, which depend on it
            and on the number of the input alone. Defaults to `0`.

    Raises:
        ValueError: If an argument is out of range, or the rule is not fitted,
            needs groups, or judges whole batches.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> known = rng.normal(size=1000)
    >>> rule = keras_halo.rejection.CoverageRule(method=None).fit(known)
    >>> monitor = keras_halo.rejection.StreamMonitor(rule).fit(known)
    >>> monitor.update(rng.normal(size=1000)).alarm
    False
    >>> status = monitor.update(rng.normal(size=200) + 2.0)
    >>> status.alarm, 1000 < status.alarm_at < 1050
    (True, True)

    References:

    - Vladimir Vovk, Ilia Nouretdinov, Alexander Gammerman, Testing
      Exchangeability On-Line, 2003.
    - Herbert Robbins, Statistical Methods Related to the Law of the Iterated
      Logarithm, 1970.
    - John D. Storey, A Direct Approach to False Discovery Rates, 2002. (The
      share of unknown inputs.)
    """

    def __init__(
        self,
        rule: RejectionRule,
        false_alarm: float = 0.01,
        delta: float = 0.05,
        seed: int = 0,
    ) -> None:
        if not isinstance(rule, RejectionRule):
            raise ValueError(
                "`rule` must be a rule of `keras_halo.rejection`. Received: "
                f"rule={rule!r:.100}."
            )
        if getattr(rule, "by", None) == "group":
            raise ValueError(
                "A stream does not tell the groups of its inputs. Received: "
                f"{rule!r}. Monitor each group with a monitor of its own, "
                "`StreamMonitor(rule.rules[group])`."
            )
        if not rule.judges_singly:
            raise ValueError(
                "A stream comes in whatever batches, and what this rule "
                f"decides depends on them. Received: {rule!r}. Monitor a rule "
                "that judges each input by itself, such as "
                "`ConformalRule(alpha)` without `fdr`."
            )
        # Raises where the rule is not fitted.
        self._certificate = rule.certificate()
        self.rule = rule
        self.false_alarm = check_fraction("false_alarm", false_alarm)
        self.delta = check_fraction("delta", delta)
        self.seed = as_integer(seed, "seed", 0)
        self._state: _State | None = None

    def fit(self, scores: Scores) -> Self:
        """Takes the calibration data, and begins a stream.

        Args:
            scores: Scores of known inputs, of the kind and the model that the
                rule was fitted on; those it was fitted on will do.

        Returns:
            The monitor itself.

        Raises:
            ValueError: If the scores are not usable, or fewer than 40. The
                monitor stays as it was.
        """
        reading = read_scores(scores, self.rule.method)
        if reading.fingerprint is not None:
            self.rule.check_head(reading.fingerprint)
        judged = reading.scores.ravel()
        if len(judged) < _MIN_SAMPLES:
            raise ValueError(
                f"A monitor needs at least {_MIN_SAMPLES} calibration scores. "
                f"Received: {len(judged)}. Collect more: with several hundred "
                "it is faster."
            )
        # Bins from some of the data, counts from the others: an edge that is
        # itself counted would make ranks that are not uniform. Edges lie in the
        # gaps between scores: one that many inputs share may come out rounded
        # otherwise in the stream, and all of them would change bins.
        # Sorted before, so that the order in which parts were joined does not
        # matter.
        judged = np.random.default_rng(self.seed).permutation(np.sort(judged))
        placing = int(_PLACING * len(judged))
        quantiles = np.linspace(0.0, 1.0, min(placing, _MAX_EDGES))
        edges = np.unique(
            np.quantile(
                bounds.raised(np.sort(judged[:placing])),
                quantiles,
                method="higher",
            )
        )
        bins = np.searchsorted(edges, judged[placing:])
        counts = np.bincount(bins, minlength=len(edges) + 1).tolist()
        self._state = _State(
            edges=edges.tolist(),
            calibration=counts,
            counts=counts,
            wealth=None,
            evidence=0.0,
            inputs=0,
            rejected=0,
            alarm_at=None,
            low_ranks=0.0,
            labelled=0,
            errors=0,
        )
        return self

    def update(
        self,
        scores: Scores,
        labels: ArrayLike | None = None,
        errors: ArrayLike | None = None,
    ) -> MonitorStatus:
        """Takes new inputs into account.

        In which batches they come makes no difference.

        Args:
            scores: Scores of new inputs, in the order in which they came, as
                `rule.predict` takes them; or what a model of
                `keras_halo.guard` answered.
            labels: Labels of all of them, where they are known. Defaults to
                `None`.
            errors: Booleans instead, true where the prediction is wrong.
                Defaults to `None`.

        Returns:
            `MonitorStatus`.

        Raises:
            ValueError: If the input is not usable or the monitor not fitted;
                the monitor stays as it was.
        """
        state = self._require_fitted()
        if are_answers(scores):
            answers = read_answers(scores)
            check_own(answers, self._certificate)
            reading = Reading(
                answers.scores, answers.labels, self.rule.learned.fingerprint
            )
            accepted = answers.accepted.ravel()
        else:
            reading = self.rule.read(scores)
            accepted = self.rule.accepts_reading(reading).ravel()
        wrong = read_errors(reading, labels, errors)
        judged = reading.scores.ravel()
        # NaN is like no known input.
        judged = np.where(np.isfinite(judged), judged, np.inf)
        bins = np.searchsorted(state.edges, judged)
        uniforms = self._uniforms(state.inputs, len(bins))
        p_values, counts = martingale.smoothed_ranks(
            np.array(state.counts), bins, uniforms
        )
        wealth = np.full(martingale.NUM_BETS, -np.inf)
        if state.wealth is not None:
            wealth = np.array(state.wealth)
        wealth, evidence = martingale.grown(wealth, state.inputs, p_values)
        enough = np.flatnonzero(evidence >= -math.log(self.false_alarm))
        alarm_at = state.alarm_at
        if alarm_at is None and len(enough):
            alarm_at = state.inputs + int(enough[0]) + 1
        labelled, wrong_ones = state.labelled, state.errors
        if wrong is not None:
            labelled += int(accepted.sum())
            wrong_ones += int((wrong.ravel() & accepted).sum())
        self._state = dataclasses.replace(
            state,
            counts=counts.tolist(),
            wealth=wealth.tolist() if len(bins) else state.wealth,
            evidence=float(evidence[-1]) if len(bins) else state.evidence,
            inputs=state.inputs + len(bins),
            rejected=state.rejected + int((~accepted).sum()),
            alarm_at=alarm_at,
            low_ranks=self._low_ranks(bins, uniforms),
            labelled=labelled,
            errors=wrong_ones,
        )
        return self.status

    @property
    def status(self) -> MonitorStatus:
        """`MonitorStatus` of the stream so far."""
        state = self._require_fitted()
        weight = -math.expm1(-state.inputs / _MEMORY)
        low = state.low_ranks / weight if weight else 0.5
        return MonitorStatus(
            inputs=state.inputs,
            rejected=state.rejected,
            evidence=state.evidence / math.log(10.0),
            alarm=state.alarm_at is not None,
            alarm_at=state.alarm_at,
            unknown_share=min(max(1.0 - 2.0 * low, 0.0), 1.0),
            labelled=state.labelled,
            risk=martingale.risk_interval(
                state.errors, state.labelled, self.delta
            ),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves monitor, rule and all that was seen as a JSON file.

        The file is replaced as a whole or not at all.

        Args:
            path: String or path, the file to write.

        Raises:
            ValueError: If the monitor is not fitted.
        """
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "rule": self._certificate,
            "false_alarm": self.false_alarm,
            "delta": self.delta,
            "seed": self.seed,
            "state": self.state,
        }
        storage.write(storage.signed(document), path)

    @property
    def state(self) -> dict[str, Any]:
        """Dictionary that JSON holds, all that was seen, for `restore`."""
        return dataclasses.asdict(self._require_fitted())

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what a monitor of the same rule and seed had seen.

        Args:
            state: Dictionary, the `state` of a monitor, or the entry `"state"`
                of its file.

        Raises:
            ValueError: If it is something else. The monitor stays as it was.
        """
        self._state = _read_state(state)

    def _uniforms(self, start, count):
        """A random number for each input, whatever batch it comes in."""
        bits = np.random.Philox(key=self.seed, counter=start)
        # One block of the generator, of four numbers, for every input.
        return np.random.Generator(bits).random(4 * count)[::4]

    def _low_ranks(self, bins, uniforms):
        """The weighted share of inputs that rank below the calibration."""
        state = self._state
        counts = np.array(state.calibration)
        above = counts[::-1].cumsum()[::-1] - counts
        ranks = above[bins] + uniforms * (counts[bins] + 1.0)
        low = ranks > 0.5 * (counts.sum() + 1.0)
        ages = np.arange(len(bins))[::-1]
        step = -math.expm1(-1.0 / _MEMORY)
        return float(
            state.low_ranks * math.exp(-len(bins) / _MEMORY)
            + step * np.sum(low * np.exp(-ages / _MEMORY))
        )

    def _require_fitted(self):
        if self._state is None:
            raise ValueError(
                "The monitor has not been fitted. Received: no calibration "
                "data. Call `monitor.fit(scores)` with scores of known inputs."
            )
        return self._state


def _read_state(state):
    """The `_State` that a dictionary holds; raises `ValueError`."""
    names = {field.name for field in dataclasses.fields(_State)}
    if not isinstance(state, Mapping) or set(state) != names:
        received = f"state={state!r:.100}"
        if isinstance(state, Mapping):
            received = f"the entries {sorted(map(str, state))}"
        raise ValueError(
            "`state` must be the `state` of a monitor, a dictionary with the "
            f"entries {sorted(names)}. Received: {received}. Pass "
            "`monitor.state`, or use `load_monitor(path)` for a file."
        )
    read = dict(state)
    read["edges"] = finite_vector(state["edges"], "state['edges']").tolist()
    num_bins = len(read["edges"]) + 1
    for name, length in (
        ("calibration", num_bins),
        ("counts", num_bins),
        ("wealth", martingale.NUM_BETS),
    ):
        # There is no wealth before the first input.
        if name == "wealth" and state[name] is None:
            continue
        values = number_array(state[name], f"state[{name!r}]")
        if values.shape != (length,):
            raise ValueError(
                f"`state[{name!r}]` must hold {length} numbers. Received: "
                f"shape={values.shape}. Pass `monitor.state` as it was."
            )
        read[name] = values.tolist()
    for name in ("evidence", "low_ranks"):
        read[name] = as_number(
            state[name], f"state[{name!r}]", lambda _: True, "a number"
        )
    for name in ("inputs", "rejected", "alarm_at", "labelled", "errors"):
        if name != "alarm_at" or state[name] is not None:
            read[name] = as_integer(state[name], f"state[{name!r}]", 0)
    return _State(**read)


def merged_status(monitors: Iterable[StreamMonitor]) -> MonitorStatus:
    """Says what the monitors of several streams have seen together.

    Where a model answers on several machines, each has a stream and a monitor
    of its own: evidence grows along a stream, and two streams have no common
    order. Counts add up. The mean of the evidence of all streams is evidence
    again. There is an alarm where any of the streams has one, whose probability
    is at most the sum of `false_alarm` over the monitors, however the streams
    depend on each other: for one percent in all, each of 8 monitors gets
    `false_alarm=0.01 / 8`. Of which stream it is, `monitor.status` tells.

    Args:
        monitors: List of fitted `StreamMonitor` of one rule and one `delta`.

    Returns:
        `MonitorStatus`. `alarm_at` counts the inputs of the stream whose alarm
        came first in it; `unknown_share` is the mean over the last inputs of
        each stream; `risk` is the interval of all labelled inputs together.

    Raises:
        ValueError: If these are no fitted monitors, or of several rules or
            values of `delta`.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> known = rng.normal(size=500)
    >>> rule = keras_halo.rejection.CoverageRule(method=None).fit(known)
    >>> monitors = [
    ...     keras_halo.rejection.StreamMonitor(rule, 0.005).fit(known)
    ...     for _ in range(2)
    ... ]
    >>> for monitor in monitors:
    ...     status = monitor.update(rng.normal(size=100))
    >>> status = keras_halo.rejection.merged_status(monitors)
    >>> status.inputs, status.alarm
    (200, False)
    """
    monitors = as_list(
        monitors,
        "monitors",
        StreamMonitor,
        "a list of `StreamMonitor`, at least one",
        "`load_monitor(path)` loads one that was saved.",
        least=1,
    )
    rules = {monitor.rule.certificate()["checksum"] for monitor in monitors}
    deltas = {monitor.delta for monitor in monitors}
    if len(rules) > 1 or len(deltas) > 1:
        raise ValueError(
            "Expected the monitors of one rule with one `delta`. Received: "
            f"{len(rules)} rules and delta={sorted(deltas)}. Merge those of "
            "each rule apart."
        )
    states = [monitor.state for monitor in monitors]
    statuses = [monitor.status for monitor in monitors]
    labelled = sum(state["labelled"] for state in states)
    errors = sum(state["errors"] for state in states)
    # The sum of fair games is one, too.
    evidence = np.array([state["evidence"] for state in states])
    evidence = np.logaddexp.reduce(evidence) - math.log(len(evidence))
    weights = [-math.expm1(-s.inputs / _MEMORY) for s in statuses]
    shares = [status.unknown_share for status in statuses]
    weight = sum(weights)
    alarms = [s.alarm_at for s in statuses if s.alarm]
    return MonitorStatus(
        inputs=sum(status.inputs for status in statuses),
        rejected=sum(status.rejected for status in statuses),
        evidence=float(evidence / math.log(10.0)),
        alarm=bool(alarms),
        alarm_at=min(alarms, default=None),
        unknown_share=(
            math.fsum(w * s for w, s in zip(weights, shares, strict=True))
            / weight
            if weight
            else 0.0
        ),
        labelled=labelled,
        risk=martingale.risk_interval(errors, labelled, monitors[0].delta),
    )


def load_monitor(path: str | os.PathLike[str]) -> StreamMonitor:
    """Loads a monitor that `monitor.save(path)` wrote, and goes on.

    Args:
        path: String or path of the file.

    Returns:
        `StreamMonitor`.

    Raises:
        ValueError: If the file is damaged, has been edited, or holds no
            monitor.
        OSError: If there is no such file, or it cannot be read.

    Example:

    >>> import tempfile, os
    >>> known = np.random.default_rng(0).normal(size=100)
    >>> rule = keras_halo.rejection.CoverageRule(method=None).fit(known)
    >>> monitor = keras_halo.rejection.StreamMonitor(rule).fit(known)
    >>> path = os.path.join(tempfile.mkdtemp(), "monitor.json")
    >>> monitor.save(path)
    >>> keras_halo.rejection.load_monitor(path).status.inputs
    0
    """
    document = storage.read(path, _FORMAT, "monitor", "`monitor.save(path)`")
    storage.check_intact(document, path)
    if document.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {document.get('version')!r} of the format; "
            f"this keras_halo reads version {_VERSION}. Install a newer "
            "keras-halo if the file was saved by one."
        )
    rule = storage.restored(document["rule"], path)
    monitor = StreamMonitor(
        rule, document["false_alarm"], document["delta"], document["seed"]
    )
    monitor.restore(document["state"])
    return monitor
