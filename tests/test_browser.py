"""The pages in a real browser, from the file system: no errors, clips play, sorting and filtering work.

Needs Chromium and its driver; on Debian: apt-get install chromium chromium-driver (`.ci/run` does it).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_kit import encode, moving, picture
from report_kit import row, write
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from mmalign.jobs_prefer import Route
from mmalign.media import write_image, write_video
from mmalign.media_table import MediaRow, write_media_table
from mmalign.provenance import write_clip
from mmalign.records import MediaRef
from mmalign.report import build as build_report
from mmalign.report_sheet import build
from mmalign.routing import question_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs Chromium and its driver; on Debian: apt-get install chromium chromium-driver",
)
PATIENCE = 60.0  # seconds, for a machine with much else to do
CLIPS, PICTURES, MANY = 5, 4, 2000


@pytest.fixture(scope="module", name="browser")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    for flag in (
        "headless", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync",
        "disable-component-update", "window-size=1300,900", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    if os.geteuid() == 0:  # its sandbox refuses to run as root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    patch = pytest.MonkeyPatch()
    patch.setenv("NO_PROXY", "localhost,127.0.0.1")
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
        patch.undo()


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of clips and pictures of two models, with rewards, scores, a broken and a missing file."""
    home = tmp_path_factory.mktemp("browser") / "run"
    rewards = np.random.default_rng(0).permutation(CLIPS + PICTURES) / 10
    rows = []
    for i, reward in enumerate(rewards):
        clip = i < CLIPS
        place = home / "media" / f"{i:02d}.{'mp4' if clip else 'png'}"
        prompt = f"a {('red', 'blue')[i % 2]} circle moves left, number {i} <i>&"
        if clip:
            told = {"mmalign": "0", "prompt": prompt, "seed": i, "model": {"name": "m", "hash": "0" * 64}}
            write_clip(place, moving(9, 32, 32), 8, told)
        else:
            write_image(place, picture(32, 48, seed=i))
        aux = {"reward": float(reward), "baseline_reward": float(1 - reward)}
        kind, model = "video" if clip else "image", ("base", "aligned")[i % 2]
        rows.append(MediaRow(f"s{i}", prompt, str(place), kind, seed=i, model=model, aux=aux))
    encode(home / "media/odd.mp4", moving(9, 32, 32), "mpeg4")  # MPEG-4 Part 2, which browsers do not play
    rows.append(MediaRow("odd", "an odd one", str(home / "media/odd.mp4"), "video", seed=90, model="base"))
    rows.append(MediaRow("gone", "one that is gone", str(home / "media/gone.png"), seed=91, model="base"))
    write_media_table(home / "table.jsonl", rows)
    scored = [row(r.sample, float(len(rows) - i), r.media, prompt=r.prompt) for i, r in enumerate(rows[:-1])]
    scored.append(row("gone", None, "gone.png", status="error", reason="no such file"))
    write(home / "scores", scored, {"table": str(home / "table.jsonl")}, {"hps": False})
    return home


@pytest.fixture(scope="module", name="sheet")
def _sheet(run: Path) -> Path:
    return build([run])


def _open(browser: webdriver.Chrome, path: Path) -> None:
    browser.get_log("browser")
    browser.get(path.absolute().as_uri())


def _until(browser: webdriver.Chrome, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, PATIENCE, 0.05).until(lambda _: condition())


def _errors(browser: webdriver.Chrome) -> list[str]:
    """What the browser complained of since the page was opened, and what it fetched from elsewhere."""
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    elsewhere = [name for name in fetched if not name.startswith(("file:", "data:"))]
    return [entry["message"] for entry in browser.get_log("browser")] + elsewhere


def _shown(browser: webdriver.Chrome) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('#tiles li')].map(li => li.dataset.sample)")


def _choose(browser: webdriver.Chrome, field: str, text: str) -> None:
    Select(browser.find_element(By.ID, field)).select_by_visible_text(text)


def _type(browser: webdriver.Chrome, field: str, text: str) -> None:
    element = browser.find_element(By.ID, field)
    element.clear()
    element.send_keys(text)


def _state(browser: webdriver.Chrome, video: Any) -> tuple[float, float, bool]:
    """Duration, current time, paused."""
    return tuple(browser.execute_script("const v = arguments[0]; return [v.duration, v.currentTime, v.paused]", video))


def _named(browser: webdriver.Chrome, button: Any, start: str) -> bool:
    """Whether its name comes to begin so: browsers tell assistive technology a moment after the page changed."""
    return _until(browser, lambda: button.accessible_name.startswith(start))


