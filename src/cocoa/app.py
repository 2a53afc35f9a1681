"""`cocoa app`: a page on which a store of `cocoa index` is searched, by Gradio.

Pictures on it are the stored thumbnails, inside the page; no file of this machine is served but what a visitor has
uploaded. Uploads are bounded and do not last. Nothing is fetched from elsewhere, neither by the page nor by the server.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cocoa.errors import CocoaError
from cocoa.pairs import Side
from cocoa.preview_html import page_environment
from cocoa.search import Hit, Searcher, as_json
from cocoa.wording import count

logger = logging.getLogger(__name__)

UPLOAD_BYTES = 20_000_000
"""Of an image that is dropped; how many pixels it may have, `cocoa.images` says."""
REQUEST_BYTES = UPLOAD_BYTES + 1_000_000
"""Of a request, with what is around the image."""
UPLOADS_VARIABLE = "GRADIO_TEMP_DIR"
UPLOADS_KEPT = (60, 600)
"""Every so many seconds uploads are removed that are older than so many."""
MOST_HITS = 100
MOST_CHARACTERS = 10_000
"""Of the text, the instruction and the condition together."""
LOOPBACK = ("127.0.0.1", "localhost")
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
"""What the browser may load: what this server sends, and what is inside the page."""
PARTS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static|svelte)/.+|"
    r"/gradio_api/(startup-events|theme\.css|upload|upload_progress|queue/(join|data)|cancel|reset|heartbeat/\w+)"
)
"""The paths that the page asks for; Gradio has others, some of which fetch what they are told to."""


class Guard:
    """Answers only what the page asks for, and tells the browser to load nothing from elsewhere.

    Args:
        app: what answers.
        uploads: folder whose files are served.
    """

    def __init__(self, app: ASGIApp, uploads: str) -> None:
        self.app = app
        self.uploads = f"/gradio_api/file={uploads}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = POLICY
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif not (PARTS.fullmatch(scope["path"]) or scope["path"].startswith(self.uploads)):
            await PlainTextResponse("not a part of this page", 404)(scope, receive, guarded)
        elif scope["method"] == "POST" and not self._bounded(Headers(scope=scope)):
            await PlainTextResponse(f"of unknown size, or more than {REQUEST_BYTES} bytes", 413)(
                scope, receive, guarded
            )
        else:
            await self.app(scope, receive, guarded)

    @staticmethod
    def _bounded(headers: Headers) -> bool:
        size = headers.get("content-length", "")  # which chunks, if there are any, need not keep to
        return "transfer-encoding" not in headers and size.isdecimal() and int(size) <= REQUEST_BYTES


@contextmanager
def running(searcher: Searcher, host: str, port: int, instruction: str = "") -> Iterator[str]:
    """The page, served within; its address.

    Args:
        searcher: of the store.
        host: address to listen on.
        port: to listen on.
        instruction: that stands there before anything is typed.

    Raises:
        CocoaError: the address or port cannot be had.
    """
    with _uploads_folder() as uploads:
        page = build(searcher, uploads, instruction, conditions=host in LOOPBACK)
        middleware = [Middleware(Guard, uploads=str(uploads))]
        if host in LOOPBACK:  # else a site could have its own name point here, and read what it likes
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK))
        else:
            logger.warning("%s: whoever reaches this address may search; there is no password", host)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                max_file_size=UPLOAD_BYTES,
                app_kwargs={"middleware": middleware},
                css=(resources.files("cocoa") / "data" / "app.css").read_text(encoding="utf-8"),
                theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                footer_links=[],
                prevent_thread_lock=True,
                inbrowser=False,
                run_history=False,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                quiet=True,
            )
        except OSError as error:
            raise CocoaError(f"{host}:{port}: cannot listen there ({error}); choose another --port or --host") from None
        try:
            yield str(page.local_url)
        finally:
            page.close(verbose=False)


@contextmanager
def _uploads_folder() -> Iterator[Path]:
    """A new folder for Gradio's uploads, since it serves whatever lies there; removed in the end."""
    before = os.environ.get(UPLOADS_VARIABLE)
    with TemporaryDirectory(prefix="cocoa-app-") as folder:
        os.environ[UPLOADS_VARIABLE] = os.path.realpath(folder)
        try:
            yield Path(os.environ[UPLOADS_VARIABLE])
        finally:
            del os.environ[UPLOADS_VARIABLE]
            if before is not None:
                os.environ[UPLOADS_VARIABLE] = before


