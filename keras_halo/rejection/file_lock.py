"""A lock on a file that only one holder has, and that ends with its process."""

import contextlib
import os

# The one is of Unix, the other of Windows; a browser has neither.
try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None
try:
    import msvcrt
except ModuleNotFoundError:
    msvcrt = None


@contextlib.contextmanager
def locked(path):
    """Holds a lock, or says that somebody else does.

    The file stays where it is, empty: to remove it would let two have it. Where
    the platform has no such locks, as in a browser, there is none.

    Args:
        path: String, the file to lock; it is made where there is none.

    Raises:
        ValueError: If another holder has it, in this process or in another.
        OSError: If the file cannot be made.

    Example:

    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "a.lock")
    >>> with locked(path):
    ...     with locked(path):
    ...         pass
    Traceback (most recent call last):
        ...
    ValueError: The log is in use: ...
    """
    with open(path, "ab") as file:
        try:
            _lock(file)
        except BlockingIOError as error:
            raise ValueError(
                "The log is in use: expected to be alone with it. Received: "
                f"{path} is held by another `DecisionLog`. Close that one, or "
                "give every process a log of its own."
            ) from error
        process = os.getpid()
        try:
            yield
        finally:
            # A forked process has the same file open. It must not end the
            # lock, and to close the file here would not while it lives.
            if process == os.getpid() and fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_UN)


def _lock(file):
    """Raises `BlockingIOError` where the lock is taken."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