def _played(browser: webdriver.Chrome, video: Any) -> bool:
    """Whether it is on, and has moved since it was first asked."""
    begun = _state(browser, video)[1]
    return _until(browser, lambda: (s := _state(browser, video))[2] is False and s[1] != begun)


# ------------------------------------------------------------------------------------------------ the report


def test_clips_play_in_the_report(browser: webdriver.Chrome, tmp_path: Path) -> None:
    folders = []
    for name in ("base", "aligned"):
        rows = []
        for i in range(3):
            place = tmp_path / name / f"{i}.mp4"
            write_video(place, moving(8, 64, 96), 8)
            rows.append(row(str(i), i + (name == "aligned") * 0.5, place, seed=i, model=name))
        folders.append(write(tmp_path / f"scores-{name}", rows))
    _open(browser, build_report(folders, tmp_path / "report.html"))
    clips = browser.find_elements(By.TAG_NAME, "video")
    assert len(clips) >= 6 and {clip.accessible_name.split(":")[0] for clip in clips} == {"base", "aligned"}
    stages = browser.find_elements(By.CLASS_NAME, "stage")
    for stage, clip in list(zip(stages, clips, strict=True))[:2]:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", clip)
        button = stage.find_element(By.TAG_NAME, "button")
        assert _named(browser, button, f"Play: {clip.accessible_name}")
        ActionChains(browser).move_to_element(stage).perform()
        assert _played(browser, clip) and _state(browser, clip)[0] == pytest.approx(1.0, abs=0.05)
        ActionChains(browser).move_by_offset(0, 300).perform()
        _until(browser, lambda clip=clip: _state(browser, clip)[2])
        button.send_keys(Keys.ENTER)
        assert _played(browser, clip) and _named(browser, button, "Pause: ")
        button.send_keys(Keys.SPACE)
        _until(browser, lambda clip=clip: _state(browser, clip)[2])
    assert _errors(browser) == []


def test_clips_play_on_the_labelling_page(browser: webdriver.Chrome, tmp_path: Path) -> None:
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", moving(8, 64, 96), 8)
    asked = {"pair": "p1", "prompt": "a circle moves", "a": "a.mp4", "b": "b.mp4"}
    shown = {"p1": [MediaRef(str(tmp_path / f"{name}.mp4")) for name in "ab"]}
    (tmp_path / "page.html").write_text(question_page([asked], shown, Route().side))
    _open(browser, tmp_path / "page.html")
    clips = browser.find_elements(By.TAG_NAME, "video")
    assert [clip.accessible_name for clip in clips] == ["clip A", "clip B"]
    for clip in clips:
        browser.execute_script("return arguments[0].play()", clip)
        assert _played(browser, clip) and _state(browser, clip)[0] == pytest.approx(1.0, abs=0.05)
    browser.find_element(By.TAG_NAME, "body").send_keys("b")
    _until(browser, lambda: browser.find_element(By.ID, "count").text == "1 of 1")
    assert _errors(browser) == []


# ------------------------------------------------------------------------------------------------ the contact sheet


def test_the_sheet_loads_and_its_clips_have_a_duration(browser: webdriver.Chrome, sheet: Path) -> None:
    _open(browser, sheet)
    assert _shown(browser) == [*(f"s{i}" for i in range(CLIPS + PICTURES)), "odd", "gone"]
    assert browser.find_element(By.ID, "count").text == f"1\N{EN DASH}{CLIPS + PICTURES + 2} of {CLIPS + PICTURES + 2}"
    for clip in browser.find_elements(By.TAG_NAME, "video")[:CLIPS]:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", clip)
        _until(browser, lambda clip=clip: (_state(browser, clip)[0] or 0) == pytest.approx(9 / 8, abs=0.05))
    for image in browser.find_elements(By.CSS_SELECTOR, ".stage img"):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
        _until(browser, lambda image=image: browser.execute_script("return arguments[0].naturalWidth", image) == 48)
    faults = _until(browser, lambda: len(f := browser.find_elements(By.CSS_SELECTOR, ".fault")) == 2 and f)
    assert [fault.text for fault in faults] == [
        "This browser cannot show odd.mp4. It is damaged, or of a kind that --embed would convert.",
        "media/gone.png: no such file",
    ]
    assert _errors(browser) == []


