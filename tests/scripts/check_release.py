"""Builds wheel and sdist as a release would, and checks both.

Run by `tox -e release`, from the root of the repository.
"""

import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

# What somebody needs who has nothing but the sdist.
IN_SDIST = [
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "docs/export.md",
    "examples/quickstart.py",
    "keras_halo/py.typed",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/constraints.txt",
    "tests/data/golden.json",
    "tests/data/golden_current.json",
    "tox.ini",
]


def run(*arguments, **options):
    """Runs a module of this Python; its failure is ours."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], check=True, **options
    )


def build(source, folder, kind):
    """The one file that `python -m build` makes of a source folder."""
    run("build", "--no-isolation", f"--{kind}", "--outdir", folder, source)
    (made,) = folder.iterdir()
    return made


def modules(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in (folder / "keras_halo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def check_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    of_package = {name for name in names if name.startswith("keras_halo/")}
    expected = modules(ROOT)
    assert of_package == expected, of_package ^ expected
    assert "keras_halo/py.typed" in names
    rest = {name.partition("/")[0] for name in names - of_package}
    (info,) = rest
    assert info.endswith(".dist-info"), rest
    assert f"{info}/licenses/LICENSE" in names


def check_sdist(sdist, folder):
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    missing = [name for name in IN_SDIST if not (source / name).is_file()]
    ours = [p.relative_to(ROOT) for p in (ROOT / "tests").rglob("*.py")]
    missing += sorted(str(p) for p in ours if not (source / p).is_file())
    assert not missing, f"not in the sdist: {missing}"
    return source


def check_types():
    """What users write has no type errors, seen by pyright."""
    client = ROOT / "tests" / "typed_client.py"
    run("pyright", "--pythonpath", sys.executable, client)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        places = [folder / name for name in ("wheel", "sdist", "source", "2")]
        for place in places:
            place.mkdir()
        wheel = build(ROOT, places[0], "wheel")
        sdist = build(ROOT, places[1], "sdist")
        run("twine", "check", "--strict", wheel, sdist)
        check_wheel(wheel)
        source = check_sdist(sdist, places[2])
        again = build(source, places[3], "wheel")
        check_wheel(again)
    check_types()
    print("wheel, sdist and types are as they should be")


if __name__ == "__main__":
    main()
