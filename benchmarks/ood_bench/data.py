"""The images of a run: known ones in three parts, and the unknown sets."""

import dataclasses

import keras
import numpy as np
from images import (
    ROTATED,
    as_images,
    corrupted_images,
    read_images,
    rotated_images,
    synthetic_images,
)

MAX_SYNTHETIC = 1000
HELD_OUT = "held-out classes"


def _digits():
    """The 1,797 digits of 8 x 8 pixels that ship with scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = data.images / 16.0 * 255.0, data.target
    return (x[:1300], y[:1300]), (x[1300:], y[1300:])


def _stripes():
    """Gratings of 32 x 32 pixels, a direction and a colour for each class.

    Made, not loaded: for trying out what is meant for CIFAR.
    """
    rng = np.random.default_rng(0)
    y = np.arange(1200) % 10
    rows, columns = np.mgrid[:32, :32] / 32.0
    angles = (y * np.pi / 10)[:, None, None]
    phases = rng.uniform(0, 2 * np.pi, (len(y), 1, 1))
    distance = rows * np.cos(angles) + columns * np.sin(angles)
    waves = 0.5 + 0.4 * np.sin(6 * np.pi * distance + phases)
    colors = rng.uniform(0.4, 1.0, (10, 3))[y]
    x = waves[..., None] * colors[:, None, None]
    x = np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1)
    x = (255 * x).astype("uint8")
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


DATASETS = {
    "fashion_mnist": keras.datasets.fashion_mnist.load_data,
    "mnist": keras.datasets.mnist.load_data,
    "cifar10": keras.datasets.cifar10.load_data,
    "cifar100": keras.datasets.cifar100.load_data,
    "digits": _digits,
    "stripes": _stripes,
}

# How augmentation treats a data set: by how many pixels it shifts, 2 where
# nothing is said, and whether it mirrors.
SHIFTS = {"cifar10": 4, "cifar100": 4, "digits": 1}
MIRRORED = ("fashion_mnist", "cifar10", "cifar100")


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """The known images of a run, each part with its labels.

    Args:
        train: Pair of arrays, what is trained on.
        validation: Pair of arrays, what temperatures are fitted to and
            settings chosen by.
        test: Pair of arrays, what is reported.
        held_out: Array, test images of the classes that were left out.
        num_classes: Integer.
    """

    train: tuple
    validation: tuple
    test: tuple
    held_out: np.ndarray
    num_classes: int


def load(settings, evaluation):
    """Loads the known images; the split is the same for all methods and seeds.

    Raises:
        ValueError: If the classes to hold out are not in the data set, or
            leave fewer than two.
    """
    (x, y), (x_test, y_test) = DATASETS[settings.dataset]()
    y, y_test = y.ravel().astype("int32"), y_test.ravel().astype("int32")
    classes = np.setdiff1d(y, settings.hold_out)
    if np.setdiff1d(settings.hold_out, y).size or len(classes) < 2:
        raise ValueError(
            "`hold_out` must name classes of the data set and leave at least "
            f"two. Received: hold_out={settings.hold_out} for the classes "
            f"{np.unique(y).tolist()}."
        )
    order = np.random.default_rng(0).permutation(
        np.flatnonzero(np.isin(y, classes))
    )
    num_validation = settings.num_validation or len(order) // 10
    known = np.isin(y_test, classes)
    num_test = evaluation.num_test or None

    def pair(images, labels, index):
        return as_images(images[index]), np.searchsorted(classes, labels[index])

    return Images(
        train=pair(x, y, order[num_validation:][: settings.num_train or None]),
        validation=pair(x, y, order[:num_validation]),
        test=pair(x_test, y_test, np.flatnonzero(known)[:num_test]),
        held_out=as_images(x_test[~known][:num_test]),
        num_classes=len(classes),
    )


def unknown_sets(images, evaluation):
    """The unknown images that are reported: dictionary of name to array.

    Raises:
        ValueError: If those of a file have another shape than the known ones.
    """
    x = images.test[0]
    sets = {}
    for extra in evaluation.extra:
        if extra.digest is None:
            unknown = as_images(DATASETS[extra.source]()[1][0])
        else:
            unknown = read_images(extra.source)
        if unknown.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"The images of {extra.source} must have the shape "
                f"{x.shape[1:]} of the known ones. Received: "
                f"{unknown.shape[1:]}."
            )
        sets[extra.name] = unknown[: evaluation.num_test or None]
    if len(images.held_out):
        sets[HELD_OUT] = images.held_out
    return {
        **sets,
        **corrupted_images(x, np.random.default_rng(0)),
        ROTATED: rotated_images(x),
    }


def synthetic_sets(images, reported):
    """Outliers of validation images, to choose settings by.

    Args:
        images: `Images`.
        reported: Names of the unknown sets that are reported, which must not
            be chosen by.
    """
    x = images.validation[0][:MAX_SYNTHETIC]
    sets = synthetic_images(x, np.random.default_rng(0))
    return {name: x for name, x in sets.items() if name not in reported}


class Batches(keras.utils.PyDataset):
    """Training batches whose order and augmentation a seed determines.

    NumPy does both, so that every method and backend sees the same images in
    the same order, provided that `fit` does not shuffle the batches. The
    samples that do not fill a batch change from epoch to epoch and are left
    out.
    """

    def __init__(self, x, y, batch_size, seed, shift, mirror):
        super().__init__()
        self.x, self.y = x, y
        self.batch_size, self.seed = batch_size, seed
        self.shift, self.mirror = shift, mirror
        self.start(0)

    def start(self, epoch):
        """Goes to the beginning of an epoch."""
        self.epoch = epoch
        rng = np.random.default_rng((self.seed, epoch))
        self.order = rng.permutation(len(self.x))

    @property
    def num_batches(self):
        return len(self.x) // self.batch_size

    def on_epoch_end(self):
        self.start(self.epoch + 1)

    def __getitem__(self, index):
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        rows = self.order[rows]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        x = self.x[rows]
        if self.shift:
            x = _shifted(x, self.shift, rng)
        if self.mirror:
            mirrored = rng.random((len(x), 1, 1, 1)) < 0.5
            x = np.where(mirrored, x[:, :, ::-1], x)
        return x, self.y[rows]


def _shifted(images, shift, rng):
    """Images moved by up to `shift` pixels, black where they left."""
    n, height, width, _ = images.shape
    edges = ((0, 0), (shift, shift), (shift, shift), (0, 0))
    padded = np.pad(images, edges)
    top, left = rng.integers(0, 2 * shift + 1, (2, n, 1, 1))
    rows = top + np.arange(height)[:, None]
    columns = left + np.arange(width)
    return padded[np.arange(n)[:, None, None], rows, columns]


def training_batches(settings, images):
    augment = settings.augment
    return Batches(
        *images.train,
        batch_size=settings.batch_size,
        seed=settings.seed,
        shift=SHIFTS.get(settings.dataset, 2) if augment else 0,
        mirror=augment and settings.dataset in MIRRORED,
    )
