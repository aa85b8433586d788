"""The built site in a headless browser; `tox -e docs` builds and tests it.

Draws in the page to play with, as a visitor would, and watches where the
pages send requests. Needs Chromium and its driver.
"""

import functools
import http.server
import json
import os
import pathlib
import shutil
import threading

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SITE = pathlib.Path(os.environ.get("SITE", "site")).resolve()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
PATIENCE = 60
DESKTOP, PHONE = 1280, 390

PAGES = sorted(
    str(page.parent.relative_to(SITE).as_posix()).replace(".", "")
    for page in SITE.rglob("index.html")
)


def arc(x, y, width, height, start, end, count=24):
    """Points of an ellipse, angles in degrees, 0 to the right, 90 upwards."""
    angles = np.deg2rad(np.linspace(start, end, count))
    return [
        (x + width * np.cos(angle), y - height * np.sin(angle))
        for angle in angles
    ]


# Strokes in shares of the box, written as these digits usually are.
DIGITS = {
    0: [arc(0.5, 0.5, 0.2, 0.32, 90, 450)],
    1: [[(0.5, 0.15), (0.5, 0.85)]],
    2: [[*arc(0.5, 0.33, 0.2, 0.17, 170, -40), (0.3, 0.83), (0.73, 0.83)]],
    3: [
        [
            *arc(0.48, 0.33, 0.17, 0.16, 150, -90),
            *arc(0.48, 0.66, 0.2, 0.17, 90, -150),
        ]
    ],
    4: [
        [(0.55, 0.1), (0.25, 0.6), (0.75, 0.6)],
        [(0.58, 0.4), (0.55, 0.9)],
    ],
    5: [
        [(0.66, 0.17), (0.38, 0.17), (0.36, 0.45)],
        [(0.36, 0.45), *arc(0.47, 0.62, 0.2, 0.19, 100, -140)],
    ],
    6: [
        [
            (0.5, 0.12),
            (0.4, 0.3),
            (0.35, 0.55),
            *arc(0.5, 0.68, 0.15, 0.15, 170, 540),
        ]
    ],
    # Crossed, as in the data.
    7: [
        [(0.3, 0.2), (0.7, 0.2), (0.44, 0.85)],
        [(0.38, 0.52), (0.7, 0.52)],
    ],
    8: [
        [
            *arc(0.5, 0.32, 0.14, 0.15, -90, 270),
            *arc(0.5, 0.66, 0.17, 0.19, 90, -270),
        ]
    ],
    9: [[*arc(0.5, 0.34, 0.15, 0.17, 0, 360), (0.64, 0.5), (0.58, 0.86)]],
}

_HATCHING = [
    (0.15 + 0.07 * step, 0.15 if step % 2 else 0.85) for step in range(11)
]
MODELS = ("halo", "cross-entropy")
SCRIBBLES = {
    "hatching": [_HATCHING, [(y, x) for x, y in _HATCHING]],
    "house": [
        [(0.2, 0.45), (0.2, 0.85), (0.8, 0.85), (0.8, 0.45), (0.2, 0.45)],
        [(0.2, 0.45), (0.5, 0.12), (0.8, 0.45)],
        [(0.42, 0.85), (0.42, 0.6), (0.58, 0.6), (0.58, 0.85)],
    ],
    "face": [
        arc(0.5, 0.5, 0.4, 0.4, 0, 360, 40),
        arc(0.36, 0.38, 0.04, 0.04, 0, 360),
        arc(0.64, 0.38, 0.04, 0.04, 0, 360),
        arc(0.5, 0.58, 0.2, 0.14, 200, 340),
    ],
    "spiral": [
        [
            (
                0.5 + 0.016 * step * np.cos(0.6 * step),
                0.5 - 0.016 * step * np.sin(0.6 * step),
            )
            for step in range(28)
        ]
    ],
}


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        """Says nothing."""


@pytest.fixture(scope="session")
def origin():
    assert (SITE / "index.html").exists(), f"{SITE} has not been built"
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=SITE)
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.fail(
            "expected the programs chromium and chromedriver on the path, got "
            f"{CHROMIUM} and {DRIVER}; on Debian: "
            "apt install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(DRIVER)
    )
    driver.set_script_timeout(PATIENCE)
    yield driver
    driver.quit()


