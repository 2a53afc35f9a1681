"""`cocoa app`: used in a browser, and attacked."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from browsers import headless_browser
from PIL import Image
from toy import captions, pictures

pytest.importorskip("lancedb", reason="needs the extra `search`")
pytest.importorskip("gradio", reason="needs the extra `search`")

import httpx
from starlette.datastructures import Headers

from cocoa import app
from cocoa.corpus_embedding import EmbedSettings
from cocoa.errors import CocoaError
from cocoa.search import Hit, Searcher, open_search
from cocoa.search_index import update_index

EVIL = "<img src=x onerror=\"document.title='pwned'\"> ${document.title='pwned'} {{value}} <script>alert(1)</script>"


@pytest.fixture(scope="module")
def searcher(tiny_backbone_path: Any, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    folder = tmp_path_factory.mktemp("app")
    for n, image in enumerate(pictures(8)):
        image.save(folder / f"{n}.png")
    rows: list[dict[str, Any]] = [{"id": f"{n}.png", "image": f"{n}.png", "number": n} for n in range(8)]
    rows += [{"id": text, "text": text, "note": EVIL} for text in [*captions(4), EVIL]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    update_index(EmbedSettings(str(tiny_backbone_path()), folder / "rows.jsonl"), folder / "db")
    return open_search(folder / "db")


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def url(searcher: Searcher) -> Iterator[str]:
    with app.running(searcher, "127.0.0.1", free_port(), "Find it.") as address:
        yield address.rstrip("/")


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as found:
        yield found


def content(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(client: httpx.Client, text: Any = "", image: Any = None, where: Any = "", top_k: Any = 3) -> str:
    """What the page would be told: HTML, or an error."""
    config = client.get("/config").json()
    (found,) = [each for each in config["dependencies"] if len(each["inputs"]) in (4, 5)]
    data = [text, image, "", top_k, where][: len(found["inputs"])]
    body = {"data": data, "fn_index": found["id"], "session_hash": "test"}
    client.post("/gradio_api/queue/join", json=body).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "test"}) as answer:
        for line in answer.iter_lines():
            if '"process_completed"' in line:
                output = json.loads(line.removeprefix("data: "))["output"]
                return output["data"][0] if "data" in output else f"error: {output.get('error')}"
    raise AssertionError("no answer")


def upload(client: httpx.Client, data: bytes, name: str = "query.png") -> dict[str, Any]:
    answer = client.post("/gradio_api/upload", files={"files": (name, data)})
    answer.raise_for_status()
    return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def raw(port: int, request: str) -> bytes:
    """What is answered to a request as it stands, which a client would tidy."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as connection:
        connection.sendall(request.encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")) if "close" in request else connection.recv(65536)


def test_a_search_by_text_and_by_image(client: httpx.Client, searcher: Searcher) -> None:
    assert 'data-id="' + captions(4)[2] in ask(client, captions(4)[2], top_k=1)
    found = ask(client, image=upload(client, content(pictures(8)[5])), top_k=2)
    assert found.index('data-id="5.png"') < found.rindex("data-id") and found.count("<figure") == 2
    assert "data:image/jpeg;base64," in found and "1.000" in found and "<dt>number</dt><dd>5</dd>" in found
    assert ask(client, "red", where="number IN (1, 2)", top_k=500).count("<figure") == 2
    assert "nothing meets the condition" in ask(client, "red", where="number > 99")
    assert ask(client, None, None, None) == ask(client)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "nothing to search for"),
        ({"text": "a", "where": "<b>"}, "where &#39;&lt;b&gt;&#39;: "),
        ({"text": "a" * 20_000}, "more than 10000 characters"),
        ({"text": "a", "top_k": 0}, "top-k 0: must be 1 or more"),
    ],
)
def test_mistakes_are_said_on_the_page(client: httpx.Client, asked: dict[str, Any], said: str) -> None:
    assert f'<p class="said">{said}' in ask(client, **asked)


def test_what_a_store_says_is_no_markup() -> None:
    shown = app.show([Hit(EVIL, 0.5, EVIL, "", {EVIL: EVIL, "none": None}, None)], EVIL)
    assert "<script" not in shown and "<img" not in shown and shown.count("&lt;script&gt;") == 7 and "none" not in shown


