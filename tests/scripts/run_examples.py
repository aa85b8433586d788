"""Runs the examples that need data from a file.

    export KERAS_HALO_DATA=FOLDER
    python tests/scripts/run_examples.py OUTPUT [NAME ...]

Every script of `examples/` that names a `DATA_FILE`, or `DATA_FILES`, runs in
the folder OUTPUT, as it is. It is skipped, with the reason, where the variable
is not set or its folder holds no such file. An error, or no picture at the end,
is a failure.
"""

import argparse
import ast
import os
import pathlib
import subprocess
import sys
import time

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
VARIABLE = "KERAS_HALO_DATA"


def data_files(path):
    """Names of the files that an example needs, read from its source."""
    for node in ast.parse(path.read_text("utf-8")).body:
        match node:
            case ast.Assign([ast.Name("DATA_FILE")], value):
                return (ast.literal_eval(value),)
            case ast.Assign([ast.Name("DATA_FILES")], value):
                return tuple(ast.literal_eval(value))
    return ()


def data_folder():
    """The folder of the variable, absolute, or `None` where it is not set."""
    place = os.environ.get(VARIABLE)
    if not place:
        return None
    folder = pathlib.Path(place).resolve()
    if not folder.is_dir():
        sys.exit(f"{VARIABLE} must be a folder. Received: {place}")
    # Examples run elsewhere.
    os.environ[VARIABLE] = str(folder)
    return folder


def reason_to_skip(path, folder):
    """Why the data of an example are missing, or `None` where they are not."""
    files = data_files(path)
    if not files:
        return None
    if folder is None:
        return f"{VARIABLE} is not set"
    missing = [name for name in files if not any(folder.rglob(name))]
    return f"{folder} holds no {', '.join(missing)}" if missing else None


def run(path, output):
    """Runs one example; returns what is wrong, or `None`."""
    picture = output / f"{path.stem}.png"
    picture.unlink(missing_ok=True)
    status = subprocess.run([sys.executable, path], cwd=output).returncode
    if status:
        return f"exit status {status}"
    return None if picture.exists() else f"{picture.name} was not saved"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=pathlib.Path, help="folder of pictures")
    parser.add_argument("names", nargs="*", help="examples, default all")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(EXAMPLES.glob("*.py")) if data_files(path)]
    if arguments.names:
        paths = [EXAMPLES / f"{name}.py" for name in arguments.names]
    folder = data_folder()
    lines, failed = [], 0
    for path in paths:
        start = time.monotonic()
        reason, problem = reason_to_skip(path, folder), None
        if reason:
            result = f"skipped: {reason}"
        else:
            print(f"--- {path.stem}", flush=True)
            problem = run(path, arguments.output)
            seconds = time.monotonic() - start
            result = f"{problem or 'ok'} ({seconds:.0f} s)"
        failed += bool(problem)
        lines.append(f"{path.stem}: {result}")
    print("---", *lines, sep="\n", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(paths)} examples failed.")


if __name__ == "__main__":
    main()
