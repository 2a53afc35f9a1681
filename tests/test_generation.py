"""The engine: a batch says what each conversation alone says, the end of a turn is seen, configs add no sampling."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import GenerationConfig

from cocoa.architectures import EMBEDDED, locate
from cocoa.errors import CocoaError
from cocoa.generation import Conversation, Engine, identify, load_engine, messages, shrink
from cocoa.inputs import ImageBudget, image_tokens
from cocoa.scenes.dialogues import ASK_QUESTIONS, REQUESTS
from cocoa.scenes.language import caption
from cocoa.scenes.world import Scene, picture, sample_scene

RNG = random.Random("generation")
SCENES = [sample_scene(RNG, (2, 3), "test") for _ in range(6)]
LIMIT = 80


@pytest.fixture(scope="module", params=EMBEDDED)
def engine(request: pytest.FixtureRequest) -> Engine:
    return load_engine(request.param)


def mixed(scenes: list[Scene]) -> list[Conversation]:
    """Conversations of unequal length, on images of unequal size."""
    said = [
        (REQUESTS["full"],),
        (REQUESTS["plain"], caption(scenes[1], "plain"), "how many objects are there?"),
        ("how many objects are there?", "two", "is there a red star?", "no", REQUESTS["relation"]),
    ]
    images = [picture(scene) for scene in scenes]
    images[2] = images[2].resize((112, 140))
    return [Conversation(image, said[i % 3]) for i, image in enumerate(images)]


def test_a_batch_says_what_each_says_alone(engine: Engine) -> None:
    """Left padding, images of two sizes, and positions that count from them."""
    asked = mixed(SCENES)
    together = engine(asked, LIMIT)
    assert together == [engine([conversation], LIMIT)[0] for conversation in asked]
    assert together[0] == (caption(SCENES[0], "full"), True)
    assert len({len(reply.text) for reply in together}) > 2


def test_a_text_that_reaches_the_limit_is_not_finished(engine: Engine) -> None:
    asked = [Conversation(picture(SCENES[0]), (text,)) for text in (REQUESTS["full"], "how many objects are there?")]
    whole, (cut, short) = engine(asked, LIMIT), engine(asked, 4)
    assert not cut.finished and cut.text and whole[0].text.startswith(cut.text)
    assert short == whole[1] and short.finished


def test_what_the_model_adds_after_the_end_is_no_text(engine: Engine) -> None:
    for reply in engine(mixed(SCENES), LIMIT):
        assert reply.finished and "<|" not in reply.text and reply.text == reply.text.strip()


def test_sampling_is_decided_by_the_seed_alone(engine: Engine) -> None:
    asked = [Conversation(picture(scene), (ASK_QUESTIONS.format(3),)) for scene in SCENES]
    one = engine(asked, 120, 0.7, 1)
    random.seed(3)
    assert engine(asked, 120, 0.7, 1) == one
    assert engine(asked, 120, 0.7, 2) != one
    assert engine(asked, 120, 0.0, 1) == engine(asked, 120, 0.0, 2)


def test_a_checkpoints_own_sampling_is_left_out(tmp_path: Path) -> None:
    """Qwen2-VL's config samples from the likeliest token alone: what is sampled would not be."""
    shutil.copytree(locate(EMBEDDED[0]), tmp_path / "model")
    GenerationConfig(
        do_sample=True,
        top_k=1,
        top_p=0.001,
        temperature=0.01,
        repetition_penalty=5.0,
        eos_token_id=755,
        pad_token_id=756,
    ).save_pretrained(tmp_path / "model")
    asked = [Conversation(picture(scene), (ASK_QUESTIONS.format(3),)) for scene in SCENES]
    own, plain = load_engine(str(tmp_path / "model")), load_engine(EMBEDDED[0])
    assert own(asked, 120, 0.7, 1) == plain(asked, 120, 0.7, 1)
    assert own(asked, 120) == plain(asked, 120)


def test_any_token_may_be_sampled() -> None:
    """Not the 50 likeliest alone, which is what transformers takes by itself."""
    asked = [Conversation(picture(SCENES[0]), (ASK_QUESTIONS.format(3),))] * 150
    assert len(set(load_engine(EMBEDDED[0])(asked, 1, 1e4, 1))) > 60


def test_the_image_stands_before_the_first_text() -> None:
    image = Image.new("RGB", (8, 8))
    user, model, last = messages(Conversation(image, ("one?", "two", "three?")))
    assert user["content"] == [{"type": "image", "image": image}, {"type": "text", "text": "one?"}]
    assert [each["role"] for each in (user, model, last)] == ["user", "assistant", "user"]
    assert last["content"] == [{"type": "text", "text": "three?"}]


@pytest.mark.parametrize("size", [(84, 84), (640, 480), (4000, 3000), (3000, 100), (33, 9000), (1, 1), (5, 20000)])
def test_large_images_are_shrunk_into_the_budget(size: tuple[int, int]) -> None:
    shrunk = shrink(Image.new("RGB", size), 256)
    assert image_tokens(shrunk.size, ImageBudget((1, 256))) <= 256
    if size[0] * size[1] <= 256 * 28 * 28 and max(size) / min(size) < 200:
        assert shrunk.size == size
    elif max(size) / min(size) < 20:  # else rounding to whole tokens, which the processor does too, shows
        assert shrunk.width / shrunk.height == pytest.approx(size[0] / size[1], rel=0.2)
        assert shrunk.width * shrunk.height > 0.8 * 256 * 28 * 28


def test_models_that_cannot_be_asked(tmp_path: Path, tiny_backbone_path: Callable[..., Path]) -> None:
    tiny = tiny_backbone_path()
    shutil.copytree(tiny, tmp_path / "silent")
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / "silent" / name).unlink(missing_ok=True)
    with pytest.raises(CocoaError, match=r"silent: it has no chat template, so it cannot be asked"):
        load_engine(str(tmp_path / "silent"))
    shutil.copytree(tiny, tmp_path / "ours")
    (tmp_path / "ours" / "cocoa.json").write_text("{}")
    with pytest.raises(CocoaError, match=r"ours: an embedding model of cocoa.*name its backbone"):
        identify(str(tmp_path / "ours"))
    for call in (load_engine, identify):
        with pytest.raises(CocoaError, match=r"none: cannot be read .*mini-qwen2-vl"):
            call(str(tmp_path / "none"))


def test_a_text_model_cannot_be_asked_about_images(tiny_text_model_path: Path) -> None:
    with pytest.raises(CocoaError, match=r"cannot be read .*image-text-to-text"):
        load_engine(str(tiny_text_model_path.parent / "bert"))


def test_a_folder_is_told_by_its_weights(tmp_path: Path) -> None:
    shutil.copytree(locate(EMBEDDED[0]), tmp_path / "model")
    assert identify(str(tmp_path / "model")) == identify(EMBEDDED[0]) != identify(EMBEDDED[1])
