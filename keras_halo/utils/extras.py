"""Modules that only the extra `tools` brings, imported when first needed."""

import importlib

_LIBRARIES = {
    "matplotlib": "matplotlib",
    "scipy": "SciPy",
    "sklearn": "scikit-learn",
}


def require(module):
    """Imports a module of scikit-learn, SciPy or matplotlib.

    Args:
        module: String, the dotted name of the module.

    Returns:
        The module.

    Raises:
        ImportError: If the library is missing, with the command that installs
            it.

    Example:

    >>> require("scipy.stats").__name__
    'scipy.stats'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = _LIBRARIES[module.split(".")[0]]
        raise ImportError(
            f"This part of keras_halo needs {library}, which cannot be "
            'imported. Run `pip install "keras-halo[tools]"`.'
        ) from error