def test_a_clip_plays_by_pointer_and_by_keyboard(browser: webdriver.Chrome, sheet: Path) -> None:
    _open(browser, sheet)
    tile = browser.find_element(By.CSS_SELECTOR, '[data-sample="s1"]')
    video, button = tile.find_element(By.TAG_NAME, "video"), tile.find_element(By.CLASS_NAME, "play")
    assert browser.execute_script("const v = arguments[0]; return [v.muted, v.loop, v.paused]", video) == [True] * 3
    heading = browser.find_element(By.TAG_NAME, "h1")
    ActionChains(browser).move_to_element(video).perform()
    assert _played(browser, video) and _named(browser, button, "Pause: a blue circle")
    ActionChains(browser).move_to_element(heading).perform()
    _until(browser, lambda: _state(browser, video)[2])
    ActionChains(browser).click(video).move_to_element(heading).perform()  # a click keeps it going
    assert _played(browser, video)
    ActionChains(browser).click(video).move_to_element(heading).perform()
    _until(browser, lambda: _state(browser, video)[2])
    button.send_keys(Keys.ENTER)
    assert _played(browser, video) and _until(browser, lambda: button.get_attribute("aria-pressed") == "true")
    button.send_keys(Keys.SPACE)
    _until(browser, lambda: _state(browser, video)[2])
    everything = browser.find_element(By.ID, "all")
    everything.click()
    assert _played(browser, browser.find_element(By.CSS_SELECTOR, '[data-sample="s0"] video'))
    everything.click()
    _until(browser, lambda: all(_state(browser, v)[2] for v in browser.find_elements(By.TAG_NAME, "video")))
    assert _errors(browser) == []


def test_sorting(browser: webdriver.Chrome, sheet: Path, run: Path) -> None:
    from mmalign.media_table import read_media_table

    rewards = {r.sample: r.aux["reward"] for r in read_media_table(run) if "reward" in r.aux}
    best = sorted(rewards, key=lambda sample: -rewards[sample])
    _open(browser, sheet)
    _choose(browser, "sort", "reward")
    assert _shown(browser) == [*best, "odd", "gone"]  # the best first; those without a value last
    values = [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".scores dd.now")]
    assert [float(value) for value in values] == [rewards[sample] for sample in best]
    direction = browser.find_element(By.ID, "direction")
    assert direction.accessible_name == "Descending; change to ascending"
    direction.click()
    assert _shown(browser) == [*best[::-1], "odd", "gone"] and direction.accessible_name.startswith("Ascending")
    _choose(browser, "sort", "baseline_reward")
    assert _shown(browser) == [*best[::-1], "odd", "gone"]
    _choose(browser, "sort", "hps (lower is better)")
    count = CLIPS + PICTURES
    assert _shown(browser) == ["odd", *(f"s{i}" for i in reversed(range(count))), "gone"]
    _choose(browser, "sort", "prompt")
    assert _shown(browser) == [*(f"s{i}" for i in range(1, count, 2)), *(f"s{i}" for i in range(0, count, 2)),
                               "odd", "gone"]  # fmt: skip
    _choose(browser, "sort", "seed")
    browser.find_element(By.ID, "direction").click()
    assert _shown(browser) == ["gone", "odd", *(f"s{i}" for i in reversed(range(count)))]
    browser.find_element(By.ID, "reset").click()
    assert _shown(browser) == [*(f"s{i}" for i in range(count)), "odd", "gone"] and _errors(browser) == []


def test_filtering(browser: webdriver.Chrome, sheet: Path) -> None:
    _open(browser, sheet)
    count = CLIPS + PICTURES
    _type(browser, "text", " RED circle")
    _until(browser, lambda: _shown(browser) == [f"s{i}" for i in range(0, count, 2)])
    assert browser.find_element(By.ID, "count").text == f"1\N{EN DASH}5 of 5 (of {count + 2})"
    _choose(browser, "model", "aligned")
    _until(browser, lambda: not _shown(browser))
    assert browser.find_element(By.ID, "none").is_displayed()
    assert browser.find_element(By.ID, "count").text == f"0 of {count + 2}"
    browser.find_element(By.ID, "reset").click()
    _choose(browser, "model", "aligned")
    assert _shown(browser) == [f"s{i}" for i in range(1, count, 2)]
    browser.find_element(By.ID, "reset").click()
    _choose(browser, "ranged", "hps")
    _type(browser, "low", "3")
    _type(browser, "high", "5.5")
    _until(browser, lambda: _shown(browser) == ["s6", "s7", "s8"])  # hps is 11 for s0, 10 for s1, ... 2 for odd
    browser.find_element(By.ID, "reset").click()
    for status, expected in (("media missing", ["gone"]), ("score missing", []), ("complete", ["odd"])):
        _choose(browser, "status", status)
        assert _shown(browser)[-1:] == expected, status
    assert len(_shown(browser)) == count + 1 and _errors(browser) == []


