"""A process that logs decisions until it is killed in the middle of a line.

    python logging_process.py LOG RULE BYTES

The system kills it with a signal once the file would exceed so many bytes,
after it has written what still fits. Each number on the output is that of a
decision for which `append` has returned.
"""

import resource
import signal
import sys

from keras_halo import rejection


def main(path, rule_path, limit):
    rule = rejection.load_rule(rule_path)
    # Python ignores this signal, and would raise an error.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    with rejection.DecisionLog(path, rule) as log:
        while True:
            numbers = log.append(rule.predict([1.0, 250.0]))
            print(numbers[-1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