def test_no_other_file_is_served(client: httpx.Client, url: str, searcher: Searcher) -> None:
    held = upload(client, content(pictures(1)[0]))["path"]
    uploads = next(folder for folder in Path(held).parents if folder.name.startswith("cocoa-app-"))
    assert client.get(f"/gradio_api/file={held}").status_code == 200
    secret = searcher.db.parent / "rows.jsonl"
    climbing = f"{uploads}/{'../' * 9}{str(secret)[1:]}"
    (uploads / "link").symlink_to(secret)
    port = int(url.rpartition(":")[2])
    for path in (
        *(
            f"/gradio_api/file={secret}",
            "/gradio_api/file=/etc/passwd",
            f"/file={secret}",
            f"/gradio_api/file/{secret}",
        ),
        *(f"/gradio_api/file={climbing}", f"/gradio_api/file={climbing.replace('../', '%2e%2e%2f')}"),
        *(f"/gradio_api/file=file://{secret}", f"/gradio_api/file={Path.cwd()}/README.md", f"/static/../..{secret}"),
        *(f"/assets/{'../' * 12}{str(secret)[1:]}", f"/assets/{'..%2f' * 12}{str(secret)[1:]}"),
        *(f"/gradio_api/file={url}/config", f"/gradio_api/proxy={url}/config", f"/gradio_api/file=http:{uploads}/x"),
        *("/gradio_api/info", "/monitoring", "/gradio_api/openapi.json", "/gradio_api/vibe-code", "/docs"),
    ):
        answer = raw(port, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert int(answer.split()[1]) in (400, 403, 404, 405), path
        assert captions(4)[0].encode() not in answer and b"root:" not in answer
    assert client.get("/config", headers={"host": "evil.example"}).status_code == 400


def test_a_query_names_no_file_of_the_server_and_no_address(client: httpx.Client, searcher: Searcher) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, secret = f"http://127.0.0.1:{server.server_port}/0.png", str(searcher.db.parent / "0.png")
    meta = {"_type": "gradio.FileData"}
    for image in (
        *({"path": secret, "meta": meta}, {"path": secret}, {"path": address, "meta": meta}, {"path": address}),
        *({"path": "x", "url": address, "meta": meta}, {"path": f"file://{secret}", "meta": meta}),
        *({"path": "HTTPS://example.com/0.png", "meta": meta}, {"url": address}, secret, [secret], 3),
    ):
        found = ask(client, image=image)
        assert "<figure" not in found and ("error" in found or "has to be uploaded" in found), image
    assert not asked
    server.shutdown()


def test_uploads_are_bounded(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not a readable image" in ask(client, image=upload(client, b"GIF89a no image", "x.gif"))
    wide = content(Image.new("L", (65_000, 1_000)))
    assert "65000 x 1000 pixels are more than 64 million" in ask(client, image=upload(client, wide))
    large, chunked = f"Content-Length: {app.REQUEST_BYTES + 1}", "Transfer-Encoding: chunked"
    for size in (large, chunked, "Content-Length: -1", f"Content-Length: 10\r\n{chunked}"):
        for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
            answer = raw(int(client.base_url.port or 0), f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{size}\r\n\r\n")
            assert answer.split()[1] in (b"413", b"400"), size
    both = Headers({"content-length": "10", "transfer-encoding": "chunked"})
    assert not app.Guard._bounded(both) and app.Guard._bounded(Headers({"content-length": "10"}))
    answer = client.post("/gradio_api/upload", files={"files": ("x.png", b"0" * (app.UPLOAD_BYTES + 1))})
    assert answer.status_code == 413


def test_an_image_that_has_been_removed_is_asked_for_again(client: httpx.Client) -> None:
    image = upload(client, content(pictures(1)[0]))
    Path(image["path"]).unlink()
    assert "the image is not kept for longer; upload it again" in ask(client, image=image)


def test_strangers_are_offered_no_conditions(searcher: Searcher, tmp_path: Path) -> None:
    for conditions, inputs in ((True, 5), (False, 4)):
        config = app.build(searcher, tmp_path, conditions=conditions).get_config_file()
        assert inputs in [len(each["inputs"]) for each in config["dependencies"]]
        assert any("SQL" in str(each["props"].get("label")) for each in config["components"]) == conditions


def test_the_browser_is_told_to_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    for path in ("/", "/config", "/none"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self' ")
        assert headers["x-content-type-options"] == "nosniff"


def test_a_port_that_is_taken(searcher: Searcher, url: str) -> None:
    port = int(url.rpartition(":")[2])
    with (
        pytest.raises(CocoaError, match=rf"127\.0\.0\.1:{port}: cannot listen there .*choose another --port"),
        app.running(searcher, "127.0.0.1", port),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_in_a_browser(url: str, tmp_path: Path, width: int, scheme: Any) -> None:
    asked: list[str] = []
    wrong: list[str] = []
    with headless_browser() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.get_by_label("Text", exact=True).fill(captions(4)[1])
        page.keyboard.press("Enter")
        page.wait_for_selector(".hit")
        assert page.locator(".hit").first.get_attribute("data-id") == captions(4)[1]
        assert page.locator(".hit .score").first.inner_text().startswith("0.")
        assert page.locator(".hit img, .hit .words").count() == page.locator(".hit").count() == 12

        page.get_by_label("Text", exact=True).fill("")
        image = tmp_path / "query.png"
        image.write_bytes(content(pictures(8)[6]))
        transfer = page.evaluate_handle(
            "data => { const it = new DataTransfer(); it.items.add(new File([new Uint8Array(data)], 'query.png', "
            "{type: 'image/png'})); return it }",
            list(image.read_bytes()),
        )
        page.locator("[aria-label*='drop' i], button:has(input[type=file])").first.dispatch_event(
            "drop", {"dataTransfer": transfer}
        )
        page.wait_for_selector(".hit[data-id='6.png']:first-child")
        assert page.title() == "cocoa search" and not wrong
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out on a phone
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark != "rgb(255, 255, 255)") == (scheme == "dark")
    assert all(each.startswith((url, "data:", "blob:")) for each in asked), asked
