"""The server's page in a real browser, over a server with sessions of several devices and classes."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from faults import faults
from playwright.sync_api import Page, expect
from scripted_server import KINDS, busy_server
from sites import KEY, threaded

NewPage = Callable[..., Page]
Picture = Callable[..., None]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with threaded(lambda: busy_server(24)) as (running, _):
        yield running.http_url


def get(url: str, key: str = "") -> dict[str, object]:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request) as response:
        return dict(json.load(response))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_what_the_server_does(
    server: str, new_page: NewPage, picture: Picture, scheme: str
) -> None:
    page = new_page(height=1480, scheme=scheme)
    page.goto(server)
    expect(page.locator("#state")).to_have_text("serving")
    expect(page.locator("#f-sessions")).to_have_text("24")
    expect(page.locator("#sessions tr")).to_have_count(24)
    expect(page.locator("#kinds th")).to_have_text(sorted(KINDS))
    expect(page.locator("#classes th")).to_have_text(["6", "12", "24"])
    expect(page.locator("#drafts tr").first).to_contain_text("drafted")
    expect(page.locator("#f-speed")).not_to_have_text("–")
    expect(page.locator("#f-attainment")).not_to_have_text("–", timeout=20_000)
    picture(page, f"server-{scheme}", 9_000)
    assert not faults(page)


def test_a_pause_stops_the_asking(server: str, new_page: NewPage) -> None:
    page = new_page()
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.goto(server)
    expect(page.locator("#state")).to_have_text("serving")
    page.locator("#pause").click()
    expect(page.locator("#state")).to_have_text("paused")
    page.wait_for_timeout(200)
    before = len(asked)
    page.wait_for_timeout(1_500)
    assert len(asked) == before
    page.locator("#pause").click()
    expect(page.locator("#state")).to_have_text("serving")


def test_a_permalink_opens_its_step(server: str, new_page: NewPage) -> None:
    page = new_page()
    page.goto(server)
    expect(page.locator("#f-speed")).not_to_have_text("–")
    page.locator("#steps").focus()
    page.keyboard.press("ArrowRight")
    title = page.locator("#step-title")
    expect(title).to_contain_text("Step")
    link = page.locator("#step-link").get_attribute("href")
    assert link is not None
    number = int(link.rpartition("=")[2])
    assert get(f"{server}/steps/{number}")["step"] == number
    shown = page.locator("#step-facts").inner_text()
    other = new_page()
    other.goto(server + "/" + link)
    expect(other.locator("#step-title")).to_have_text(title.inner_text())
    assert (
        shown.split("policy")[0].strip()
        == other.locator("#step-facts").inner_text().split("policy")[0].strip()
    )
    other.goto("about:blank")
    other.goto(f"{server}/#run=another&step=1")
    expect(other.locator("#step-title")).to_contain_text("not held any more")


def test_on_a_phone(server: str, new_page: NewPage, picture: Picture) -> None:
    page = new_page(width=390, height=844)
    page.goto(server)
    expect(page.locator("#f-speed")).not_to_have_text("–")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, "server-phone")
    assert not faults(page)


def test_the_data_are_behind_the_key(new_page: NewPage, picture: Picture) -> None:
    with threaded(lambda: busy_server(3, (KEY,))) as (running, _):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{running.http_url}/dashboard")
        assert get(f"{running.http_url}/dashboard", KEY)["target"] == "example-32b"
        page = new_page()
        page.goto(running.http_url)
        expect(page.locator("#login")).to_be_visible()
        assert "example-32b" not in page.content()
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#login-fault")).to_be_visible()
        picture(page, "server-key")
        assert not faults(page)
        page.locator("#key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#f-sessions")).to_have_text("3")
