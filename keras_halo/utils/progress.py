import sys
import time

import keras

from keras_halo.utils.checks import check_verbose
from keras_halo.utils.keras_private import print_message


class Progress:
    """Tells how far an evaluation of several data sets has come.

    Args:
        verbose: 0 for silence; 1 for a bar for each set; 2 for a line for each
            set; `"auto"` for 1. Where the output is no terminal, 1 becomes 2: a
            bar would fill a log with control characters.
        num_sets: Integer, the number of data sets.

    Raises:
        ValueError: If `verbose` is something else.

    Example:

    >>> progress = Progress(2, num_sets=1)
    >>> progress.start("noise", num_batches=None)
    >>> progress.finish(count=100)
    1/1 noise: 100 samples - 0s
    """

    def __init__(self, verbose, num_sets):
        verbose = check_verbose(verbose)
        if verbose in (1, "auto"):
            is_terminal = getattr(sys.stdout, "isatty", lambda: False)()
            verbose = 1 if is_terminal else 2
        self._verbose = verbose
        self._num_sets = num_sets
        self._index = 0
        self._bar = None

    def start(self, name, num_batches):
        self._index += 1
        self._title = f"{self._index}/{self._num_sets} {name}"
        self._began = time.monotonic()
        if self._verbose == 1:
            print_message(self._title)
            self._bar = keras.utils.Progbar(num_batches)

    def step(self):
        if self._bar is not None:
            self._bar.add(1)

    def finish(self, count):
        if self._bar is not None and self._bar.target is None:
            # A bar without a target does not end its line by itself.
            print_message("")
        if self._verbose == 2:
            seconds = time.monotonic() - self._began
            print_message(f"{self._title}: {count:,} samples - {seconds:.0f}s")
