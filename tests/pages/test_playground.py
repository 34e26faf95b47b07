"""The playground in a real browser, over a real edge, link and server of a scripted target."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable

import pytest
from faults import faults
from playwright.sync_api import Page, expect
from scripted_text import CUE, HOSTILE, SCRIPTS
from sites import KEY, Site, site

NewPage = Callable[..., Page]
Picture = Callable[[Page, str], None]


def ask(page: Page, name: str) -> None:
    page.locator("#text").fill(name + CUE)
    page.keyboard.press("Enter")


def done(page: Page, answers: int = 1) -> None:
    """Wait until so many answers are complete."""
    expect(page.locator(".foot")).to_have_count(answers)
    expect(page.locator(".foot").last).to_contain_text("tokens", timeout=30_000)
    expect(page.locator("#send")).to_have_text("Send")


def api_text(url: str, name: str, most: int = 256) -> str:
    body = {"messages": [{"role": "user", "content": name + CUE}], "temperature": 0, "max_tokens": most}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def body_text(page: Page) -> str:
    return str(page.locator(".answer .body").last.evaluate("element => element.textContent"))


def test_an_answer_is_coloured_by_origin_and_equals_the_api(edge: Site, new_page: NewPage) -> None:
    page = new_page()
    page.goto(edge.url)
    expect(page.locator("#link")).to_contain_text("linked")
    ask(page, "short")
    done(page)
    assert body_text(page) == api_text(edge.url, "short") == SCRIPTS["short"]
    accepted, own = page.locator(".answer .t.accepted"), page.locator(".answer .t.target")
    assert accepted.count() > 5
    assert own.count() + page.locator(".answer .t.matched").count() > 1
    assert accepted.count() == int(page.locator("#n-accepted").inner_text())
    colours = [one.first.evaluate("e => getComputedStyle(e).backgroundColor") for one in (accepted, own)]
    assert colours[0] != colours[1]
    accepted.first.hover()
    expect(page.locator("#tip")).to_contain_text("accepted by the target")
    expect(page.locator("#tip")).to_contain_text("expected acceptance")
    expect(page.locator("#tip")).to_contain_text("target’s probability")
    page.locator("aside summary").click()
    assert page.locator("#round-rows tr").count() > 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_answer_in_prose_and_code(new_page: NewPage, picture: Picture, scheme: str) -> None:
    with site(step_ms=30.0) as slower:
        page = new_page(scheme=scheme)
        page.goto(slower.url)
        page.locator("#drafting").uncheck()
        ask(page, "short")
        done(page)
        page.locator("#drafting").check()
        ask(page, "explain")
        done(page, 2)
        assert body_text(page) == SCRIPTS["explain"]
        assert page.locator(".answer .code").count() == 1
        page.locator(".message").first.evaluate("e => e.hidden = true")
        page.locator(".answer").last.locator(".t.target").nth(1).hover()
        expect(page.locator("#tip")).to_be_visible()
        picture(page, f"playground-{scheme}")


def test_openai_clients_see_nothing_of_the_playground(edge: Site) -> None:
    body = {"messages": [{"role": "user", "content": "short" + CUE}], "temperature": 0, "stream": True}
    request = urllib.request.Request(f"{edge.url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        lines = [line for line in response.read().decode().splitlines() if line.strip()]
    assert all(line.startswith("data: ") for line in lines)
    assert "origin" not in "".join(lines)


def test_drafting_is_switched_while_it_writes(new_page: NewPage, picture: Picture) -> None:
    with site(step_ms=15.0) as slow:
        page = new_page()
        page.goto(slow.url)
        ask(page, "long")
        expect(page.locator(".answer .t").nth(60)).to_be_attached()
        page.locator("#drafting").uncheck()
        expect(page.locator("#slow")).not_to_have_text("–")
        before = page.locator(".answer .t").count()
        expect(page.locator(".answer .t").nth(before + 20)).to_be_attached()
        page.locator("#drafting").check()
        expect(page.locator("#ratio")).to_contain_text("times as fast")
        picture(page, "playground-writing")
        done(page)
        assert body_text(page) == SCRIPTS["long"][:256]
        assert page.locator(".answer .t.target").count() > page.locator(".answer .t.accepted").count() / 10


def test_the_server_is_lost_and_comes_back(new_page: NewPage, picture: Picture) -> None:
    with site(step_ms=15.0) as slow:
        page = new_page()
        page.goto(slow.url)
        ask(page, "long")
        expect(page.locator(".answer .t").nth(40)).to_be_attached()
        slow.lose_server()
        expect(page.locator("#link")).to_contain_text("reconnecting")
        picture(page, "playground-lost")
        assert not faults(page)
        slow.find_server()
        done(page)
        expect(page.locator("#link")).to_contain_text("linked")
        assert body_text(page) == SCRIPTS["long"][:256]


def test_without_a_server_the_page_says_so_and_tries_again(new_page: NewPage, picture: Picture) -> None:
    with site(give_up_ms=50.0) as brittle:
        page = new_page()
        page.goto(brittle.url)
        brittle.lose_server()
        expect(page.locator("#link")).to_contain_text("no server")
        ask(page, "short")
        expect(page.locator("#notice")).to_be_visible()
        picture(page, "playground-error")
        assert not faults(page)
        brittle.find_server()
        expect(page.locator("#link")).to_contain_text("linked")
        page.locator("#again").click()
        done(page)
        assert body_text(page) == SCRIPTS["short"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_text_is_only_text(edge: Site, new_page: NewPage, scheme: str) -> None:
    page = new_page(scheme=scheme)
    page.goto(edge.url)
    page.locator("details summary", has_text="Options").click()
    page.locator("#max-tokens").fill("2000")
    ask(page, "hostile")
    done(page)
    assert body_text(page) == HOSTILE == api_text(edge.url, "hostile", 2000)
    assert page.title() == "wispprof playground"
    assert page.locator(".answer script, .answer img").count() == 0
    code = page.locator(".answer .code")
    assert code.count() == 1
    assert str(code.evaluate("e => e.textContent")).startswith("```python\ndef f(x)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not faults(page)


def test_hostile_questions_are_only_text(edge: Site, new_page: NewPage) -> None:
    page = new_page()
    page.goto(edge.url)
    question = HOSTILE.strip() + "\nshort"
    ask(page, question)
    done(page)
    assert page.locator(".question").evaluate("e => e.textContent") == question + CUE
    assert body_text(page) == SCRIPTS["short"]
    assert page.title() == "wispprof playground"


def test_two_thousand_tokens_and_flat_memory(quick: Site, new_page: NewPage) -> None:
    page = new_page()
    page.goto(quick.url)
    page.locator("details summary", has_text="Options").click()
    page.locator("#max-tokens").fill("2000")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    sizes, nodes = [], []
    for _ in range(3):
        ask(page, "long")
        done(page)
        assert body_text(page) == SCRIPTS["long"]
        assert page.locator(".answer .t").count() >= 1990
        page.locator("#new").click()
        devtools.send("HeapProfiler.collectGarbage")
        found = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
        sizes.append(found["JSHeapUsedSize"])
        nodes.append(found["Nodes"])
    assert sizes[-1] < 1.1 * sizes[1] + 200_000, sizes
    assert nodes[-1] < 1.1 * nodes[1] + 200, nodes


def test_with_the_keyboard_alone(edge: Site, new_page: NewPage) -> None:
    page = new_page()
    page.goto(edge.url)
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("short" + CUE)
    page.keyboard.press("Enter")
    done(page)
    page.keyboard.press("Tab")
    expect(page.locator("#drafting")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.locator("#drafting")).not_to_be_checked()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    expect(page.locator(".answer")).to_be_focused()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator(".t.here")).to_have_count(1)
    expect(page.locator("#tip")).to_be_visible()
    expect(page.locator("#spoken")).to_contain_text("round")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()


def test_on_a_phone(edge: Site, new_page: NewPage, picture: Picture) -> None:
    page = new_page(width=390, height=844, touch=True)
    page.goto(edge.url)
    ask(page, "explain")
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(".answer .t.accepted").first.tap()
    expect(page.locator("#tip")).to_be_visible()
    box = page.locator("#tip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    picture(page, "playground-phone")
    assert not faults(page)


def test_a_slow_server_of_three_tokens_a_second(new_page: NewPage) -> None:
    with site(step_ms=333.0, drafter="none") as slow:
        page = new_page()
        page.goto(slow.url)
        expect(page.locator("#drafting")).to_be_disabled()
        ask(page, "short")
        expect(page.locator(".answer .t").nth(3)).to_be_attached()
        expect(page.locator(".answer")).to_have_class(re.compile("writing"))
        page.locator("#send").click()
        expect(page.locator(".foot")).to_have_text("stopped")
        assert SCRIPTS["short"].startswith(body_text(page))


def test_the_key_stays_in_the_edge(new_page: NewPage) -> None:
    with site(keys=(KEY,)) as keyed:
        page = new_page()
        headers: list[str] = []
        page.on("response", lambda one: headers.append(one.url + str(one.headers)))
        page.goto(keyed.url)
        ask(page, "short")
        done(page)
        status = urllib.request.urlopen(f"{keyed.url}/playground/status").read().decode()
        assert len(headers) > 5
        assert KEY not in "".join(headers) + page.content() + status


def test_everything_comes_from_the_edge_under_a_strict_policy(edge: Site, new_page: NewPage) -> None:
    page = new_page()
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.goto(edge.url)
    expect(page.locator("#link")).to_contain_text("linked")
    assert all(url.startswith(edge.url) for url in asked)
    response = urllib.request.urlopen(edge.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", response.read().decode())
