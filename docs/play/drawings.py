"""Drawings as the digits of scikit-learn show them, and scribbles.

`play.js` prepares what a visitor draws in the same way: the drawing is scaled
into a box of 6 x 8 pixels, stretched a little where it is narrow or flat, and
drawn with a pen of fixed width in the middle of 8 x 8.
"""

import numpy as np
from PIL import Image, ImageDraw

SIZE = 8
# What most digits of scikit-learn fill: all rows, and six columns.
BOX = np.array([6.0, 8.0])
# Pen width in pixels, about that of these digits.
PEN = 1.5
# By how much one axis may be scaled more than the other.
STRETCH = 1.3
# Below this share of the box, a side is not blown up.
SMALLEST = 0.08
# Drawn larger and averaged, which smooths the edges.
_FINE = 16


def to_image(strokes):
    """An image of strokes.

    Args:
        strokes: List of arrays of shape `(points, 2)`, x to the right and y
            downwards, in shares of the box that they are drawn in.

    Returns:
        Array of shape `(8, 8)`, values in [0, 1].
    """
    strokes = [np.asarray(stroke, "float64") for stroke in strokes]
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (BOX - PEN) / np.maximum(high - low, SMALLEST)
    scale = np.minimum(scale, STRETCH * scale.min())
    canvas = Image.new("L", (SIZE * _FINE, SIZE * _FINE))
    pen = ImageDraw.Draw(canvas)
    radius = PEN * _FINE / 2
    for stroke in strokes:
        stroke = (stroke - (low + high) / 2) * scale + SIZE / 2
        stroke = [tuple(point) for point in stroke * _FINE]
        if len(stroke) > 1:
            pen.line(stroke, fill=255, width=round(2 * radius), joint="curve")
        for x, y in (stroke[0], stroke[-1]):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    image = np.asarray(canvas, "float32") / 255.0
    return image.reshape(SIZE, _FINE, SIZE, _FINE).mean(axis=(1, 3))


def scribble(rng):
    """The strokes of a random scribble.

    One to four strokes, each a polyline or a smooth curve through random
    points, or loops of a circle that changes its size.
    """
    strokes = []
    for _ in range(rng.integers(1, 5)):
        kind = rng.integers(3)
        steps = np.linspace(0.0, 1.0, 120)
        if kind == 2:
            turns = 2 * np.pi * steps * rng.uniform(1.5, 5)
            radii = rng.uniform(0.1, 1) + rng.uniform(-1, 1) * steps
            curve = np.stack(
                [np.cos(turns) * radii, np.sin(turns) * radii], axis=-1
            )
            strokes.append(curve + rng.uniform(-0.7, 0.7, 2))
            continue
        corners = rng.uniform(-1, 1, (rng.integers(2, 10), 2))
        places = np.linspace(0.0, 1.0, len(corners))
        curve = np.stack(
            [np.interp(steps, places, axis) for axis in corners.T], axis=-1
        )
        if kind == 1:
            window = np.ones(15) / 15
            padded = np.pad(curve, ((7, 7), (0, 0)), mode="edge")
            curve = np.stack(
                [np.convolve(axis, window, "valid") for axis in padded.T],
                axis=-1,
            )
        strokes.append(curve)
    return strokes


def scribbles(count, rng):
    """Images of random scribbles, an array of shape `(count, 8, 8)`."""
    return np.stack([to_image(scribble(rng)) for _ in range(count)])
