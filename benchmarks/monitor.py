"""False alarms and delays of the stream monitor, on simulated streams.

Scores of known inputs are normal; unknown ones are shifted by as much as gives
the detector an AUROC of 95 %. Prints a Markdown table: in how many streams of
known inputs there was an alarm, and after how many inputs there was one once
every fifth input was unknown. Needs `keras-halo[tools]`.

    python benchmarks/monitor.py --streams 100 --length 1000000
"""

import argparse
import math
import sys

import numpy as np
from scipy import stats

from keras_halo.rejection import CoverageRule, StreamMonitor

SHIFT = stats.norm.ppf(0.95) * math.sqrt(2.0)
SHARE = 0.2
KINDS = {
    "continuous": lambda scores: scores,
    "ties": lambda scores: np.round(2.0 * scores),
}


def fitted(rng, calibration, kind, seed, false_alarm):
    known = KINDS[kind](rng.normal(size=calibration))
    rule = CoverageRule(0.95, method=None).fit(known)
    return StreamMonitor(rule, false_alarm, seed=seed).fit(known)


def has_false_alarm(seed, calibration, kind, length, false_alarm):
    rng = np.random.default_rng([seed, 1])
    monitor = fitted(rng, calibration, kind, seed, false_alarm)
    left = length
    while left and not monitor.status.alarm:
        size = min(left, 20_000)
        monitor.update(KINDS[kind](rng.normal(size=size)))
        left -= size
    return monitor.status.alarm


def delay(seed, calibration, kind, latest, false_alarm):
    """Inputs until the alarm, after a change at a random time."""
    rng = np.random.default_rng([seed, 2])
    monitor = fitted(rng, calibration, kind, seed, false_alarm)
    change = int(rng.integers(0, latest + 1))
    scores = rng.normal(size=change + 4000)
    unknown = rng.random(len(scores)) < SHARE
    unknown[:change] = False
    status = monitor.update(KINDS[kind](scores + SHIFT * unknown))
    if not status.alarm:
        return math.inf
    return status.alarm_at - change


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--length", type=int, default=100_000)
    parser.add_argument("--false-alarm", type=float, default=0.01)
    parser.add_argument(
        "--calibration",
        type=int,
        nargs="+",
        default=[500, 2000, 10_000],
        help="numbers of calibration scores, default 500 2000 10000",
    )
    args = parser.parse_args()
    level = args.false_alarm
    print(
        f"| calibration | scores | false alarms in {args.streams} streams of "
        f"{args.length:,} | median delay, from the first input | change at a "
        f"random time up to {args.length:,} |\n|---|---|---|---|---|"
    )
    for calibration in args.calibration:
        for kind in KINDS:
            alarms, at_once, later = 0, [], []
            for seed in range(args.streams):
                print(
                    f"\r{calibration} {kind} {seed + 1}/{args.streams}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
                common = (seed, calibration, kind)
                alarms += has_false_alarm(*common, args.length, level)
                at_once.append(delay(*common, 0, level))
                later.append(delay(*common, args.length, level))
            print("\r", end="", file=sys.stderr)
            print(
                f"| {calibration:,} | {kind} | {alarms} | "
                f"{np.median(at_once):.0f} | {np.median(later):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
