"""The page on which people say which of two answers is better.

It is for loopback, behind a token. The link that is printed once holds it; from then on it is in a cookie that
scripts cannot read and other sites cannot have sent, and whatever comes without it is refused. What changes something
is a POST of the page's own (checked by ``Sec-Fetch-Site`` and ``Origin``). Answers are text: the template escapes
them, and the Content-Security-Policy lets no script or style run but the page's own two files.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import jinja2

from ptft_hf import report
from ptft_hf.errors import DataError, OutputError, RecipeError
from ptft_hf.feedback import judging
from ptft_hf.feedback.choosing import Policy
from ptft_hf.feedback.store import Store

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise RecipeError(f"ptft feedback serve: needs {error.name}: pip install 'ptft-hf[feedback]'") from error

HERE = Path(__file__).parent
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers would send "Origin: null" with forms
    "Cache-Control": "no-store",
}
LARGEST_FORM = 10_000
"""Bytes; the page's own forms have a few hundred."""
COOKIE_SECONDS = 30 * 24 * 3600
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Handler = Callable[[Request], Awaitable[Response]]


class Gate:
    """Everything passes it: without the token nothing is answered, and nothing is changed from another site.

    Args:
        app: What is behind it.
        token: The secret of the printed link.
    """

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token
        # Cookies are sent to every port of a host, so each server has its own.
        self.cookie = f"feedback-{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":  # no lifespan, no web sockets
            return
        request = Request(scope, receive)
        if request.method == "GET" and request.url.path == "/" and "token" in request.query_params:
            response = self.enter(request)
        elif not self.knows(request.cookies.get(self.cookie, "")):
            response = refusal("open the link that `ptft feedback serve` printed when it was started")
        elif request.method not in ("GET", "HEAD") and not is_same_origin(request.headers):
            response = refusal("this request comes from another site")
        else:
            await self.app(scope, receive, with_headers(send))
            return
        await response(scope, receive, with_headers(send))

    def knows(self, token: str) -> bool:
        """Compared in a time that does not tell how much of it is right."""
        return secrets.compare_digest(token.encode(), self.token.encode())

    def enter(self, request: Request) -> Response:
        if not self.knows(request.query_params["token"]):
            return refusal("this is not the link of the server that runs now")
        # Not by a redirect: a browser that follows the link from another site would not send the cookie with that.
        response = HTMLResponse(page("enter"))
        options: dict[str, Any] = {"httponly": True, "samesite": "strict", "max_age": COOKIE_SECONDS}
        response.set_cookie(self.cookie, self.token, **options)
        return response


def refusal(why: str) -> Response:
    return PlainTextResponse(f"403: {why}\n", status_code=403)


def is_same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request was made by a page of this server. A browser says so by ``Sec-Fetch-Site`` or ``Origin``; one
    that says neither is not believed."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None and origin is None:
        return False
    own = origin is None or urlsplit(origin).netloc == headers.get("host")
    return own and site in (None, "same-origin")


def with_headers(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sending


TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    (HERE / "page.html").read_text("utf-8")
)


def page(view: str, **values: Any) -> str:
    """``page.html``, with everything escaped: views are ``enter``, ``name``, ``pair`` and ``done``."""
    return TEMPLATE.render(view=view, **values)


# ---- what is behind the gate ----


class Pages:
    """The handlers.

    Args:
        store: The database.
        policy: Which pair is next.
    """

    def __init__(self, store: Store, policy: Policy) -> None:
        self.store, self.policy = store, policy

    async def show(self, request: Request) -> Response:
        name = annotator(request)
        return HTMLResponse(await run_in_threadpool(self.view, name) if name else page("name", name=""))

    def view(self, name: str) -> str:
        showing = judging.assign(self.store, name, self.policy)
        progress = judging.progress(self.store, name, self.policy)
        return page("done" if showing is None else "pair", pair=showing, progress=progress, name=name)

    async def ask_name(self, request: Request) -> Response:
        return HTMLResponse(page("name", name=annotator(request)))

    async def set_name(self, request: Request) -> Response:
        given = (await form(request)).get("name", "")
        try:
            name = await run_in_threadpool(judging.annotator_name, self.store, given)
        except DataError as error:
            return HTMLResponse(page("name", name=given[:200], fault=str(error)), status_code=400)
        response = back()
        options: dict[str, Any] = {"httponly": True, "samesite": "strict", "max_age": COOKIE_SECONDS}
        response.set_cookie("annotator", quote(name), **options)
        return response

    async def judge(self, request: Request) -> Response:
        sent = await form(request)
        values = (sent.get("assignment", ""), sent.get("verdict", ""))
        await run_in_threadpool(judging.judge, self.store, *values)
        return back()

    async def undo(self, request: Request) -> Response:
        sent = await form(request)
        await run_in_threadpool(judging.undo, self.store, sent.get("assignment", ""))
        return back()

    async def ask_again(self, request: Request) -> Response:
        if name := annotator(request):
            await run_in_threadpool(judging.ask_again, self.store, name)
        return back()


