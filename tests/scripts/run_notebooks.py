"""Makes notebooks of the examples and executes them.

    python tests/scripts/run_notebooks.py FOLDER [NAME ...]
    python tests/scripts/run_notebooks.py FOLDER --convert-only

Every script of `examples/`, or those named, becomes a notebook in FOLDER and
is executed there. An error in a cell, or no picture at the end, is a failure.
Examples that name a backend at the end are executed on that one alone. Those
whose data are not in the folder `KERAS_HALO_DATA` are skipped, with the reason.
"""

import argparse
import ast
import os
import pathlib
import sys
import time

import jupytext
from run_examples import EXAMPLES, data_folder, reason_to_skip

BACKENDS = ("jax", "tensorflow", "torch")


def to_percent(source):
    """Turns text in triple quotes into Markdown cells, the rest into code."""
    lines = source.splitlines()
    cells, end = [], 0
    for index, node in enumerate(ast.parse(source).body):
        if not is_text(node):
            continue
        cells.append(code_cell(lines[end : node.lineno - 1]))
        text = node.value.value.strip("\n")
        cells.append(markdown_cell(header(text) if index == 0 else text))
        end = node.end_lineno
    cells.append(code_cell(lines[end:]))
    return "\n\n".join(cell for cell in cells if cell) + "\n"


def is_text(node):
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def header(text):
    """The title as a heading, the other fields as a list."""
    title, *fields = text.splitlines()
    title = title.removeprefix("Title:").strip()
    return "\n".join([f"# {title}", "", *(f"- {field}" for field in fields)])


def code_cell(lines):
    code = "\n".join(lines).strip("\n")
    return f"# %%\n{code}" if code else None


def markdown_cell(text):
    lines = (f"# {line}".rstrip() for line in text.splitlines())
    return "\n".join(["# %% [markdown]", *lines])


def convert(path):
    notebook = jupytext.reads(to_percent(path.read_text("utf-8")), "py:percent")
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    return notebook


def execute(notebook, folder):
    from nbclient import NotebookClient

    # The kernel of notebooks draws below the cell only if nobody else does.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    client = NotebookClient(
        notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()


def is_for_another_backend(path):
    backend = path.stem.rpartition("_")[2]
    return backend in BACKENDS and backend != os.environ.get("KERAS_BACKEND")


def has_picture(notebook):
    return any(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("names", nargs="*", help="examples, default all")
    parser.add_argument("--convert-only", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(EXAMPLES.glob("*.py"))
    if arguments.names:
        paths = [EXAMPLES / f"{name}.py" for name in arguments.names]
    if not arguments.convert_only:
        paths = [path for path in paths if not is_for_another_backend(path)]
    if not paths:
        sys.exit(f"No example in {EXAMPLES}.")
    folder = data_folder()
    failed, skipped = [], 0
    for path in paths:
        notebook = convert(path)
        problem, start = None, time.monotonic()
        reason = reason_to_skip(path, folder)
        if not arguments.convert_only and not reason:
            pictures = arguments.folder / f"{path.stem}.png"
            pictures.unlink(missing_ok=True)
            try:
                execute(notebook, arguments.folder)
            # Whatever it was, the other notebooks are still worth a run.
            except Exception as error:
                problem = str(error)
            else:
                if not has_picture(notebook):
                    problem = "no picture in the notebook"
                elif not pictures.exists():
                    problem = f"{pictures.name} was not saved"
        jupytext.write(notebook, arguments.folder / f"{path.stem}.ipynb")
        seconds = time.monotonic() - start
        result = f"{problem or 'ok'} ({seconds:.0f} s)"
        if reason and not arguments.convert_only:
            result = f"skipped: {reason}"
            skipped += 1
        print(f"{path.stem}: {result}", flush=True)
        if problem:
            failed.append(path.stem)
    passed = len(paths) - len(failed) - skipped
    print(f"{passed} of {len(paths)} notebooks passed, {skipped} skipped.")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
