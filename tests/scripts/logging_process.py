"""A process that logs decisions until it is killed in the middle of a line.

    python logging_process.py LOG RULE BYTES

The system kills it with a signal once the file would exceed so many bytes,
after it has written what still fits. Each number on the output is that of a
decision for which `append` has returned. Before that, a forked process tries to
write to the log, and to open it.
"""

import os
import resource
import signal
import sys

from keras_halo import rejection


def refusals(log, path, rule):
    """How many of two attempts of another process are refused."""
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status)
    count = 0
    for attempt in (
        lambda: log.append(rule.predict([1.0])),
        lambda: rejection.DecisionLog(path, rule),
    ):
        try:
            attempt()
        except ValueError:
            count += 1
    os._exit(count)


def main(path, rule_path, limit):
    rule = rejection.load_rule(rule_path)
    # Python ignores this signal, and would raise an error.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    with rejection.DecisionLog(path, rule) as log:
        print(refusals(log, path, rule), flush=True)
        while True:
            numbers = log.append(rule.predict([1.0, 250.0]))
            print(numbers[-1], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
