"""
Title: The CIFAR benchmarks of OpenOOD v1.5, near and far
Description: ResNet-18 for 100 epochs on CIFAR-10 or CIFAR-100, on one GPU.

    python benchmarks/openood_cifar.py --dataset cifar10 --data openood/data

`--data` is the folder that OpenOOD's own download script fills; it holds
`images_classic` and `benchmark_imglist`. The unknown sets are those lists, of
TinyImageNet and the other CIFAR (near) and MNIST, SVHN, Textures and Places365
(far), read once and kept as npz files in the output folder. CIFAR itself comes
from `keras.datasets`. Training follows OpenOOD: SGD with Nesterov momentum, a
rate of 0.1 on a cosine schedule, batches of 128, shifts by 4 pixels and
mirroring. Four things differ: 1,000 images for validation are taken from the
training images instead of the test images, all 10,000 test images are used,
pixels are scaled to [0, 1] instead of standardized, and the norm of the
gradient is limited to 1, for every method: at that rate HALO would diverge
without. Options that are not listed here go to `benchmarks/ood.py`, which does
the work; it continues where it was stopped.

    python benchmarks/openood_cifar.py --smoke

tries it on made images of the same shapes.

References:

- Jingyang Zhang et al., OpenOOD v1.5: Enhanced Benchmark for
  Out-of-Distribution Detection, 2023.
- Raphael Pisoni, "I don't know!": Teaching neural networks to abstain with
  the HALO-Loss, 2026.
"""

import argparse
import os
import pathlib
import tempfile

import numpy as np
import ood
from keras.utils import load_img
from ood_bench import report, store

SIZE = 32
_BILINEAR = 2

# Names of the lists, and of the sets in the tables.
NEAR = ("cifar", "tin")
FAR = ("mnist", "svhn", "texture", "places365")
OTHER = {"cifar10": "cifar100", "cifar100": "cifar10"}

PROTOCOL = {
    "--networks": ["resnet18"],
    "--epochs": ["100"],
    "--optimizer": ["sgd"],
    "--learning-rate": ["0.1"],
    "--num-validation": ["1000"],
}
# What `--smoke` changes of it; optimizer and rate stay those of the protocol.
SMOKE = {
    "--dataset": ["stripes"],
    "--epochs": ["2"],
    "--num-validation": ["0"],
    "--batch-size": ["32"],
    "--num-train": ["128"],
    "--num-test": ["50"],
    "--seeds": ["1"],
    "--methods": ["cross-entropy", "HALO"],
}

# AUROC, near and far, as OpenOOD v1.5 lists them.
PUBLISHED = {
    "cifar10": {
        "MSP": (88.03, 90.73),
        "k-NN": (90.64, 92.96),
        "LogitNorm": (92.33, 96.74),
        "RotPred": (92.68, 96.62),
        "ASCOOD + T2FNorm": (93.03, 97.35),
    },
    "cifar100": {},
}

# What the author of HALO lists, which is no mean over near and far sets.
PUBLISHED_HALO = {
    "cifar10": """\
Published for HALO, cross-entropy before the arrow: accuracy 96.30 → 96.53 %,
ECE 7.98 → 1.51 %, FPR@95 on SVHN 22.08 → 10.27 %, AUROC on CIFAR-100
82.8 → 91.7 %.""",
}


def read_image(path):
    """One image as OpenOOD prepares it: the short side scaled, then cropped."""
    image = load_img(path)
    scale = SIZE / min(image.size)
    width, height = (max(SIZE, int(side * scale)) for side in image.size)
    image = image.resize((width, height), resample=_BILINEAR)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def unknown_files(data, dataset, folder):
    """Turns the lists of OpenOOD into npz files, unless they are there."""
    files = {}
    for name in NEAR + FAR:
        listed = OTHER[dataset] if name == "cifar" else name
        path = os.path.join(folder, f"openood-{dataset}-{listed}.npz")
        files[listed] = path
        if store.load(path) is not None:
            continue
        root = pathlib.Path(data)
        lines = root / "benchmark_imglist" / dataset / f"test_{listed}.txt"
        images = [
            read_image(root / "images_classic" / line.rsplit(maxsplit=1)[0])
            for line in lines.read_text().splitlines()
            if line.strip()
        ]
        print(f"{listed}: {len(images):,} images", flush=True)
        store.save(path, {"source": lines.name}, {"x": np.stack(images)})
    return files


def made_data(folder):
    """A folder like that of OpenOOD, with made images."""
    from keras.utils import save_img

    rng = np.random.default_rng(0)
    root = pathlib.Path(folder)
    lists = root / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    for name in ("cifar100", "tin", *FAR):
        images = root / "images_classic" / name
        images.mkdir(parents=True)
        lines = []
        for index in range(20):
            # Neither square nor of the right size.
            image = rng.integers(0, 256, (40, 64, 3))
            save_img(images / f"{index}.png", image, scale=False)
            lines.append(f"{name}/{index}.png -1")
        (lists / f"test_{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def near_and_far(results, dataset, published):
    """Markdown of the mean AUROC over near and over far sets.

    Args:
        results: List of `Settings`, record and arrays of every run.
        dataset: String, a key of `OTHER`.
        published: Dictionary of a name to AUROC on near and far sets, rows to
            compare with.
    """
    near = [OTHER[dataset], "tin"]
    rows = [["trained", "detector", "near", "far"]]
    for (_, method), runs in report.groups(results).items():
        for detector in runs[0][0]["detectors"]:
            cells = []
            for names in (near, FAR):
                means = [
                    np.mean([sets[name]["auroc"] for name in names])
                    for sets in (
                        record["detectors"][detector]["sets"]
                        for record, _ in runs
                    )
                ]
                cells.append(report.cell(means, 100, 2))
            rows.append([method, detector, *cells])
    for name, values in published.items():
        rows.append(["published", name, *(f"{v:.2f}" for v in values)])
    return report.markdown(rows)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset", choices=tuple(OTHER), default="cifar10")
    parser.add_argument("--data", help="the data folder of OpenOOD")
    parser.add_argument("--output", default="openood_results")
    parser.add_argument("--smoke", action="store_true")
    arguments, rest = parser.parse_known_args()
    if not arguments.data and not arguments.smoke:
        parser.error("--data is needed: the folder that OpenOOD fills")
    if arguments.smoke:
        arguments.dataset = "cifar10"
    os.makedirs(arguments.output, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        data = made_data(temporary) if arguments.smoke else arguments.data
        files = unknown_files(data, arguments.dataset, arguments.output)
    options = {"--dataset": [arguments.dataset], **PROTOCOL}
    if arguments.smoke:
        options |= SMOKE
    options["--output"] = [arguments.output]
    options["--ood"] = [f"{name}={path}" for name, path in files.items()]
    # What comes later counts: the user's options.
    command = [part for key, value in options.items() for part in (key, *value)]
    results = ood.main([*command, *rest])
    published = {} if arguments.smoke else PUBLISHED[arguments.dataset]
    table = near_and_far(results, arguments.dataset, published)
    if not arguments.smoke and arguments.dataset in PUBLISHED_HALO:
        table += f"\n\n{PUBLISHED_HALO[arguments.dataset]}"
    path = os.path.join(arguments.output, "near_far.md")
    pathlib.Path(path).write_text(table + "\n", encoding="utf-8")
    print(f"\nAUROC, near and far\n\n{table}")


if __name__ == "__main__":
    main()
