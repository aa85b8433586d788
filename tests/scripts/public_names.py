"""Prints every public name of the package with its meaning, for the docs.

    python tests/scripts/public_names.py

The table stands in `docs/api/index.md`; a test compares.
"""

import inspect

import keras_halo

# The package itself, and its public parts.
MODULES = (
    "",
    *(
        name
        for name in sorted(keras_halo.__all__)
        if inspect.ismodule(getattr(keras_halo, name))
    ),
)

# What constants hold, which have no docstring.
CONSTANTS = {
    "OOD_METHODS": "The names of the scores that `ood_score` computes."
}


def public_names():
    """Pairs of a dotted name and the first line of its docstring."""
    for module_name in MODULES:
        module = getattr(keras_halo, module_name) if module_name else keras_halo
        for name in sorted(module.__all__, key=str.lower):
            thing = getattr(module, name)
            if inspect.ismodule(thing) and not module_name:
                continue
            # What is also at the top level is told there.
            if module_name and getattr(keras_halo, name, None) is thing:
                continue
            if name.startswith("__"):
                continue
            if callable(thing) or inspect.ismodule(thing):
                meaning = inspect.getdoc(thing).splitlines()[0]
            else:
                meaning = CONSTANTS[name]
            dotted = ".".join(part for part in (module_name, name) if part)
            yield dotted, meaning


def table():
    """Markdown of one line a name."""
    lines = ["| name | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {text} |" for name, text in public_names()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