def resize(browser, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {
            "width": width,
            "height": 900,
            "deviceScaleFactor": 1,
            "mobile": width == PHONE,
        },
    )


def state(browser):
    return browser.find_element(By.ID, "play").get_attribute("data-state")


def wait_for(browser, wanted):
    WebDriverWait(browser, PATIENCE).until(
        lambda _: state(browser) in (wanted, "failed")
    )
    assert state(browser) == wanted


@pytest.fixture
def play(browser, origin):
    resize(browser, DESKTOP)
    if not browser.current_url.endswith("/play/"):
        browser.get(f"{origin}/play/")
        WebDriverWait(browser, PATIENCE).until(
            lambda _: state(browser) != "loading"
        )
    clear(browser)
    return browser


def clear(browser):
    browser.execute_script("document.getElementById('play-clear').click()")
    wait_for(browser, "empty")


def mouse(browser, kind, x, y):
    browser.execute_cdp_cmd(
        "Input.dispatchMouseEvent",
        {
            "type": kind,
            "x": x,
            "y": y,
            "button": "left",
            "buttons": 0 if kind == "mouseReleased" else 1,
            "clickCount": 1,
        },
    )


def touch(browser, kind, *points):
    browser.execute_cdp_cmd(
        "Input.dispatchTouchEvent",
        {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]},
    )


def draw(browser, strokes, finger=False):
    browser.execute_script(
        "document.getElementById('play-pad')"
        ".scrollIntoView({block: 'center', behavior: 'instant'})"
    )
    box = browser.execute_script(
        "const box = document.getElementById('play-pad')"
        ".getBoundingClientRect();"
        "return [box.left, box.top, box.width, box.height]"
    )
    for stroke in strokes:
        points = [
            (float(box[0] + x * box[2]), float(box[1] + y * box[3]))
            for x, y in stroke
        ]
        if finger:
            touch(browser, "touchStart", points[0])
            for point in points[1:]:
                touch(browser, "touchMove", point)
            touch(browser, "touchEnd")
        else:
            mouse(browser, "mousePressed", *points[0])
            for point in points[1:]:
                mouse(browser, "mouseMoved", *point)
            mouse(browser, "mouseReleased", *points[-1])
    wait_for(browser, "answered")


def label(browser, name="halo"):
    section = browser.find_element(By.ID, f"play-{name}")
    return section.get_attribute("data-label")


def answer(browser, name="halo"):
    section = browser.find_element(By.ID, f"play-{name}")
    return section.find_element(By.CLASS_NAME, "play-answer").text


@pytest.mark.parametrize("digit", range(8))
def test_drawn_digit_is_named(play, digit):
    draw(play, DIGITS[digit])
    assert label(play) == str(digit)
    assert answer(play) == f"This is a {digit}"


@pytest.mark.parametrize("digit", [8, 9])
def test_digit_that_was_never_trained_is_refused(play, digit):
    draw(play, DIGITS[digit])
    assert label(play) == "-1"
    assert answer(play) == "I don’t know"
    assert answer(play, "cross-entropy").startswith("This is a ")


# The spiral is taken for a digit, as are half of the scribbles on the page.
@pytest.mark.parametrize("name", [n for n in SCRIBBLES if n != "spiral"])
def test_scribble_is_refused(play, name):
    draw(play, SCRIBBLES[name])
    assert label(play) == "-1"
    assert answer(play) == "I don’t know"


def test_empty_box_is_refused(play):
    message = play.find_element(By.ID, "play-message").text
    assert "empty" in message
    for name in ("halo", "cross-entropy"):
        assert label(play, name) == ""
        assert answer(play, name) == "…"


def bars(browser, name):
    """Labels of the bars, and their widths in percent."""
    return browser.execute_script(
        "return [...document.querySelectorAll(`#play-${arguments[0]} "
        ".play-bar`)].map((bar) => "
        "[bar.querySelector('.play-label').textContent, "
        "parseFloat(bar.querySelector('.play-fill').style.width)])",
        name,
    )


