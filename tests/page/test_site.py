"""The site that `make docs` has built: everybody can read it, and its links lead somewhere."""

from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, sync_playwright

from tests.page.processes import ROOT

SITE = ROOT / "build/docs"
PAGES = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)
# Of every kind that there is: lists, tables, code, a notebook's results, functions, wide tables.
LOOKED_AT = ["index", "start", "tour", "moving", "page", "performance", "commands", "reference", "results/variation"]


class Anchors(HTMLParser):
    """A page's links within the site, and the places that others can lead to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.names = list[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names |= {value for key in ("id", "name") if (value := found.get(key))}
        self.links += [value for key in ("href", "src") if (value := found.get(key))]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_everybody_can_read_it(browser: Browser, name: str, scheme: Any) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme) as context:
        tab = context.new_page()
        tab.goto((SITE / f"{name}.html").as_uri())
        found = Axe().run(tab).response["violations"]
    serious = [
        (each["id"], node["html"][:120], node["failureSummary"])
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
    assert not serious


def test_links_within_the_site_lead_somewhere() -> None:
    read = {path: Anchors(path.read_text(encoding="utf-8")) for path in PAGES}
    seen = 0
    for path, page in read.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in read:
                assert unquote(parts.fragment) in read[target].names, f"{path.name}: {link}"
            seen += 1
    assert seen > 1000
