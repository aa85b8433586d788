"""Drawings as MNIST shows them: strokes to images, and scribbles.

`play.js` prepares what a visitor draws in the same way: the drawing is scaled
into a box of 20 x 20 pixels, drawn with a pen of fixed width, and its centre of
mass is put in the middle of 28 x 28.
"""

import numpy as np
from PIL import Image, ImageDraw

SIZE = 28
BOX = 20
# Pen width in pixels of the 28 x 28 image, about that of MNIST.
PEN = 2.2
# Drawn larger and averaged, which smooths the edges.
_FINE = 8


def to_image(strokes):
    """An image of strokes.

    Args:
        strokes: List of arrays of shape `(points, 2)`, x to the right and y
            downwards, in any unit.

    Returns:
        Array of shape `(28, 28)`, values in [0, 1].
    """
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (BOX - PEN) / max((high - low).max(), 1e-6)
    canvas = Image.new("L", (SIZE * _FINE, SIZE * _FINE))
    pen = ImageDraw.Draw(canvas)
    radius = PEN * _FINE / 2
    for stroke in strokes:
        stroke = (stroke - (low + high) / 2) * scale + SIZE / 2
        stroke = [tuple(point) for point in stroke * _FINE]
        pen.line(stroke, fill=255, width=round(2 * radius), joint="curve")
        for x, y in (stroke[0], stroke[-1]):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    image = np.asarray(canvas, "float32") / 255.0
    image = image.reshape(SIZE, _FINE, SIZE, _FINE).mean(axis=(1, 3))
    return centered(image)


def centered(image):
    """Shifts an image so that its centre of mass is in the middle."""
    mass = image.sum()
    if mass == 0:
        return image
    rows, columns = np.indices(image.shape) + 0.5
    down = round(float(SIZE / 2 - (rows * image).sum() / mass))
    right = round(float(SIZE / 2 - (columns * image).sum() / mass))
    shifted = np.zeros_like(image)
    source = image[
        max(-down, 0) : SIZE - max(down, 0),
        max(-right, 0) : SIZE - max(right, 0),
    ]
    top, left = max(down, 0), max(right, 0)
    height, width = source.shape
    shifted[top : top + height, left : left + width] = source
    return shifted


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
    """Images of random scribbles, an array of shape `(count, 28, 28)`."""
    return np.stack([to_image(scribble(rng)) for _ in range(count)])
