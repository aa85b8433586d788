"""What MkDocs does besides: sections of the README, and onnxruntime-web."""

import json
import pathlib
import re
import shutil

ROOT = pathlib.Path(__file__).parents[1]
PLAY = ROOT / "docs" / "play"
RUNTIME = PLAY / "node_modules" / "onnxruntime-web" / "dist"
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)

# A line such as `{{ README: Install }}` stands for that section of the README.
_SECTION = re.compile(r"^\{\{ README: (.+) \}\}$", re.MULTILINE)

_PLAY_FIGURES = "{{ PLAY FIGURES }}"
_MODELS = ("halo", "cross-entropy")


def readme_section(title):
    """The text below a heading of the README, up to the next one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", readme, re.M | re.S
    )
    if section is None:
        raise ValueError(
            "A page includes a section that README.md does not have. "
            f"Received: {title!r}. Name one of its headings."
        )
    # The README links from the top of the project, pages from docs/.
    return section[1].strip().replace("](docs/", "](")


def play_figures():
    """What `train.py` measured of the two models on the page, as a table."""
    models = json.loads((PLAY / "models" / "models.json").read_text())
    rows = {
        "digits 0 to 7: best digit is right": "accuracy",
        "digits 0 to 7: “I don’t know”": "known_refused",
        "digits 8 and 9: “I don’t know”": "unknown_refused",
        "scribbles: “I don’t know”": "scribbles_refused",
        "scribbles called a digit with more than 90 %": "scribbles_confident",
    }
    lines = [
        "| of these two networks, % | HALO | cross-entropy |",
        "|---|---|---|",
    ]
    for title, key in rows.items():
        cells = [f"{100 * models[kind][key]:.1f}" for kind in _MODELS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def on_page_markdown(markdown, **kwargs):
    markdown = _SECTION.sub(lambda match: readme_section(match[1]), markdown)
    if _PLAY_FIGURES in markdown:
        markdown = markdown.replace(_PLAY_FIGURES, play_figures())
    return markdown


def on_post_build(config, **kwargs):
    target = pathlib.Path(config["site_dir"]) / "play" / "runtime"
    target.mkdir(parents=True, exist_ok=True)
    for name in RUNTIME_FILES:
        if not (RUNTIME / name).exists():
            raise FileNotFoundError(
                f"{RUNTIME / name} is missing. Run `npm install "
                "--no-package-lock` in docs/play, or `tox -e docs`, which does."
            )
        shutil.copy(RUNTIME / name, target)
