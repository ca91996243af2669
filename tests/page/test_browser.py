"""The page in a real Chromium, by clicks, with the checkpoint that ships behind it."""

import contextlib
import io
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, expect, sync_playwright
from playwright.sync_api import Page as Tab

from tests.page.processes import ROOT, Page, post, quick, running
from tests.page.test_server import wait_until

GIRAFFE, OWL = ROOT / "examples/giraffe.png", ROOT / "examples/owl.png"
# Steps: a picture in moments, however it looks.
STEPS = "4"
expect.set_options(timeout=120_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # What is called by any name but this machine's is not found: nothing may come from elsewhere.
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", rules])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    command = ("page", "--port", "0", "--output-dir", str(folder), "--steps", STEPS)
    with running("-m", "sdipc_jax.cli", *command) as page:
        page.wait_until_ready()
        yield page
        page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(30) == 0
        assert not (folder / "uploads").exists()


@pytest.fixture
def tab(browser: Browser, page: Page) -> Iterator[Tab]:
    with browser.new_context() as context:
        yield opened(context.new_page(), page)


def opened(tab: Tab, page: Page) -> Tab:
    tab.goto(page.url)
    expect(tab.locator("#go")).to_be_visible()
    return tab


def drop(tab: Tab, *files: Any) -> None:
    """Gives pictures to the page, as a person does who chooses files."""
    tab.set_input_files("#pictures input[type=file]", list(files))
    expect(tab.locator("#pictures img").first).to_be_visible()


def results(tab: Tab) -> Any:
    return tab.locator("#results figure.result img")


def fetched(page: Page, tab: Tab, place: int) -> np.ndarray:
    """A picture that the page shows, once it has loaded."""
    picture = results(tab).nth(place)
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    content = page.get(str(picture.get_attribute("src"))).content
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


def on_the_command_line(command: str, folder: Path) -> list[np.ndarray]:
    """What the copied command makes, in another folder."""
    words = shlex.split(command)
    assert words[0] == "sdipc"
    extra = ["--output-dir", str(folder), "--quiet"]
    place = words.index("--") if "--" in words else len(words)
    ran = [sys.executable, "-m", "sdipc_jax.cli", *words[1:place], *extra, *words[place:]]
    subprocess.run(ran, check=True, cwd=ROOT)
    found = []
    for path in sorted(folder.glob("*-0*.png")):
        with Image.open(path) as image:
            found.append(np.asarray(image))
    return found


def test_a_picture_is_uploaded_and_varied_and_its_command_makes_the_same(tab: Tab, page: Page, tmp_path: Path) -> None:
    drop(tab, GIRAFFE)
    tab.get_by_label("Seed").fill("7")
    tab.click("#go")
    expect(tab.get_by_text("Done: 4 pictures.")).to_be_visible()
    expect(results(tab)).to_have_count(4)
    expect(tab.locator("#results figure.input img")).to_have_count(1)
    command = tab.locator("#command textarea").input_value()
    assert re.fullmatch(r"sdipc vary \S+/inputs/giraffe\.png --seed 7 --steps 4 --batch-size 1", command)
    made = on_the_command_line(command, tmp_path / "made")
    assert len(made) == 4
    for place, theirs in enumerate(made):
        assert np.array_equal(fetched(page, tab, place), theirs)
    # Side by side: the input and the first result.
    tab.click("#compare button")
    expect(tab.locator("#beside img")).to_have_count(2)
    alternatives = [each.get_attribute("alt") for each in tab.locator("#beside img").all()]
    assert [str(each).partition(": ")[2] for each in alternatives] == ["input giraffe.png", "vary giraffe-000.png"]


def test_a_picture_is_edited(tab: Tab, page: Page, tmp_path: Path) -> None:
    tab.get_by_text("Edit: a picture with a text's change").click()
    drop(tab, GIRAFFE)
    tab.click("#go")
    # Without a text.
    expect(tab.get_by_role("alert")).to_have_text("text is missing: give it")
    tab.get_by_label("Text", exact=True).fill("a red 'giraffe'")
    tab.click("#go")
    expect(tab.get_by_text("Done: 4 pictures.")).to_be_visible()
    command = tab.locator("#command textarea").input_value()
    assert shlex.split(command)[1:4:2] == ["edit", "a red 'giraffe'"]
    made = on_the_command_line(command, tmp_path / "made")
    assert np.array_equal(fetched(page, tab, 3), made[3])


def test_pictures_are_mixed_with_weights(tab: Tab) -> None:
    tab.get_by_text("Mix: several pictures as one").click()
    drop(tab, GIRAFFE, OWL)
    tab.get_by_label("Weights").fill("1, much")
    tab.click("#go")
    expect(tab.get_by_role("alert")).to_contain_text("weights.1 is 'much', expected a valid number")
    tab.get_by_label("Weights").fill("1, -0.25")
    tab.click("#go")
    expect(tab.get_by_text("Done: 4 pictures.")).to_be_visible()
    assert "--weights 1.0 -0.25" in tab.locator("#command textarea").input_value()
    expect(tab.locator("#results figure.input img")).to_have_count(2)


def test_words_alone_make_pictures_of_a_size_that_is_offered(tab: Tab) -> None:
    tab.get_by_text("Text: no picture, words alone").click()
    expect(tab.locator("#pictures")).to_be_hidden()
    tab.get_by_label("Text", exact=True).fill("a guitar")
    tab.click("#more button")
    tab.get_by_label("Size (height x width)").click()
    tab.get_by_role("option").nth(1).click()
    tab.get_by_label("Negative text").fill("blue")
    tab.click("#go")
    expect(tab.get_by_text("Done: 4 pictures.")).to_be_visible()
    assert re.search(r"--height \d+ --width \d+", tab.locator("#command textarea").input_value())


def test_a_bad_file_is_told_and_the_page_goes_on(tab: Tab, tmp_path: Path) -> None:
    bad = tmp_path / "holiday.png"
    bad.write_bytes(GIRAFFE.read_bytes()[:300])
    tab.set_input_files("#pictures input[type=file]", [bad])
    tab.wait_for_selector("#pictures img", state="attached")
    tab.click("#go")
    expect(tab.get_by_role("alert")).to_contain_text("holiday.png: found a damaged PNG file")
    tab.set_input_files("#pictures input[type=file]", [GIRAFFE])
    expect(tab.locator("#pictures img")).to_have_count(2)
    tab.click("#go")
    expect(tab.get_by_text("Done: 4 pictures.")).to_be_visible()
    # The good one is varied, the bad one told.
    expect(tab.get_by_role("alert")).to_contain_text("holiday.png")


def test_nothing_comes_from_elsewhere(browser: Browser, page: Page) -> None:
    with browser.new_context() as context:
        tab = context.new_page()
        asked: list[str] = []
        troubles: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        opened(tab, page)
        drop(tab, OWL)
        tab.click("#go")
        expect(tab.get_by_text("Done: 4 pictures.")).to_be_visible()
        tab.wait_for_timeout(500)
        assert len(asked) > 10
        assert [each for each in asked if not each.startswith((page.url, "data:", "blob:"))] == []
        assert troubles == []


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(browser: Browser, page: Page, width: int, height: int, scheme: Any) -> None:
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme) as context:
        tab = opened(context.new_page(), page)
        drop(tab, GIRAFFE)
        for part in ("#more button", "#compare button", "#go"):
            tab.click(part)
        expect(tab.get_by_text("Done: 4 pictures.")).to_be_visible()
        # Nothing is wider than the screen.
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        found = Axe().run(tab).response["violations"]
        serious = {
            (each["id"], node["html"][:90])
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        }
        # Gradio's own: the small button on its gallery holds a field for files.
        ours = {each for each in serious if not (each[0] == "nested-interactive" and "icon-button" in each[1])}
        assert ours == set()


