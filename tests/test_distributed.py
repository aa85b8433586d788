"""Many devices and other ways to train: the same as one device does."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from cases import THOROUGH, passed

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).parent / "scripts" / "trainings.py"

BACKEND = keras.backend.backend()

# Seconds. A process group that hangs fails, instead of holding up everything.
TIME_LIMIT = 500

WAYS = {
    "jax": [
        "checkpointed_by_jax",
        "data_parallel",
        "towers_data_parallel",
        "model_parallel",
        "model_parallel_in_blocks",
        "model_parallel_with_a_wrong_key",
        "collectives",
    ],
    "tensorflow": ["checkpointed_by_tensorflow", "mirrored", "towers_mirrored"],
    "torch": [
        "checkpointed_by_torch",
        "distributed_data_parallel",
        "towers_distributed_data_parallel",
    ],
}

# Need processes of their own.
IN_PROCESSES = {"distributed_data_parallel", "towers_distributed_data_parallel"}

ANYWHERE = [
    "blocks_of_classes",
    "gradient_accumulation",
    "rematerialization",
    "compiled",
]

# What takes longest to compile, and adds least to the others.
THOROUGH_ONLY = {
    "compiled",
    "data_parallel",
    "towers_on_one_device",
    "towers_data_parallel",
    "towers_mirrored",
    "towers_distributed_data_parallel",
    "model_parallel_in_blocks",
    "model_parallel_with_a_wrong_key",
}


def ways_here():
    ways = ["one_device", "towers_on_one_device", *ANYWHERE, *WAYS[BACKEND]]
    if not THOROUGH:
        ways = [way for way in ways if way not in THOROUGH_ONLY]
    return [way for way in ways if way not in IN_PROCESSES]


def start(folder, *ways, **environment):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), *ways],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    try:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"did not end within {TIME_LIMIT} s:\n{output}")
    assert process.returncode == 0, output


def read(folder, way):
    failed = folder / f"{way}.failed"
    if failed.exists():
        pytest.fail(failed.read_text())
    with np.load(folder / f"{way}.npz") as arrays:
        losses, *weights = arrays.values()
    return losses, weights, json.loads((folder / f"{way}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the results of every way but those with more processes."""
    folder = tmp_path_factory.mktemp("trainings")
    ways = ways_here()
    # TensorFlow takes the messages of one strategy for those of another that
    # the same process had before.
    alone = [way for way in ways if way == "towers_mirrored"]
    for group in ([way for way in ways if way not in alone], alone):
        if group:
            finish(
                start(
                    folder,
                    *group,
                    # Read by JAX alone.
                    XLA_FLAGS="--xla_force_host_platform_device_count=4",
                )
            )
    return folder


def result_of(way, folder):
    for backend, ways in WAYS.items():
        if way in ways and backend != BACKEND:
            pytest.skip(f"an engine of {backend}, this is {BACKEND}")
    if way in THOROUGH_ONLY and not THOROUGH:
        pytest.skip("runs with HALO_TESTS=thorough")
    found = read(folder, way)
    passed[way] += 1
    return found


def assert_same(folder, losses, weights, as_way="one_device"):
    """The same as on one device."""
    expected, expected_weights, _ = read(folder, as_way)
    assert len(expected) == 10
    # It learns, so that standing still is not the same.
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "way",
    [
        "blocks_of_classes",
        "gradient_accumulation",
        "rematerialization",
        *(f"checkpointed_by_{backend}" for backend in WAYS),
    ],
)
def test_ten_steps_on_one_device_in_another_way(way, results):
    losses, weights, _ = result_of(way, results)
    assert_same(results, losses, weights)


def test_ten_compiled_steps(results):
    if BACKEND == "torch" and THOROUGH:
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            pytest.skip("torch.compile needs a C++ compiler, there is none")
    losses, weights, _ = result_of("compiled", results)
    assert_same(results, losses, weights)


def test_data_parallel_over_four_devices(results):
    losses, weights, told = result_of("data_parallel", results)
    assert_same(results, losses, weights)
    # Centroids and two slots of Adam, a whole copy on every device.
    assert len(told) == 3
    for layout in told.values():
        assert layout["devices"] == 4
        assert layout["shards"] == [[8, 6]] * 4


@pytest.mark.parametrize("way", ["model_parallel", "model_parallel_in_blocks"])
def test_centroids_in_shards_of_classes(way, results):
    losses, weights, told = result_of(way, results)
    assert_same(results, losses, weights)
    # Centroids and two slots of Adam.
    assert len(told) == 3
    for layout in told.values():
        assert layout["devices"] == 4
        assert layout["spec"][0] == "classes"
        assert layout["shards"] == [[4, 6]] * 4
        assert layout["distinct"] == 2


def test_a_key_that_does_not_match_shards_nothing(results):
    """The trap that the guide warns of, and how one sees it."""
    losses, weights, told = result_of(
        "model_parallel_with_a_wrong_key", results
    )
    assert_same(results, losses, weights)
    assert all(layout["shards"] == [[8, 6]] * 4 for layout in told.values())


def test_no_device_ever_gathers_the_centroids(results):
    losses, _, told = result_of("collectives", results)
    assert losses[0] == pytest.approx(told["expected"], rel=1e-5)
    num_classes, dim = told["centroids"]
    # The shards do exchange something; never a matrix of the centroids.
    assert told["collectives"]
    for name in told["collectives"]:
        assert f"[{num_classes},{dim}]" not in name
        assert f"[{dim},{num_classes}]" not in name


def test_mirrored_strategy_over_two_devices(results):
    losses, weights, told = result_of("mirrored", results)
    assert told == {"replicas": 2, "apart": 0.0}
    assert_same(results, losses, weights)


@pytest.mark.parametrize(
    "way, expected",
    [
        ("towers_data_parallel", {"devices": 4}),
        ("towers_mirrored", {"replicas": 2, "apart": 0.0}),
    ],
)
def test_two_towers_see_the_whole_batch(way, expected, results):
    losses, weights, told = result_of(way, results)
    assert told == expected
    assert_same(results, losses, weights, "towers_on_one_device")


@pytest.mark.skipif(BACKEND != "torch", reason="an engine of torch")
@pytest.mark.parametrize(
    "way, as_way",
    [
        ("distributed_data_parallel", "one_device"),
        ("towers_distributed_data_parallel", "towers_on_one_device"),
    ],
)
def test_distributed_data_parallel_over_two_processes(
    way, as_way, results, tmp_path
):
    if way in THOROUGH_ONLY and not THOROUGH:
        pytest.skip("runs with HALO_TESTS=thorough")
    folders = [tmp_path / str(rank) for rank in range(2)]
    processes = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        processes.append(
            start(
                folder,
                way,
                RANK=str(rank),
                WORLD_SIZE="2",
                MEETING_POINT=str(tmp_path / "meeting_point"),
                GLOO_SOCKET_IFNAME="lo",
            )
        )
    try:
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()
    for folder in folders:
        losses, weights, told = result_of(way, folder)
        assert told == {"processes": 2}
        assert_same(results, losses, weights, as_way)
