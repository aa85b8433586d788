"""The networks of the benchmarks, from inputs to features."""

import re

import keras
from keras import layers

# What blocks are called, and nothing that a method puts on top of them.
_BLOCK = r"block_\d+"


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


def _residual(shape, width, stages):
    """A network of residual stages, tuples `filters, strides of its blocks`."""

    def conv(x, filters, stride, size=3):
        x = layers.Conv2D(
            filters, size, stride, padding="same", use_bias=False
        )(x)
        return _normalization()(x)

    inputs = keras.Input(shape)
    x = layers.ReLU()(conv(inputs, width, 1))
    for filters, strides in stages:
        for i, stride in enumerate(strides, 1):
            name = f"block_{filters}" if i == len(strides) else None
            shortcut = x
            if stride > 1 or x.shape[-1] != filters:
                shortcut = conv(x, filters, stride, size=1)
            x = layers.ReLU()(conv(x, filters, stride))
            x = layers.Add()([conv(x, filters, 1), shortcut])
            x = layers.ReLU(name=name)(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def resnet18(shape):
    """ResNet-18 as it is customary for images of 32 x 32: 512 features."""
    stages = ((64, (1, 1)), (128, (2, 1)), (256, (2, 1)), (512, (2, 1)))
    return _residual(shape, 64, stages)


def small_resnet(shape):
    """ResNet-8, which a processor trains: 128 features."""
    stages = ((32, (2,)), (64, (2,)), (128, (2,)))
    return _residual(shape, 32, stages)


def speech_convnet(shape):
    """Three convolutions over time, of frames of a spectrogram."""
    x = inputs = keras.Input(shape)
    for filters in (64, 128, 128):
        x = layers.Conv1D(filters, 5, padding="same", use_bias=False)(x)
        x = layers.ReLU()(_normalization()(x))
        x = layers.MaxPooling1D(name=f"block_{x.shape[1]}")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dropout(0.3)(x))


def block_outputs(model):
    """The output of every block of a network, the first block first."""
    return [x.output for x in model.layers if re.fullmatch(_BLOCK, x.name)]


NETWORKS = {
    "convnet": convnet,
    "resnet18": resnet18,
    "small_resnet": small_resnet,
}
