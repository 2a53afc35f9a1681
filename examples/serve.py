"""Serve a checkpoint as OpenAI's `/v1/embeddings`, images by vLLM's `messages`; docs/serving.md describes it."""

import asyncio
import base64
import sys
from io import BytesIO
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image, ImageOps
from pydantic import AfterValidator, BaseModel, Field, StringConstraints
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F

MOST_BYTES, MOST_PIXELS, MOST_INPUTS = 20_000_000, 64_000_000, 32
Text = Annotated[str, StringConstraints(min_length=1, max_length=8_000)]


def content_part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message as sentence-transformers takes it; an image comes as a data: URI, and nothing is fetched."""
    match part:
        case {"type": "text", "text": str(text)} if 0 < len(text) <= 8_000:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url)}} if url.startswith("data:image/"):
            try:
                data = BytesIO(base64.b64decode(url.partition(";base64,")[2], validate=True))
                image = Image.open(data, formats=("JPEG", "PNG", "WEBP"))
                if image.width * image.height > MOST_PIXELS or max(image.size) > 200 * min(image.size):
                    raise ValueError("too many pixels, or one side 200 times the other")
                upright = ImageOps.exif_transpose(image).convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")  # is what training sees through transparent pixels
                return {"type": "image", "image": Image.alpha_composite(white, upright).convert("RGB")}
            except Exception as error:  # decoders raise many kinds on broken bytes
                raise ValueError(f"image: {error}") from None
    raise ValueError("a part is a text of up to 8,000 characters, or an image as data:image/jpeg;base64,...")


class Message(BaseModel):
    """A user's message is what is embedded, a system message its instruction."""

    role: Literal["system", "user"]
    content: Text | Annotated[list[Annotated[dict[str, Any], AfterValidator(content_part)]], Field(max_length=4)]


class Body(BaseModel, extra="forbid", hide_input_in_errors=True):
    """A request: texts as `input`, or one input as `messages`."""

    input: Text | Annotated[list[Text], Field(max_length=MOST_INPUTS)] = []
    messages: Annotated[list[Message], Field(max_length=2)] = []
    encoding_format: Literal["float", "base64"] = "float"
    model: str = ""

    def chats(self) -> list[list[dict[str, Any]]]:
        """The inputs as chats, in which no text is taken for the address of an image."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if bool(texts) == bool(self.messages):
            raise ValueError("give input or messages")
        return [[{"role": "user", "content": text}] for text in texts] or [[dict(m) for m in self.messages]]


def create_app(model: SentenceTransformer) -> FastAPI:
    """The application around a model, which embeds one request after the other."""
    app, turn = FastAPI(), asyncio.Lock()

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MOST_BYTES:
                raise HTTPException(413, f"a request may have {MOST_BYTES:,} bytes")
        try:
            body = await run_in_threadpool(Body.model_validate_json, bytes(content))
            chats = body.chats()
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        async with turn:
            found = await run_in_threadpool(model.encode, chats, batch_size=MOST_INPUTS, output_value=None)
        data: list[dict[str, Any]] = []
        for index, output in enumerate(found):
            vector = output["sentence_embedding"]
            if vector.dtype != torch.float32:  # bfloat16's lengths are off by up to 0.4 %
                vector = F.normalize(vector.float(), dim=-1)
            vector = vector.cpu().numpy()  # as bytes little-endian
            shown = vector.tolist() if body.encoding_format == "float" else base64.b64encode(vector.tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": shown})
        tokens = sum(int(output["attention_mask"].sum()) for output in found)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": body.model, "data": data, "usage": usage}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(SentenceTransformer(sys.argv[1])), port=int(sys.argv[2]), limit_concurrency=64)
