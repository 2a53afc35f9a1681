"""`examples/serve.py`: what it answers is what sentence-transformers gives, and what a stranger sends is bounded."""

import base64
import json
import threading
import time
from io import BytesIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import serve
import uvicorn
from PIL import Image
from sentence_transformers import SentenceTransformer

from cocoa.checkpoint import save_checkpoint
from cocoa.images import load_image


@pytest.fixture(scope="module")
def model(tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(tiny_backbone(), folder, {})
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def ask(model):
    """`ask(body)`: the answer of a server on the loopback."""
    server = uvicorn.Server(uvicorn.Config(serve.create_app(model), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]

    def post(body):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{port}/v1/embeddings", content, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as response:
            return json.load(response)

    yield post
    server.should_exit = True
    thread.join()


def uri(picture, kind="png"):
    file = BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def vectors(answer):
    assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"])))
    return np.array([row["embedding"] for row in answer["data"]], dtype=np.float32)


def test_a_text_gets_the_embedding_of_sentence_transformers_to_the_bit(ask, model):
    answer = ask({"model": "mine", "input": "a red cup"})
    np.testing.assert_array_equal(vectors(answer)[0], model.encode("a red cup"))
    assert answer["object"] == "list" and answer["model"] == "mine"
    tokens = model.preprocess(["a red cup"])["attention_mask"].sum()
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_texts_get_theirs_in_order(ask, model):
    texts = ["a cat", "the rocket on the launch pad stands still", "red"]
    np.testing.assert_allclose(vectors(ask({"input": texts})), model.encode(texts), atol=1e-6)


def test_base64_holds_the_same_numbers(ask):
    plain = vectors(ask({"input": "a red cup"}))[0]
    packed = ask({"input": "a red cup", "encoding_format": "base64"})["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), plain)


def test_an_image_gets_the_embedding_of_sentence_transformers_to_the_bit(ask, model, pictures):
    for picture in pictures:
        found = vectors(ask({"messages": [user(image_part(uri(picture)))]}))
        np.testing.assert_array_equal(found[0], model.encode({"image": picture}))


def test_image_text_and_instruction_together(ask, model, pictures):
    messages = [
        {"role": "system", "content": "Find the caption."},
        user(image_part(uri(pictures[0])), {"type": "text", "text": "what is on the table?"}),
    ]
    expected = model.encode({"image": pictures[0], "text": "what is on the table?"}, prompt="Find the caption.")
    np.testing.assert_array_equal(vectors(ask({"messages": messages}))[0], expected)
    assert np.abs(expected - vectors(ask({"messages": messages[1:]}))[0]).max() > 1e-3


def test_the_address_of_an_image_is_a_text_like_any_other(ask, model):
    address = "http://127.0.0.1:9/cat.png"
    expected = model.encode([[{"role": "user", "content": [{"type": "text", "text": address}]}]])
    np.testing.assert_array_equal(vectors(ask({"input": address})), expected)


def test_a_picture_is_turned_as_its_exif_says(ask, model):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = BytesIO()
    picture.save(file, "PNG", exif=exif)
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    upright = picture.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(vectors(ask({"messages": [user(image_part(url))]}))[0], model.encode(upright))


def test_a_transparent_picture_stands_on_white_as_in_training(ask, model):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 4), dtype=np.uint8), "RGBA")
    file = BytesIO()
    picture.save(file, "PNG")
    trained = load_image(file.getvalue())
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    np.testing.assert_array_equal(vectors(ask({"messages": [user(image_part(url))]}))[0], model.encode(trained))


REFUSED = {
    "nothing": {},
    "no text": {"input": ""},
    "both": {"input": "a", "messages": [{"role": "user", "content": "a"}]},
    "tokens": {"input": [[1, 2, 3]]},
    "dimensions": {"input": "a", "dimensions": 8},
    "too many texts": {"input": ["a"] * (serve.MOST_INPUTS + 1)},
    "a text too long": {"input": "a" * 8_001},
    "a part too long": {"messages": [user({"type": "text", "text": "a" * 8_001})]},
    "an address": {"messages": [user(image_part("https://example.org/cat.png"))]},
    "a file": {"messages": [user(image_part("file:///etc/passwd"))]},
    "another format": {"messages": [user(image_part("data:image/svg+xml;base64,PHN2Zy8+"))]},
    "a broken image": {"messages": [user(image_part("data:image/png;base64,iVBORw0KGgo="))]},
    "a thread of an image": {"messages": [user(image_part(uri(Image.new("1", (201, 1)))))]},
    "another role": {"messages": [{"role": "tool", "content": "a"}]},
    "no JSON": b"{",
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(ask, body):
    with pytest.raises(HTTPError) as refusal:
        ask(body)
    assert refusal.value.code == 422
    assert len(refusal.value.read()) < 2_000


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(ask):
    url = uri(Image.new("1", (9_000, 8_000)))
    with pytest.raises(HTTPError, match="422"):
        ask({"messages": [user(image_part(url))]})


def test_a_request_of_too_many_bytes_is_refused_as_it_arrives(ask):
    with pytest.raises((HTTPError, ConnectionError, OSError)) as refusal:
        ask(b'{"input": "' + b"a" * (serve.MOST_BYTES + 1))
    assert not isinstance(refusal.value, HTTPError) or refusal.value.code == 413
