"""How embeddings become points of a plane, and shells circles."""

import numpy as np

from keras_halo.ops import geometry
from keras_halo.utils.checks import as_integer, as_number


def shell_radius(embedding_dim: int, mass: float = 0.95) -> float:
    """Returns the radius that holds a share of a projected shell.

    The shell of a class is a sphere around its centroid in `D` dimensions.
    Projected onto a plane it is no circle but a filled disc, dense in the
    middle: the radius of the sphere itself, `sqrt(D * shell)`, is that of its
    outline, and in high dimensions nearly all of the shell falls far inside.
    The circle that tells where to look for the members of a class is the one
    that holds most of the disc's mass.

    Formula:

    ```python
    outline = sqrt(D * (1 - 2 / D)) = sqrt(D - 2)
    radius = outline * sqrt(1 - (1 - mass) ** (2 / (D - 2)))
    ```

    The second line inverts the distribution function of the distance to the
    centre of a uniform point on the sphere after projection onto a plane. It
    approaches `sqrt(-2 log(1 - mass))`, that of a Gaussian, from below as `D`
    grows.

    Args:
        embedding_dim: Integer, at least 2. The size `D` of an embedding.
        mass: Float in `(0, 1]`, the share of the shell inside of the circle;
            `1` gives the outline. Defaults to `0.95`.

    Returns:
        Float, in the units of the embedding's components. Zero for `D = 2`,
        where the density of a class is largest on the centroid itself.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> round(shell_radius(10), 3), round(shell_radius(10, mass=1.0), 3)
    (2.054, 2.828)
    """
    embedding_dim = as_integer(embedding_dim, "embedding_dim", 2)
    mass = as_number(
        mass,
        "mass",
        lambda share: 0.0 < share <= 1.0,
        "in (0, 1], the share of a shell inside of its circle",
    )
    if embedding_dim == 2:
        return 0.0
    outline = np.sqrt(embedding_dim * geometry.shell(embedding_dim))
    outside = (1.0 - mass) ** (2.0 / (embedding_dim - 2))
    return float(outline * np.sqrt(1.0 - outside))


def principal_plane(vectors, embeddings):
    """Finds the plane in which vectors vary most.

    The plane passes through the origin: multiplying by the columns projects
    orthogonally and leaves the origin where it is.

    Args:
        vectors: Array of shape `(M, D)`, `D >= 2`.
        embeddings: Array of shape `(N, D)`, which choose what is left of the
            plane where `vectors` span less.

    Returns:
        Array of shape `(D, 2)` with orthonormal columns, the coordinate axes
        for `D = 2`; and array of shape `(2,)`, the share of the variance of
        `vectors` along each, zero if they have none.

    Example:

    >>> plane, shares = principal_plane(
    ...     np.array([[3.0, 0, 1], [-3.0, 0, 1]]),
    ...     np.array([[0, 3.0, 4], [0, -3.0, -4]]),
    ... )
    >>> abs(plane).round(2).tolist(), shares.round(2).tolist()
    ([[1.0, 0.0], [0.0, 0.6], [0.0, 0.8]], [1.0, 0.0])
    """
    embedding_dim = vectors.shape[-1]
    variance = np.cov(vectors, rowvar=False, bias=True)
    if embedding_dim == 2:
        # A rotation would only hide which component is which.
        plane = np.eye(2)
    else:
        plane = _leading_directions(vectors)
        if plane.shape[1] < 2:
            # Two centroids span a line: the embeddings choose the rest.
            rest = embeddings - (embeddings @ plane) @ plane.T
            plane = np.hstack([plane, _leading_directions(rest)])[:, :2]
        if plane.shape[1] < 2:
            plane = np.linalg.qr(np.hstack([plane, np.eye(embedding_dim)]))[0]
            plane = plane[:, :2]
    total = np.trace(variance)
    along = np.einsum("ij,ik,kj->j", plane, variance, plane)
    # Rounding may leave a zero slightly negative.
    along = np.maximum(along, 0.0)
    return plane, along / total if total else np.zeros(2)


def _leading_directions(vectors):
    """At most two principal directions, fewer if the vectors span fewer."""
    deviations = vectors - vectors.mean(axis=0)
    _, sizes, directions = np.linalg.svd(deviations, full_matrices=False)
    rank = int((sizes > 1e-9 * max(sizes[0], np.abs(vectors).max())).sum())
    directions = directions[: min(rank, 2)].T
    # The sign of a direction is arbitrary: choose the one that repeats.
    largest = np.abs(directions).argmax(axis=0)
    signs = np.sign(directions[largest, np.arange(directions.shape[1])])
    return directions * signs