def serve(searcher: Searcher, host: str, port: int, instruction: str, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM, see `running`; `ready` is told its address. In the main thread."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    with running(searcher, host, port, instruction) as url, suppress(KeyboardInterrupt):
        ready(url)
        threading.Event().wait()


def build(searcher: Searcher, uploads: Path, instruction: str = "", conditions: bool = True) -> gr.Blocks:
    """The page: what is looked for on top, what was found below.

    Args:
        searcher: of the store.
        uploads: folder that Gradio puts uploads into.
        instruction: that stands there before anything is typed.
        conditions: offer conditions on columns; SQL can take all time and memory, so they are not for strangers.
    """

    def find(
        text: str | None, image: dict[str, Any] | None, said: str | None, top_k: float, where: str | None = None
    ) -> str:
        text, said, where = text or "", said or "", where or ""
        if len(text) + len(said) + len(where) > MOST_CHARACTERS:
            return show([], f"more than {MOST_CHARACTERS} characters; shorten the text")
        try:
            content = _uploaded(image["path"], uploads) if image else None
            hits = searcher.find(Side(said, text, content), min(int(top_k), MOST_HITS), where)
        except CocoaError as error:
            return show([], str(error))
        return show(hits, "" if hits else "nothing meets the condition")

    rows = f"{count(searcher.table.count_rows(), 'row')} in {searcher.db.name}"
    with gr.Blocks(title="cocoa search", analytics_enabled=False, delete_cache=UPLOADS_KEPT, fill_width=True) as page:
        with gr.Row(equal_height=True):
            with gr.Column(scale=3):
                text = gr.Textbox("", label="Text", placeholder="what to look for")
                with gr.Accordion("More", open=False):
                    said = gr.Textbox(instruction, label="Instruction, as the model was trained with")
                    asked = []
                    if conditions:
                        asked = [gr.Textbox("", label="Condition on columns, in SQL", placeholder="width > 500")]
                    top_k = gr.Slider(1, MOST_HITS, 12, step=1, label="Results")
                button = gr.Button("Search", variant="primary")
            image = gr.Image(
                label="Image", height=200, sources=["upload", "clipboard"], type="filepath", buttons=[], scale=1
            )
            image.async_move_resource_to_block_cache = _not_fetched  # type: ignore
        found = gr.HTML(show([], rows))
        gr.on(
            [text.submit, button.click, image.upload, said.submit, *(where.submit for where in asked)],
            find,
            [text, image, said, top_k, *asked],
            found,
            preprocess=False,  # Gradio would decode the image, unbounded
            concurrency_limit=1,
            api_visibility="private",
        )
    return page


async def _not_fetched(path: str | Path | None) -> str | None:
    """In place of Gradio's own, which would fetch an image that has an address; uploads lie where they should."""
    return None if path is None else str(path)


def _uploaded(path: str, uploads: Path) -> bytes:
    if not Path(path).resolve().is_relative_to(uploads):
        raise CocoaError("an image has to be uploaded")
    try:
        return Path(path).read_bytes()
    except OSError:
        raise CocoaError("the image is not kept for longer; upload it again") from None


def show(hits: list[Hit], said: str = "") -> str:
    """Hits as HTML, and what is said above them; nothing that comes from the store or a visitor is markup."""
    shown = []
    for hit, plain in zip(hits, as_json(hits), strict=True):
        picture = hit.thumbnail and "data:image/jpeg;base64," + base64.b64encode(hit.thumbnail).decode()
        facts: dict[str, Any] = {name: value for name, value in plain["metadata"].items() if value is not None}
        shown.append({"id": hit.id, "score": hit.score, "text": hit.text, "source": picture, "facts": facts})
    return page_environment().get_template("hits.html.jinja").render(hits=shown, said=said)
