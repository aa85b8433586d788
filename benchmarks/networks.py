"""The networks of the benchmarks, from images to features."""

import keras
import numpy as np
from keras import layers, ops


def _normalization():
    # Short trainings leave moving averages with the default momentum behind.
    return layers.BatchNormalization(momentum=0.9)


def convnet(shape):
    """Conv-BN-ReLU of 32, 64, 128 filters with max-pooling: 128 features."""
    x = inputs = keras.Input(shape)
    for filters in (32, 64, 128):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(_normalization()(x))
        x = layers.MaxPooling2D(name=f"block_{filters}")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def resnet18(shape):
    """ResNet-18 as it is customary for images of 32 x 32: 512 features."""

    def conv(x, filters, stride, size=3):
        x = layers.Conv2D(
            filters, size, stride, padding="same", use_bias=False
        )(x)
        return _normalization()(x)

    inputs = keras.Input(shape)
    x = layers.ReLU()(conv(inputs, 64, 1))
    for filters, first in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for stride, name in ((first, None), (1, f"block_{filters}")):
            shortcut = x
            if stride > 1 or x.shape[-1] != filters:
                shortcut = conv(x, filters, stride, size=1)
            x = layers.ReLU()(conv(x, filters, stride))
            x = layers.Add()([conv(x, filters, 1), shortcut])
            x = layers.ReLU(name=name)(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def block_features(model):
    """The pooled output of every block of a network, the first block first."""
    return [layers.GlobalAveragePooling2D()(x) for x in _blocks(model)]


def last_block_moments(model):
    """What the last block of a network says, and where in the image.

    The mean over all positions, and the first cosine moments along the height
    and along the width, which say whether a feature sits further up or down,
    left or right.

    Args:
        model: `keras.Model` on a network of `NETWORKS`.

    Returns:
        Symbolic tensor of shape `(N, 3 * F)` for `F` features; an axis with
        one position has no moment.
    """
    x = _blocks(model)[-1]
    _, height, width, _ = x.shape
    waves = [_wave(height)[:, None, None], _wave(width)[:, None]]
    moments = [ops.mean(x, axis=(1, 2))]
    moments += [ops.mean(x * w, axis=(1, 2)) for w in waves if w.size > 1]
    return ops.concatenate(moments, axis=-1)


def _blocks(model):
    return [x.output for x in model.layers if x.name.startswith("block_")]


def _wave(n):
    """Half a period of a cosine at `n` positions, of mean square one."""
    wave = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    return (2**0.5 * wave).astype("float32")


NETWORKS = {"convnet": convnet, "resnet18": resnet18}
