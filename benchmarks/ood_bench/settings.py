"""What makes one run different from another, and the name that follows."""

import dataclasses
import hashlib
import json


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a trained network depends on.

    Args:
        dataset: String, a key of `data.DATASETS`.
        network: String, a key of `networks.NETWORKS`.
        method: String, a key of `methods.METHODS`.
        seed: Integer, of weights, order of samples and augmentation.
        epochs: Integer.
        batch_size: Integer.
        optimizer: String, a key of `runs.OPTIMIZERS`.
        learning_rate: Float, the first of a cosine schedule that ends in 0;
            a method that trains in phases has one for each.
        num_train: Integer, how many training images; 0 for all of them.
        num_validation: Integer, how many of the training images are kept for
            validation; 0 for a tenth.
        hold_out: Tuple of integers, classes that are left out of training.
        augment: Boolean, whether images are shifted and mirrored.
        backend: String, the backend of Keras.
        version: Integer, raised whenever the code trains otherwise.
    """

    dataset: str
    network: str
    method: str
    seed: int
    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    num_train: int
    num_validation: int
    hold_out: tuple
    augment: bool
    backend: str
    version: int = 3

    @property
    def title(self):
        return f"{self.method}, {self.network}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything that the figures of a trained network depend on.

    Args:
        num_test: Integer, how many test images; 0 for all of them.
        extra: Tuple of `UnknownImages`, further ones.
        version: Integer, raised whenever the code evaluates otherwise.
    """

    num_test: int
    extra: tuple
    version: int = 2


@dataclasses.dataclass(frozen=True)
class UnknownImages:
    """Images of unknown classes that the user names.

    Args:
        name: String, how the tables call them.
        source: String, a key of `data.DATASETS` or the path of an npz file.
        digest: String, that of the file, which may move; `None` for a data
            set.
    """

    name: str
    source: str
    digest: str | None = None


def name_of(settings, *more):
    """A file name that differs whenever one of these dataclasses does."""
    parts = [
        [type(part).__name__, dataclasses.asdict(part, dict_factory=_identity)]
        for part in (settings, *more)
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    return (
        f"{settings.dataset}-{settings.network}-{settings.method}"
        f"-seed{settings.seed}-{digest.hexdigest()[:12]}"
    )


def _identity(fields):
    """What of a dataclass counts: a file is its contents, wherever it lies."""
    fields = dict(fields)
    if fields.get("digest"):
        del fields["source"]
    return fields
