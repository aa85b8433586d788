"""What the matrix products of accelerators do to the squared radius.

The head reads the squared distance of an embedding to its centroid off a
matrix product: `r^2 = |x|^2 - s / gamma`. GPUs and TPUs round the inputs of
such products, to TF32 (10 bits of mantissa) or bfloat16 (7 bits), unless told
otherwise. This script simulates the rounding, on embeddings that lie on the
shell around centroids of a given scale, and prints a Markdown table:

- the error of `r^2` at the label, root mean square and largest;
- the share of samples whose nearest class changes;
- the relative error of the loss, root mean square.

    KERAS_BACKEND=jax python benchmarks/rounding.py
"""

import argparse

import keras
import numpy as np
from keras import ops

from keras_halo.losses import halo_loss
from keras_halo.ops import geometry, packing

MANTISSAS = {"float32": 23, "TF32": 10, "bfloat16": 7}
NUM_CLASSES = 100


def rounded(array, bits):
    """Rounds float32 to so many bits of mantissa, to nearest, ties to even."""
    drop = np.uint32(23 - bits)
    if not drop:
        return array
    raw = array.view(np.uint32)
    last = (raw >> drop) & np.uint32(1)
    half = (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1)
    return (((raw + half + last) >> drop) << drop).view(np.float32)


def packed_scores(x, centroids, gamma, abstain_logit, bits):
    """The head, with the inputs of its one large product rounded."""
    c = centroids - centroids.mean(axis=0)
    dim = c.shape[-1]
    product = rounded(x, bits) @ rounded(np.ascontiguousarray(c.T), bits)
    return packing.pack(
        logits=gamma * (2.0 / dim * product - (c * c).mean(axis=-1)),
        abstain_logit=abstain_logit,
        squared_norm=(x * x).mean(axis=-1, keepdims=True),
        temperature=gamma,
        embedding_dim=dim,
    )


def measure(samples, dim, scale, bits, seed):
    rng = np.random.default_rng(seed)
    centroids = rng.normal(0, scale, (NUM_CLASSES, dim)).astype("float32")
    labels = rng.integers(0, NUM_CLASSES, samples)
    centered = centroids - centroids.mean(axis=0)
    x = centered[labels] + rng.normal(size=(samples, dim)).astype("float32")
    gamma = np.float32(geometry.initial_temperature(dim))
    bias = geometry.abstain_bias(dim, NUM_CLASSES, 0.1)

    def results(dtype, bits):
        scores = packed_scores(
            x.astype(dtype), centroids.astype(dtype), gamma, bias, bits
        )
        parts = packing.unpack(scores)
        radii = ops.convert_to_numpy(
            geometry.squared_radii(
                parts.logits, parts.squared_norm, parts.temperature
            )
        )
        losses = ops.convert_to_numpy(halo_loss(labels, scores))
        own = np.take_along_axis(radii, labels[:, None], axis=-1)[:, 0]
        return own, radii.argmin(axis=-1), losses

    exact, rounded_results = results("float32", 23), results("float32", bits)
    if bits == 23:
        # Against the formula in float64.
        own = ((x.astype("float64") - centered[labels]) ** 2).mean(axis=-1)
        exact = (own, exact[1], exact[2])
    errors = np.abs(rounded_results[0] - exact[0])
    return (
        np.sqrt((errors**2).mean()),
        errors.max(),
        (rounded_results[1] != exact[1]).mean(),
        np.sqrt(((rounded_results[2] / exact[2] - 1.0) ** 2).mean()),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{keras.backend.backend()}, K = {NUM_CLASSES}, means over seeds\n")
    print(
        "| D | scale of centroids | products in | error of r², rms | largest "
        "| nearest class changed | error of the loss |\n"
        "|---|---|---|---|---|---|---|"
    )
    for dim in (8, 64, 512, 4096):
        for scale in (0.3, 1.0, 10.0):
            for name, bits in MANTISSAS.items():
                rms, largest, changed, loss = np.mean(
                    [
                        measure(arguments.samples, dim, scale, bits, seed)
                        for seed in range(arguments.seeds)
                    ],
                    axis=0,
                )
                print(
                    f"| {dim} | {scale:g} | {name} | {rms:.1e} | {largest:.1e} "
                    f"| {100 * changed:.2f} % | {100 * loss:.3f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
