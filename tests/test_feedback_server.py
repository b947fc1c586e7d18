"""The page of human feedback over HTTP: who is let in, what is shown, and what a click does."""

from __future__ import annotations

import contextlib
import html
import re
import socket
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ptft_hf.errors import DataError, OutputError, RecipeError
from ptft_hf.feedback.choosing import Policy
from ptft_hf.feedback.store import Answer, Store
from tests.feedback import ALONE, collection, judge_all, needs_server

pytestmark = needs_server
TOKEN = "a-token-of-the-tests"
MARKUP = "<script>document.title='obeyed'</script><b>bold</b> &amp; \"quoted\""
SAME = {"Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"}


class Browser:
    """A client with cookies that has opened the link and said a name."""

    def __init__(self, app: Any, name: str | None) -> None:
        from starlette.testclient import TestClient

        self.client = TestClient(app, follow_redirects=False)
        if name is not None:
            assert self.client.get(f"/?token={TOKEN}").status_code == 200
            self.post("/name", name=name)

    def page(self) -> str:
        done = self.client.get("/")
        assert done.status_code == 200
        return str(done.text)

    def post(self, where: str, **fields: str) -> Any:
        return self.client.post(where, data=fields, headers=SAME)

    def assignment(self, form: str = "/judge") -> str:
        found = re.search(rf'action="{form}">\s*<input type="hidden" name="assignment" value="([^"]+)"', self.page())
        assert found is not None
        return found[1]

    def judge(self, verdict: str) -> Any:
        return self.post("/judge", assignment=self.assignment(), verdict=verdict)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(collection(tmp_path / "f.sqlite", 5)) as opened:
        yield opened


def app(store: Store, policy: Policy = ALONE) -> Any:
    from ptft_hf.feedback.server import make_app

    return make_app(store, policy, TOKEN)


# ---- who is let in ----


@pytest.mark.parametrize("path", ["/", "/name", "/page.css", "/page.js", "/nothing", "/?token=", "/?token=wrong",
                                  f"/name?token={TOKEN}", f"/page.css?token={TOKEN}"])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT"])
def test_without_the_token_nothing_is_answered(store: Store, path: str, method: str):
    browser = Browser(app(store), None)
    done = browser.client.request(method, path, headers=SAME)
    assert done.status_code == 403
    assert "set-cookie" not in done.headers
    assert store.rows("SELECT count(*) FROM assignments")[0][0] == 0


def test_a_wrong_cookie_is_refused_as_none_is(store: Store):
    gate = app(store)
    client = Browser(gate, None).client
    assert client.get("/", headers={"Cookie": f"{gate.cookie}={TOKEN}"}).status_code == 200
    for wrong in (TOKEN[:-1], TOKEN + "x", ""):
        assert client.get("/", headers={"Cookie": f"{gate.cookie}={wrong}"}).status_code == 403


def test_the_link_sets_a_cookie_that_scripts_and_other_sites_do_not_have(store: Store):
    done = Browser(app(store), None).client.get(f"/?token={TOKEN}")
    cookie = done.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=strict", "path=/"))
    assert TOKEN not in done.text
    assert 'content="0; url=/"' in done.text


@pytest.mark.parametrize("headers", [
    {}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "none"}, {"Origin": "http://testserver", "Sec-Fetch-Site": "same-site"},
    {"Origin": "http://testserver:81"},
])  # fmt: skip
def test_a_post_from_elsewhere_changes_nothing(store: Store, headers: dict[str, str]):
    browser = Browser(app(store), "anna")
    fields = {"assignment": browser.assignment(), "verdict": "left"}
    assert browser.client.post("/judge", data=fields, headers=headers).status_code == 403
    assert store.judgements() == []


@pytest.mark.parametrize("headers", [{"Origin": "http://testserver"}, {"Sec-Fetch-Site": "same-origin"}])
def test_a_browser_that_says_one_of_the_two_is_enough(store: Store, headers: dict[str, str]):
    browser = Browser(app(store), "anna")
    fields = {"assignment": browser.assignment(), "verdict": "left"}
    assert browser.client.post("/judge", data=fields, headers=headers).status_code == 303
    assert len(store.judgements()) == 1


def test_every_answer_forbids_what_is_not_the_pages_own(store: Store):
    browser = Browser(app(store), "anna")
    for done in (browser.client.get("/"), browser.client.get("/page.js"), Browser(app(store), None).client.get("/")):
        policy = done.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'self'; script-src 'self';")
        assert "unsafe" not in policy
        assert done.headers["x-content-type-options"] == "nosniff"
        assert done.headers["cache-control"] == "no-store"
        assert "server" not in done.headers
    assert not re.search(r"https?://|//\w|<style|<script>| on\w+=| style=", browser.page())


# ---- what is shown ----


def test_markup_is_text(tmp_path: Path):
    with Store(tmp_path / "m.sqlite", create=True) as store:
        store.add([(f"prompt {MARKUP}", [Answer("m", 0, f"one {MARKUP}"), Answer("m", 1, f"two {MARKUP}")])])
        page = Browser(app(store), f"anna {MARKUP[:8]}").page()
    assert "<b>" not in page and "<script>document" not in page
    for text in (f"prompt {MARKUP}", f"one {MARKUP}", f"two {MARKUP}", "anna <script>: 0"):
        assert text in html.unescape(page)


