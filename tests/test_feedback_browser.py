"""The page of human feedback in real browsers, by keyboard, while the server is killed under them.

``python -m pytest -m slow tests/test_feedback_browser.py``, with selenium (from PyPI), and chromium and chromedriver
(Debian's ``chromium-driver``) on the path.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ptft_hf.feedback.store import Answer, Store
from tests.feedback import collection, needs_server

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
MISSING += [] if importlib.util.find_spec("selenium") else ["selenium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    needs_server,
]
TOKEN = "a-token-of-the-tests"
MARKUP = "<script>document.title = 'obeyed'</script><b>bold</b><img src=x onerror=\"document.title='obeyed'\"> &lt;"
KEYS = {"left": "\ue012", "right": "\ue014", "tie": "t", "both_bad": "b"}
"""U+E012 and U+E014 are the arrow keys in WebDriver."""


class Server:
    """``ptft feedback serve`` in a process of its own, on the same port each time."""

    def __init__(self, database: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.database, self.process = database, self._start(database)

    def _start(self, database: Path) -> subprocess.Popen[str]:
        flags = ["--port", str(self.port), "--token", TOKEN, "--overlap", "0"]
        command = [sys.executable, "-m", "ptft_hf", "feedback", "serve", str(database), *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == f"{self.url}?token={TOKEN}\n"
        return process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def restart(self) -> None:
        self.process = self._start(self.database)


@pytest.fixture
def serving() -> Iterator[Callable[[Path], Server]]:
    servers: list[Server] = []

    def start(database: Path) -> Server:
        servers.append(Server(database))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def browser() -> Iterator[Callable[..., Any]]:
    from selenium import webdriver

    opened: list[Any] = []

    def open_(server: Server, name: str, *, scripts: bool = True) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        if not scripts:
            options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        opened.append(driver)
        driver.get(f"{server.url}?token={TOKEN}")
        until(lambda: driver.current_url == server.url and driver.find_elements("name", "name"))
        driver.find_element("name", "name").send_keys(name + "\n")
        until(lambda: assignment(driver))
        return driver

    yield open_
    for driver in opened:
        driver.quit()


def until(found: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What ``found`` gives as soon as it is true; a page that goes away meanwhile is not."""
    from selenium.common.exceptions import WebDriverException

    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        try:
            if value := found():
                return value
        except WebDriverException:
            pass
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def assignment(driver: Any) -> str | None:
    """The id of the pair that is shown; ``done`` where nothing is left; None on any other page."""
    forms = driver.find_elements("css selector", "form[action='/judge'] input[name=assignment]")
    if forms:
        return str(forms[0].get_attribute("value"))
    return "done" if "Nothing left" in driver.page_source else None


def judge_by_keyboard(driver: Any, server: Server, said: dict[str, str]) -> None:
    """Press keys until nothing is left, and note which for which assignment. Where the server is away, load the page
    again, as a person would."""
    verdicts = list(KEYS)
    while (shown := until(lambda: assignment(driver))) != "done":
        said.setdefault(shown, verdicts[len(said) % 4])
        driver.find_element("tag name", "body").send_keys(KEYS[said[shown]])
        give_up = time.monotonic() + 2

        def moved(shown: str = shown, give_up: float = give_up) -> bool:
            if time.monotonic() > give_up or driver.current_url.startswith("chrome-error"):
                driver.get(server.url)
                return True
            return assignment(driver) not in (shown, None)

        until(moved)