def ask_by_click(tab: Tab) -> None:
    tab.get_by_text("Text: no picture, words alone").click()
    tab.get_by_label("Text", exact=True).fill("a")
    tab.click("#go")


def test_twenty_at_once_one_cancelled_and_the_end(browser: Browser, tmp_path: Path) -> None:
    """Seventeen are taken, three refused with a word; one that waits is stopped; SIGTERM tells the others."""
    with quick(tmp_path, 300.0, finish="1") as page, contextlib.ExitStack() as stack:
        # Visitors of their own: a browser has six connections to a server for all of one visitor's tabs.
        contexts = [stack.enter_context(browser.new_context()) for _ in range(4)]
        first, second, third, fourth = tabs = [opened(context.new_page(), page) for context in contexts]
        said = {tab: tab.locator("#status p").first for tab in tabs}
        ask_by_click(first)
        expect(said[first]).to_contain_text("Working")
        # Fifteen at once, as a script in the browser sends them.
        sent = first.evaluate(
            """() => Promise.all(Array.from({length: 15}, () => {
                const form = new FormData();
                form.append("settings", JSON.stringify({text: "a"}));
                return fetch("/api/text?wait=false", {method: "POST", body: form}).then(answer => answer.status);
            }))"""
        )
        assert sent == [202] * 15
        ask_by_click(second)
        expect(said[second]).to_contain_text("Waiting: 16 requests first.")
        for tab in (third, fourth):
            ask_by_click(tab)
            expect(said[tab]).to_contain_text("busy: 16 requests wait already")
        # The API has the same queue.
        assert post(page.url, "text", text="a").status_code == 429
        # One that waits is cancelled, and one of those that were refused finds its place.
        second.click("#stop")
        expect(said[second]).to_have_text("Stopped.")
        third.click("#go")
        expect(said[third]).to_contain_text("Waiting: 16 requests first.")
        # Whoever closes the page waits no more.
        third.close()
        wait_until(lambda: page.get("/ready").json()["waiting"] == 15)
        fourth.click("#go")
        expect(said[fourth]).to_contain_text("Waiting: 16 requests first.")
        page.process.send_signal(signal.SIGTERM)
        expect(said[fourth]).to_contain_text("the page is ending")
        expect(said[first]).to_contain_text("the page is ending")
        assert page.process.wait(30) == 0


def test_pictures_are_shown_as_they_are_finished_and_what_runs_can_be_stopped(browser: Browser, tmp_path: Path) -> None:
    with quick(tmp_path, 20.0) as page, browser.new_context() as context:
        tab = opened(context.new_page(), page)
        ask_by_click(tab)
        expect(results(tab)).to_have_count(1)
        expect(tab.locator("#status")).to_contain_text("1 finished so far.")
        expect(tab.locator("#status progress")).to_be_visible()
        tab.click("#stop")
        expect(tab.locator("#status")).to_contain_text("Stopped.")
        expect(tab.locator("#go")).to_be_enabled()
        # What was finished stays.
        assert 1 <= results(tab).count() < 4
        assert not page.get("/ready").json()["running"]
