"""Images of no known class, made of known ones and of noise."""

import keras
import numpy as np

ROTATED = "rotated by 90"


def as_images(array):
    """Bytes of shape `(N, H, W)` or `(N, H, W, C)` as floats in [0, 1]."""
    images = (array / 255.0).astype("float32")
    return images[..., None] if images.ndim == 3 else images


def read_images(path):
    """Images of an npz file: its array `x_test`, as Keras names it, or `x`."""
    with np.load(path) as file:
        key = "x_test" if "x_test" in file else "x"
        if key not in file:
            raise ValueError(
                f"{path} must hold an array 'x' or 'x_test'. Received: "
                f"{sorted(file)}."
            )
        return as_images(file[key])


def rotated_images(images):
    return np.rot90(images, axes=(1, 2))


def corrupted_images(images, rng):
    """Noise, and images changed so that they show none of their classes."""
    shape = images.shape
    pixels = images.reshape(len(images), -1, shape[-1])
    order = rng.permuted(
        np.tile(np.arange(pixels.shape[1]), (len(images), 1)), axis=1
    )
    sets = {
        "Gaussian noise": np.clip(rng.normal(0.5, 0.5, shape), 0, 1),
        "uniform noise": rng.random(shape),
        "shuffled pixels": np.take_along_axis(
            pixels, order[..., None], axis=1
        ).reshape(shape),
        "inverted": 1.0 - images,
        "flipped": images[:, ::-1],
    }
    return {name: x.astype("float32") for name, x in sets.items()}


def synthetic_images(images, rng):
    """Outliers to choose settings by: none of those that are reported."""
    n, size, channels = len(images), images.shape[1], images.shape[-1]
    half = size // 2
    other = images[rng.permutation(n)]

    def smooth(resolution):
        shape = (n, resolution, resolution, channels)
        noise = rng.random(shape).astype("float32")
        resized = keras.ops.image.resize(noise, (size, size))
        return keras.ops.convert_to_numpy(resized)

    rectangles = np.zeros_like(images)
    for image in rectangles:
        for _ in range(rng.integers(1, 5)):
            top, left = rng.integers(0, size * 11 // 14, 2)
            height, width = rng.integers(2, size * 5 // 7, 2)
            image[top : top + height, left : left + width] = rng.random()
    grey = np.ones_like(images) * rng.random((n, 1, 1, 1))
    return {
        "smooth noise 4": smooth(4),
        "smooth noise 8": smooth(8),
        "one grey": grey.astype("float32"),
        "rectangles": rectangles,
        ROTATED: rotated_images(images),
        "mean of two": (images + other) / 2,
        "two halves": np.concatenate(
            [images[:, :, :half], other[:, :, half:]], axis=2
        ),
        "quadrants": np.roll(images, (half, half), axis=(1, 2)),
    }