def test_200_judgements_from_two_browsers_while_the_server_is_killed(
    serving: Callable[[Path], Server], browser: Callable[..., Any], tmp_path: Path
):
    server = serving(collection(tmp_path / "f.sqlite", 200))
    said: dict[str, dict[str, str]] = {"anna": {}, "ben": {}}
    drivers = {name: browser(server, name) for name in said}
    threads = [
        threading.Thread(target=judge_by_keyboard, args=(drivers[name], server, said[name])) for name in said
    ]
    for thread in threads:
        thread.start()
    kills = 0
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(timeout=1.1)
        if kills < 4 and sum(map(len, said.values())) > 40 * (kills + 1):
            server.kill()
            kills += 1
            time.sleep(0.3)
            server.restart()
    with Store(tmp_path / "f.sqlite") as store:
        kept = store.rows("SELECT id, annotator, verdict FROM assignments WHERE verdict IS NOT NULL")
        pairs = [one.pair for one in store.judgements()]
    print(f"killed {kills} times; " + ", ".join(f"{name} {len(each)}" for name, each in said.items()))
    assert kills >= 3
    assert sorted(pairs) == list(range(1, 201)), "each pair once, none lost"
    assert {(i, name, verdict) for i, name, verdict in kept} == {
        (i, name, verdict) for name, each in said.items() for i, verdict in each.items()
    }
    assert min(map(len, said.values())) > 20, "both were at it"


def test_markup_is_shown_as_text_and_nothing_is_refused_by_the_pages_own_policy(
    serving: Callable[[Path], Server], browser: Callable[..., Any], tmp_path: Path
):
    with Store(tmp_path / "f.sqlite", create=True) as store:
        store.add([(f"p {MARKUP}", [Answer("m", 0, f"one {MARKUP}"), Answer("m", 1, f"two {MARKUP}")])])
    driver = browser(serving(tmp_path / "f.sqlite"), "anna")
    shown = {element.text for element in driver.find_elements("class name", "text")}
    assert shown == {f"{name} {MARKUP}" for name in ("p", "one", "two")}
    assert driver.title == "Which answer is better?"
    assert not driver.find_elements("css selector", ".text *")
    assert driver.find_element("css selector", ".better").value_of_css_property("font-weight") == "600"
    refused = [line for line in driver.get_log("browser") if "Content Security Policy" in line["message"]]
    assert not refused


@pytest.mark.parametrize("path", ["", "?token=wrong", "page.js"])
def test_a_request_without_the_token_is_refused(
    serving: Callable[[Path], Server], tmp_path: Path, path: str
):
    server = serving(collection(tmp_path / "f.sqlite", 1))
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(server.url + path)
    with raised.value as answer:
        assert answer.code == 403
        assert b"short" not in answer.read()


def test_without_javascript_the_buttons_do(
    serving: Callable[[Path], Server], browser: Callable[..., Any], tmp_path: Path
):
    driver = browser(serving(collection(tmp_path / "f.sqlite", 2)), "anna", scripts=False)
    assert not [kbd for kbd in driver.find_elements("tag name", "kbd") if kbd.is_displayed()]
    first = assignment(driver)
    driver.find_element("css selector", "[value=tie]").click()
    second = until(lambda: assignment(driver) not in (first, None) and assignment(driver))
    driver.find_element("css selector", "form[action='/undo'] button").click()
    until(lambda: "seen this pair before" in driver.page_source)
    assert assignment(driver) not in (first, second)
    with Store(tmp_path / "f.sqlite") as store:
        assert store.judgements() == []


def test_keys_can_be_turned_off_and_undo_has_one(
    serving: Callable[[Path], Server], browser: Callable[..., Any], tmp_path: Path
):
    driver = browser(serving(collection(tmp_path / "f.sqlite", 3)), "anna")
    press = lambda key: driver.find_element("tag name", "body").send_keys(key)  # noqa: E731
    first = assignment(driver)
    press("s")
    second = until(lambda: assignment(driver) not in (first, None) and assignment(driver))
    press("u")
    again = until(lambda: assignment(driver) not in (second, None) and assignment(driver))
    driver.find_element("id", "keys").click()
    press("t")
    time.sleep(0.3)
    assert assignment(driver) == again
    driver.refresh()
    assert not driver.find_element("id", "keys").is_selected()