@pytest.mark.parametrize("drawing", [DIGITS[3], DIGITS[9], SCRIBBLES["face"]])
def test_the_longest_bar_is_the_answer(play, drawing):
    draw(play, drawing)
    for name, count in (("halo", 9), ("cross-entropy", 8)):
        shown = bars(play, name)
        assert len(shown) == count
        assert sum(width for _, width in shown) == pytest.approx(100, abs=0.1)
        longest = max(shown, key=lambda bar: bar[1])[0]
        assert answer(play, name).endswith(longest)


def test_the_dot_moves_and_stays_inside_the_ring(play):
    picture = "return document.getElementById('play-map').toDataURL()"
    seen = {play.execute_script(picture)}
    for drawing in (*DIGITS.values(), *SCRIBBLES.values()):
        clear(play)
        draw(play, drawing)
        reach = play.find_element(By.ID, "play-map").get_attribute("data-reach")
        assert 0 <= float(reach) <= 1
        seen.add(play.execute_script(picture))
    assert len(seen) > 10


def test_every_sample_is_answered_as_its_name_says(play):
    buttons = play.find_elements(By.CSS_SELECTOR, "#play-samples button")
    assert len(buttons) == 6
    for button in buttons:
        clear(play)
        play.execute_script("arguments[0].click()", button)
        wait_for(play, "answered")
        name = button.get_attribute("title")
        digit = name.removeprefix("a ")
        assert label(play) == (digit if digit.isdecimal() else "-1"), name


@pytest.mark.parametrize("width", [360, PHONE])
def test_the_answers_stand_beside_the_pad_on_a_phone(play, width):
    resize(play, width)
    boxes = play.execute_script(
        "return ['#play-pad', '#play-halo .play-answer', "
        "'#play-cross-entropy .play-answer'].map((name) => "
        "{ const box = document.querySelector(name).getBoundingClientRect();"
        " return [box.left, box.right, box.top, box.bottom] })"
    )
    pad, *answers = boxes
    for left, right, top, bottom in answers:
        assert left >= pad[1] and right <= width
        assert top >= pad[2] and bottom <= pad[3]


def test_a_finger_draws_on_a_phone(play):
    resize(play, PHONE)
    draw(play, DIGITS[7], finger=True)
    assert label(play) == "7"


def requests(browser):
    """Addresses requested since the last call, and errors of the console."""
    addresses = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            addresses.append(message["params"]["request"]["url"])
    errors = [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE"
    ]
    return addresses, errors


@pytest.mark.parametrize("page", PAGES)
def test_page_stays_at_home_and_fits(browser, origin, page):
    requests(browser)
    resize(browser, DESKTOP)
    browser.get(f"{origin}/{page}{'/' if page else ''}")
    if page == "play":
        wait_for(browser, "empty")
    addresses, errors = requests(browser)
    assert addresses
    elsewhere = [
        address
        for address in addresses
        if not address.startswith((origin, "data:", "blob:"))
    ]
    assert elsewhere == []
    assert errors == []
    for width in (DESKTOP, PHONE):
        resize(browser, width)
        wide = browser.execute_script(
            "return document.documentElement.scrollWidth"
        )
        assert wide <= width


@pytest.mark.parametrize("page", [p for p in PAGES if p.startswith("api/")])
def test_functions_are_not_shown_as_the_modules_they_live_in(page):
    # A function and its module have one name; only mathematics shows modules.
    text = (SITE / page / "index.html").read_text(encoding="utf-8")
    modules = text.count("doc-symbol-heading doc-symbol-module")
    assert modules == (4 if page == "api/mathematics" else 0)


def test_most_of_what_is_unknown_is_refused_as_the_page_says():
    models = json.loads((SITE / "play/models/models.json").read_text())
    text = (SITE / "play/index.html").read_text(encoding="utf-8")
    assert models["halo"]["unknown_refused"] > 0.7
    assert 0.4 < models["halo"]["scribbles_refused"] < 0.6
    assert models["halo"]["known_refused"] < 0.03
    confident = [models[name]["scribbles_confident"] for name in MODELS]
    assert confident[0] < 0.4 * confident[1]
    for model in MODELS:
        for name in ("accuracy", "known_refused", "scribbles_confident"):
            assert f"<td>{100 * models[model][name]:.1f}</td>" in text


@pytest.mark.parametrize("model", ["halo", "cross-entropy"])
def test_models_are_small(model):
    assert (SITE / "play/models" / f"{model}.onnx").stat().st_size < 500_000