def test_details_show_everything(browser: webdriver.Chrome, sheet: Path) -> None:
    _open(browser, sheet)
    browser.find_element(By.CSS_SELECTOR, '[data-sample="s5"] .stage').send_keys(Keys.ENTER)
    box = browser.find_element(By.ID, "details")
    assert box.get_attribute("open") is not None and "number 5 <i>&" in box.text and "baseline_reward" in box.text
    assert box.find_element(By.TAG_NAME, "img").is_displayed()
    assert box.find_element(By.LINK_TEXT, "media/05.png").get_attribute("href").endswith("/run/media/05.png")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    _until(browser, lambda: box.get_attribute("open") is None)
    browser.find_element(By.CSS_SELECTOR, '[data-sample="s1"] .under button').click()
    assert _played(browser, box.find_element(By.TAG_NAME, "video"))
    box.find_element(By.TAG_NAME, "button").click()
    _until(browser, lambda: not box.find_elements(By.TAG_NAME, "video"))
    assert _errors(browser) == []


def test_every_control_has_a_name_and_no_label_is_cut(browser: webdriver.Chrome, sheet: Path) -> None:
    _open(browser, sheet)
    for width in (1300, 700, 400):
        browser.set_window_size(width, 900)
        controls = browser.find_elements(By.CSS_SELECTOR, "button, input, select, video, img, a")
        nameless = [c.get_attribute("outerHTML")[:90] for c in controls if c.is_displayed() and not c.accessible_name]
        assert not nameless, nameless
        cut = browser.execute_script(
            "return [...document.querySelectorAll('.bar label, button, .under span, .scores dt, h1')]"
            ".filter(e => e.offsetParent && (e.scrollWidth > e.clientWidth + 1 && e.clientWidth))"
            ".map(e => e.outerHTML.slice(0, 90))"
        )
        assert not cut, (width, cut)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), width
    browser.set_window_size(1300, 900)


def test_an_embedded_sheet_needs_no_files(browser: webdriver.Chrome, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    page = build([copy], tmp_path / "mail.html", embed=True)
    shutil.rmtree(copy)
    _open(browser, page)
    clips = browser.find_elements(By.TAG_NAME, "video")
    assert len(clips) == CLIPS + 1  # with the one that browsers do not play as it is
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", clips[-1])
    _until(browser, lambda: (_state(browser, clips[-1])[0] or 0) > 0)
    ActionChains(browser).move_to_element(clips[-1]).perform()
    assert _played(browser, clips[-1]) and _errors(browser) == []


def test_two_thousand_items_stay_usable(browser: webdriver.Chrome, tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", picture(32, 32))
    write_video(tmp_path / "x.mp4", moving(8, 32, 32), 8)
    rng, rows = np.random.default_rng(1), []
    for i in range(MANY):
        place = tmp_path / f"{i}.{'mp4' if i % 2 else 'png'}"
        os.link(tmp_path / f"x{place.suffix}", place)
        kind = "video" if i % 2 else "image"
        rows.append(MediaRow(f"s{i}", f"prompt {i}", str(place), kind, seed=i, aux={"reward": float(rng.normal())}))
    write_media_table(tmp_path / "table.jsonl", rows)
    _open(browser, build([tmp_path]))
    assert len(_shown(browser)) == 48 and browser.find_element(By.ID, "count").text == "1\N{EN DASH}48 of 2,000"
    begun = time.perf_counter()
    _choose(browser, "sort", "reward")
    seconds = time.perf_counter() - begun
    best = sorted(rows, key=lambda r: -r.aux["reward"])
    assert _shown(browser) == [r.sample for r in best[:48]]
    print(f"sorting {MANY} items: {seconds:.2f} s")
    assert browser.find_element(By.ID, "back").get_property("disabled")
    seen = _shown(browser)
    for _ in range(41):
        browser.find_element(By.ID, "on").click()
        seen += _shown(browser)
    assert seen == [r.sample for r in best] and browser.find_element(By.ID, "on").get_property("disabled")
    _type(browser, "text", "prompt 199")
    _until(browser, lambda: {*_shown(browser)} == {"s199", *(f"s{i}" for i in range(1990, 2000))})
    assert _errors(browser) == []
