"""Finished runs as files: each is there as a whole, or not at all.

A file is written under another name, forced to disk and then renamed. It also
holds a digest of its contents, so that what was cut short or damaged by other
means is recognized too and never read as a result.
"""

import hashlib
import json
import os
import zipfile
import zlib

import numpy as np

_RECORD, _DIGEST = "record", "digest"

# What reading a file may raise that is damaged, wherever the damage is.
_DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def save(path, record, arrays):
    """Writes a record (plain data) and named arrays into one npz file."""
    contents = {name: np.asarray(array) for name, array in arrays.items()}
    contents[_RECORD] = np.array(json.dumps(record))
    contents[_DIGEST] = np.array(_digest(contents))
    # Two processes may make the same file at a time.
    partial = f"{path}.{os.getpid()}.part"
    with open(partial, "wb") as file:
        np.savez_compressed(file, **contents)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path):
    """Returns record and arrays, or `None` if the file is not a whole one."""
    try:
        with np.load(path) as file:
            contents = dict(file)
        digest = str(contents.pop(_DIGEST))
        if digest != _digest(contents):
            raise ValueError("its contents are not those of its digest")
        return json.loads(str(contents.pop(_RECORD))), contents
    except FileNotFoundError:
        return None
    except _DAMAGED:
        print(f"{path} is not a whole result and will be made anew")
        return None


def _digest(contents):
    digest = hashlib.sha256()
    for name in sorted(contents):
        array = np.ascontiguousarray(contents[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