def test_a_conversation_is_shown_by_turns_without_a_templates_marks(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": f"Be kind. {MARKUP}"}, {"role": "user", "content": " What?\n\nNow!\n"}]
    with Store(tmp_path / "m.sqlite", create=True) as store:
        store.add([("<|im_start|>system", [Answer("m", 0, "one"), Answer("m", 1, "two")])], [turns])
        page = Browser(app(store), "anna").page()
    assert "im_start" not in page and "<b>" not in page and "<script>document" not in page
    assert re.findall(r"<dt>(.*)</dt>", page) == ["system", "user"]
    shown = re.findall(r"<dd>(.*?)</dd>", page, re.DOTALL)
    assert list(map(html.unescape, shown)) == [f"Be kind. {MARKUP}", "What?\n\nNow!"]


def test_the_page_is_blind(store: Store):
    page = Browser(app(store), "anna").page()
    assert "short" in page and "a longer one" in page
    assert "alpha" not in page and "beta" not in page


def test_the_first_thing_that_is_asked_is_a_name(store: Store):
    browser = Browser(app(store), "anna")
    browser.client.cookies.delete("annotator")
    assert "Who are you?" in browser.page()
    refused = browser.post("/name", name=" ")
    assert refused.status_code == 400
    assert 'role="alert"' in refused.text
    browser.post("/name", name="Bénédicte, 2nd; ü")
    assert "Bénédicte, 2nd; ü: 0" in browser.page()


# ---- what a click does ----


def test_a_click_is_recorded_and_shows_the_next_pair(store: Store):
    browser = Browser(app(store), "anna")
    assert "0 of 5 judgements" in browser.page()
    for number, verdict in enumerate(("left", "right", "tie", "both_bad", "skip")):
        done = browser.judge(verdict)
        assert (done.status_code, done.headers["location"]) == (303, "/")
        assert len(store.judgements()) == min(number + 1, 4)
    page = browser.page()
    assert "Nothing left for you" in page and "the 1 that I skipped" in page and "4 of 5 judgements" in page
    browser.post("/again")
    assert "Which answer is better?" in browser.page()
    browser.judge("left")
    assert "5 of 5" in browser.page() and "skipped" not in browser.page()


def test_undo_and_clicks_that_come_twice(store: Store):
    browser = Browser(app(store), "anna")
    first = browser.assignment()
    for _ in range(2):
        assert browser.post("/judge", assignment=first, verdict="left").status_code == 303
    assert len(store.judgements()) == 1
    assert browser.assignment("/undo") == first
    for _ in range(2):
        browser.post("/undo", assignment=first)
    assert store.judgements() == []
    assert "You have seen this pair before" in browser.page()
    browser.post("/judge", assignment=first, verdict="left")  # late
    assert store.judgements() == []
    assert browser.judge("right").status_code == 303
    assert [one.verdict for one in store.judgements()] == ["right"]


def test_two_annotators_with_overlap(store: Store):
    both = app(store, Policy(overlap=1))
    anna, ben = Browser(both, "anna"), Browser(both, "ben")
    for _ in range(5):
        anna.judge("left")
        ben.judge("right")
    assert "10 of 10" in anna.page() and "Nothing left" in ben.page()
    assert {(one.pair, one.annotator) for one in store.judgements()} == {
        (pair, name) for pair in range(1, 6) for name in ("anna", "ben")
    }


def test_a_new_server_goes_on_where_the_old_one_was(store: Store):
    before = Browser(app(store), "anna")
    before.judge("left")
    shown = before.assignment()
    after = Browser(app(store), "anna")
    assert after.assignment() == shown
    assert "1 of 5" in after.page()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"assignment": "x", "verdict": "left"}, "is not known here"),
        ({"verdict": "left"}, "is not known here"),
        ({}, "is none of left, right"),
        ({"assignment": "x" * 20_000, "verdict": "left"}, "more than 10,000 bytes"),
    ],
)
def test_forms_that_are_not_ours(store: Store, fields: dict[str, str], words: str):
    done = Browser(app(store), "anna").post("/judge", **fields)
    assert done.status_code == 400
    assert words in done.text


def test_a_click_that_cannot_be_written_says_so_and_works_when_it_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ptft_hf.feedback.store.BUSY_SECONDS", 0.05)
    with Store(collection(tmp_path / "f.sqlite", 1)) as store:
        browser = Browser(app(store), "anna")
        fields = {"assignment": browser.assignment(), "verdict": "tie"}
        with contextlib.closing(sqlite3.connect(store.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            refused = browser.post("/judge", **fields)
        assert (refused.status_code, refused.text) == (503, f"503: {store.path}: database is locked\n")
        assert browser.post("/judge", **fields).status_code == 303
        assert [one.verdict for one in store.judgements()] == ["tie"]


# ---- starting it ----


def test_options_are_checked_before_anything_listens(store: Store, tmp_path: Path):
    from ptft_hf.feedback.server import serve

    with pytest.raises(DataError) as raised:
        serve(store.path, token="short", port=70_000, policy=Policy(overlap=2))
    assert [problem.partition(":")[0] for problem in raised.value.problems] == ["overlap", "port", "token"]
    with pytest.raises(DataError, match="10 answers have no score"):
        serve(store.path, policy=Policy("uncertain"))
    Store(tmp_path / "empty.sqlite", create=True).close()
    with pytest.raises(DataError, match="holds no pairs yet"):
        serve(tmp_path / "empty.sqlite")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OutputError, match=f"--port {port}: Address already in use"):
            serve(store.path, port=port)


def test_without_starlette_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "ptft_hf.feedback.server", raising=False)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(RecipeError, match=r"pip install 'ptft-hf\[feedback\]'"):
        import ptft_hf.feedback.server  # noqa: F401


def test_what_a_done_collection_shows_to_a_newcomer(store: Store):
    judge_all(store, "anna")
    assert "Nothing left for you" in Browser(app(store), "ben").page()
