"""One browser for all tests of the pages: Debian's Chromium, headless, through Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from sites import Site, site

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail("No Chromium. On Debian: apt-get install chromium; or set CHROMIUM to its path.")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages in contexts of their own; an error in one's console fails the test."""
    errors: list[str] = []
    contexts = []

    def make(width: int = 1280, height: int = 820, scheme: str = "light", touch: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            has_touch=touch,  # type: ignore[arg-type]
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda err: errors.append(str(err)))
        page.on(
            "console",
            lambda message: errors.append(message.text) if _is_fault(message.text, message.type) else None,
        )
        return page

    yield make
    for context in contexts:
        context.close()
    assert not errors


def _is_fault(text: str, kind: str) -> bool:
    # Chromium reports requests that fail, too; the pages handle those.
    return kind == "error" and "Failed to load resource" not in text


@pytest.fixture(scope="session")
def edge() -> Iterator[Site]:
    with site() as made:
        yield made


@pytest.fixture
def quick() -> Iterator[Site]:
    with site(step_ms=0.5) as made:
        yield made


@pytest.fixture
def picture() -> Callable[..., None]:
    """Save a screenshot, if PICTURES=1 asks for them. ``after_ms``: when the page is worth it."""

    def save(page: Page, name: str, after_ms: float = 0) -> None:
        if os.environ.get("PICTURES"):
            page.wait_for_timeout(after_ms)
            PICTURES.mkdir(exist_ok=True)
            image = Image.open(BytesIO(page.screenshot()))
            image.quantize(256, dither=Image.Dither.NONE).save(PICTURES / f"{name}.png", optimize=True)

    return save
