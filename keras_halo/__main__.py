"""`python -m keras_halo`: a report, or a guarded model, without Python code."""

import sys

from keras_halo.workflows.command_line import main

if __name__ == "__main__":
    sys.exit(main())
