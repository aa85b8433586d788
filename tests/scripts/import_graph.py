"""Counts the parts of the package and the imports between them.

    python tests/scripts/import_graph.py [path of keras_halo]

A part is a folder, or a module that lies loose at the root. An import inside a
function counts too: it is a dependency, whenever it is resolved. What only the
type checker imports does not.
"""

import ast
import graphlib
import pathlib
import sys

# From the bottom up. A part may import what stands before it.
ORDER = [
    "version",
    "utils",
    "ops",
    "layers",
    "losses",
    "metrics",
    "plots",
    "rejection",
    "workflows",
    "callbacks",
    "__init__",
    "__main__",
]


def part_of(path, root):
    """Name of the part that a module belongs to."""
    relative = path.relative_to(root)
    return relative.parts[0] if len(relative.parts) > 1 else path.stem


def imported_parts(path, root):
    """Names of the parts that a module imports."""
    parts = {p.stem if p.is_file() else p.name for p in root.iterdir()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == root.name:
                first = rest.partition(".")[0]
                found.add(first if first in parts else "__init__")
    return found


def import_graph(root):
    """Dictionary from each part to the set of those that it imports."""
    graph = {}
    for path in sorted(root.rglob("*.py")):
        part = part_of(path, root)
        graph.setdefault(part, set()).update(imported_parts(path, root))
    return {part: found - {part} for part, found in graph.items()}


def levels(graph):
    """Dictionary from each part to its level; raises `CycleError`."""
    found = {}
    for part in graphlib.TopologicalSorter(graph).static_order():
        below = [found[other] for other in graph.get(part, ())]
        found[part] = 1 + max(below, default=0)
    return found


def main(root):
    graph = import_graph(root)
    level = levels(graph)
    for part in sorted(graph, key=lambda part: (level[part], part)):
        below = ", ".join(sorted(graph[part])) or "nothing"
        print(f"{level[part]}  {part:<10}  imports {below}")
    edges = sum(len(found) for found in graph.values())
    print(f"{len(graph)} parts, {max(level.values())} levels, {edges} imports")


if __name__ == "__main__":
    main(pathlib.Path(*(sys.argv[1:] or ["keras_halo"])).resolve())