def back() -> Response:
    """To the page, by GET: to load it again then sends nothing again."""
    return RedirectResponse("/", status_code=303)


def annotator(request: Request) -> str:
    return unquote(request.cookies.get("annotator", ""))


async def form(request: Request) -> dict[str, str]:
    """The fields of a form, the first of each name.

    Raises:
        DataError: It is longer than any of ours.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_FORM:
            raise DataError(f"the form has more than {LARGEST_FORM:,} bytes")
    fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
    return {name: values[0] for name, values in fields.items()}


def static(name: str, kind: str) -> Handler:
    text = (HERE / name).read_text("utf-8")

    async def answer(request: Request) -> Response:
        return PlainTextResponse(text, media_type=kind)

    return answer


async def fault(request: Request, error: Exception) -> Response:
    status = 503 if isinstance(error, OutputError) else 400
    return PlainTextResponse(f"{status}: {error}\n", status_code=status)


def make_app(store: Store, policy: Policy, token: str) -> Gate:
    """The ASGI application.

    Args:
        store: The database, opened.
        policy: Which pair is next.
        token: What the link must hold.
    """
    pages = Pages(store, policy)
    routes = [
        Route("/", pages.show),
        Route("/name", pages.ask_name),
        Route("/name", pages.set_name, methods=["POST"]),
        Route("/judge", pages.judge, methods=["POST"]),
        Route("/undo", pages.undo, methods=["POST"]),
        Route("/again", pages.ask_again, methods=["POST"]),
        Route("/page.css", static("page.css", "text/css")),
        Route("/page.js", static("page.js", "text/javascript")),
    ]
    return Gate(Starlette(routes=routes, exception_handlers={DataError: fault, OutputError: fault}), token)


# ---- running it ----


def serve(
    database: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    policy: Policy | None = None,
    reward: Any = None,
) -> None:
    """Serve the page until it is interrupted, and print its link first.

    Args:
        database: Made by :func:`ptft_hf.feedback.generate` or :func:`ptft_hf.feedback.import_pairs`.
        host: Loopback by default. The page is not encrypted: for another machine use a tunnel (``ssh -L``).
        port: 0 takes any that is free.
        token: At least 16 letters, digits, ``-`` and ``_``; a random one by default, so that links end with the
            server. Give one for links and cookies that outlive a restart.
        policy: Which pair is next; :class:`~ptft_hf.feedback.choosing.Policy` has the defaults.
        reward: For ``Policy(order="uncertain")``, what scores the answers first; see
            :func:`ptft_hf.feedback.score`. None: they have scores.

    Raises:
        DataError: Options mean nothing, or the database is not there, holds no pairs or lacks scores.
        OutputError: The address cannot be had.
    """
    policy = policy or Policy()
    token = token or secrets.token_urlsafe(32)
    if faults := [*policy.faults(), *address_faults(port, token)]:
        raise DataError(*faults)
    with Store(database) as store:
        if not store.counts()["pairs"]:
            raise DataError(f"{database}: holds no pairs yet; `ptft feedback generate` or `import` adds some")
        if reward is not None:
            from ptft_hf.feedback import scoring

            scoring.score(store, reward)
        if policy.order == "uncertain" and (missing := len(store.unscored())):
            raise DataError(
                f"{database}: {missing:,} answers have no score, by which to tell what is uncertain; give a reward "
                "model (--reward)"
            )
        with listening(host, port) as server:
            place = f"[{host}]" if ":" in host else host
            if host not in LOOPBACK:
                report.say(f"- {host} can be reached from other machines, and nothing is encrypted", style="yellow")
            print(f"http://{place}:{server.getsockname()[1]}/?token={token}", flush=True)
            report.say("- open this link; Ctrl-C ends the server, and whatever was judged is kept")
            # uvicorn's own configuration of logging would close everybody else's handlers.
            quiet: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}
            config = uvicorn.Config(make_app(store, policy, token), lifespan="off", server_header=False, **quiet)
            uvicorn.Server(config).run(sockets=[server])


def address_faults(port: int, token: str) -> list[str]:
    """What is wrong with them, one sentence each."""
    faults = []
    if not 0 <= port < 2**16:
        faults.append(f"port: {port} is not a number from 0 to 65535")
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,}", token):
        faults.append("token: give at least 16 letters, digits, - or _ (or none, and a random one is made)")
    return faults


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OutputError: The port is taken, or the host is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        where = f"--host {host} --port {port}"
        raise OutputError(f"{where}: {error.strerror}; --port 0 takes any port that is free") from error
