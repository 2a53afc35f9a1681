"""A dozen real photographs and a few rows about them in every form that MMEB has, for trials and tests.

`write_photos` writes `MMEB-train` and `MMEB-eval` as those data sets really lie on a disk: image markers
(also in text-only queries), trailing newlines, synonyms, missing `neg_*` columns, several splits and an older
file in one folder, shards, greyscale, CMYK and EXIF-rotated images, and some with a side under 28 px. The
instructions are written out here, not taken from `data/mmeb.yaml`, so that tests hold one against the other.
`data/photos/LICENSES.md` says where the photographs come from.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cocoa.images import load_image

Photo = dict[str, Any]
Rows = dict[str, list[tuple[Any, ...]]]
Locate = Callable[..., str]

TRAIN = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
EVAL = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
MARK = "<|image_1|>\n"
CLASSIFY = f"{MARK}Represent the given image for classification\n"
SCENE = f"{MARK}Identify the scene shown in the image\n"
NEWS_SECTION = f"{MARK}Represent the given news image with the following caption for domain classification:"
QUESTION = f"{MARK}Represent the given image with the following question:"
DIALOGUE = "Represent the given dialogue about an image, which is used for image retrieval:"
CHANGE = f"{MARK}Given an image, find a similar everyday image with the described changes:"
CAPTION = f"{MARK}Find an image caption describing the given everyday image.\n"
FIND_IMAGE = "Find me an everyday image that matches the given caption:"
NEWS_CAPTION = f"{MARK}Find a caption for the news in the given photo.\n"
FIND_NEWS = "Retrieve an image of this news caption."
SIMILAR = f"{MARK}Find a day-to-day image that looks similar to the provided image.\n"
FIND_WIKI = f"{MARK}Find a Wikipedia image that answers this question:"
FIND_HEADLINE = f"{MARK}Find a news image that matches the provided caption:"
LABELED = f"{MARK}Select the portion of the image that isolates the object labeled as"
LABELED_EVAL = f"{MARK}Crop the image to to isolate the object labeled as"
REFER = f"{MARK}Select the portion of the image that follows the language expressions:"
IMAGE = f"{MARK}Represent the given image.\n"
IMAGE_VISDIAL = f"{MARK}Represent the given image\n"
WIKI = f"{MARK}Represent the given Wikipedia image with related text information:"
HEADLINE = f"{MARK}Represent the given image with related text information:"
CROP = f"{MARK}Represent the given cropped image of the object"

CHANGES = [
    ("bricks.jpg", "gravel.jpg", "Small stones instead of bricks."),
    ("gravel.jpg", "grass.jpg", "Plants grow on the ground."),
    ("coins.jpg", "coin.jpg", "Only a single coin is left."),
    ("astronaut.jpg", "rocket.jpg", "Show the vehicle on its launch pad."),
    ("rocket.jpg", "galaxies.jpg", "The sky alone, with far more lights."),
    ("cat.jpg", "camera.jpg", "A man outdoors, in black and white."),
]


def write_photos(folder: str | Path) -> Path:
    """Writes `folder/MMEB-train` and `folder/MMEB-eval`, the same bytes each time, and returns `folder`."""
    folder = Path(folder)
    data = resources.files("cocoa").joinpath("data/photos")
    photos: list[Photo] = yaml.safe_load(data.joinpath("photos.yaml").read_text(encoding="utf-8"))
    with resources.as_file(data) as source:
        _write_train(folder / "MMEB-train", photos, _locator(source, folder / "MMEB-train"))
        _write_eval(folder / "MMEB-eval", photos, _locator(source, folder / "MMEB-eval"))
    return folder


def _locator(source: Path, root: Path) -> Locate:
    """A function that puts a photograph, or a box of it, into a folder under `root`, and returns its path."""

    def locate(place: str, photo: Photo | str, box: Sequence[int] | None = None) -> str:
        file = photo if isinstance(photo, str) else photo["file"]
        name = file if box is None else f"{Path(file).stem}_{'_'.join(map(str, box))}.jpg"
        path = root / place / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if box is None:
                shutil.copyfile(source / file, path)
            else:
                left, top, right, bottom = box
                load_image(str(source / file)).crop((left, top, right, bottom)).save(path, quality=90)
        return f"{place}/{name}"

    return locate


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: [row[i] for row in rows] for i, column in enumerate(columns)}), path)


# ---------------------------------------------------------------------------------------------- MMEB-train


def _write_train(root: Path, photos: list[Photo], locate: Locate) -> None:
    for name, rows in _train_rows(photos, locate).items():
        columns = TRAIN[:4] if name == "CIRR" else TRAIN
        shards = [rows[:5], rows[5:]] if name == "VisualNews_i2t" else [rows]
        for index, shard in enumerate(shards):
            _write_rows(root / name / f"original-{index:05}-of-{len(shards):05}.parquet", columns, shard)
    for name, rows in _paraphrased_rows(photos, locate).items():
        _write_rows(root / name / "diverse_instruction-00000-of-00001.parquet", TRAIN, rows)
    older = root / "MSCOCO_i2t" / "train-00000-of-00001.parquet"
    _write_rows(older, TRAIN[:2], [("An older upload, never read.", "")])


def _train_rows(photos: list[Photo], locate: Locate) -> Rows:
    rows: Rows = {}

    def add(name: str, qry: str, qry_image: str, pos: str, pos_image: str, neg: str = "", neg_image: str = "") -> None:
        rows.setdefault(name, []).append((qry, qry_image, pos, pos_image, neg, neg_image))

    def image(name: str, photo: Photo | str, box: Sequence[int] | None = None) -> str:
        return locate(f"images/{name}/Train", photo, box)

    for i, photo in enumerate(photos):
        other = photos[(i + 1) % len(photos)]
        coco, news = image("MSCOCO_i2t", photo), image("VisualNews", photo)
        add("MSCOCO_i2t", CAPTION, coco, photo["captions"][0], "")
        for part in photo["parts"]:  # so 34 different images have a caption
            add("MSCOCO_i2t", CAPTION, image("MSCOCO_i2t", photo, part["box"]), part["caption"], "")
        if 4 < i < 12:  # three of them stand in VisualNews_i2t too
            add("VisualNews_t2i", f"{FIND_NEWS} {photo['news']}\n", "", IMAGE, news)
        if 2 < i < 9:
            question, related = photo["wiki"]
            add("WebQA", f"{FIND_WIKI} {question}\n", "", f"{WIKI} {related}\n", image("WebQA", photo))
        if i < 10:
            add("ImageNet_1K", CLASSIFY, image("ImageNet_1K", photo), photo["label"], "")
        if i < 8:
            for caption in photo["captions"][:2]:  # the first of them stands in MSCOCO_i2t too
                negative = image("MSCOCO_i2t", other)
                add("MSCOCO_t2i", f"{FIND_IMAGE} {caption}\n", "", IMAGE, coco, IMAGE, negative)
            add("VisualNews_i2t", NEWS_CAPTION, news, f"{photo['news']}\n\n", "")
            add("SUN397", SCENE, image("SUN397", photo), photo["scene"], "")
            section = f"{NEWS_SECTION} {photo['news']}\n"
            add("N24News", section, image("N24News", photo), photo["section"], "", other["section"])
            for name, (question, answer, wrong) in zip(("OK-VQA", "A-OKVQA"), photo["questions"], strict=True):
                add(name, f"{QUESTION} {question}\n", image(name, photo), answer, "", wrong)
        if i < 6:
            turns = "\n".join(f"Q:{question}\nA:{answer}" for question, answer in photo["dialogue"])
            images = image("VisDial", photo), image("VisDial", other)
            add("VisDial", f"{DIALOGUE} {turns}\n\n", "", IMAGE_VISDIAL, images[0], "", images[1])
            near, far = image("NIGHTS", photo, (8, 8, 140, 140)), image("NIGHTS", other)
            add("NIGHTS", SIMILAR, image("NIGHTS", photo), IMAGE, near, IMAGE, far)
        if i < 4:
            for part in photo["parts"]:
                crop = image("MSCOCO", photo, part["box"])
                add("MSCOCO", f'{LABELED} "{part["label"]}"\n', image("MSCOCO", photo), CROP, crop)
    add("VisualNews_t2i", f"{FIND_NEWS} \n", "", IMAGE, image("VisualNews", photos[0]))  # no caption
    for first, second, change in CHANGES:
        add("CIRR", f"{CHANGE} {change}\n", image("CIRR", first), IMAGE, image("CIRR", second))
    return rows


def _paraphrased_rows(photos: list[Photo], locate: Locate) -> Rows:
    """The split `diverse_instruction`: each row says its instruction in other words."""
    cat, rocket = photos[1], photos[3]
    coco, vqa, wiki = "images/MSCOCO_i2t/Train", "images/OK-VQA/Train", "images/WebQA/Train"
    which, caption = f"{MARK}Which sentence tells what this picture shows?\n", cat["captions"][0]
    question, answer, wrong = cat["questions"][0]
    rows: Rows = {
        "MSCOCO_i2t": [(which, locate(coco, cat), caption, "", "", "")],
        "OK-VQA": [(f"{MARK}Look, then answer: {question}\n", locate(vqa, cat), answer, "", wrong, "")],
    }
    seek, depict = (
        f"A photo of the following, please: {caption}\n",
        f"{MARK}Turn this picture into a vector.\n",
    )
    rows["MSCOCO_t2i"] = [(seek, "", depict, locate(coco, cat), "", "")]
    which = f"{MARK}Which picture helps here? {rocket['wiki'][0]}\n"
    notes = [f"{MARK}Embed picture and note: {note}\n" for note in (rocket["wiki"][1], "Another note on it.")]
    rows["WebQA"] = [(which, "", note, locate(wiki, rocket), "", "") for note in notes]
    return rows


# ---------------------------------------------------------------------------------------------- MMEB-eval


def _write_eval(root: Path, photos: list[Photo], locate: Locate) -> None:
    def write(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        _write_rows(root / name / "test-00000-of-00001.parquet", columns, rows)

    def image(name: str, photo: Photo | str, box: Sequence[int] | None = None, inside: str = "images/") -> str:
        """The path as the data has it: without the folder that the images were unpacked into."""
        return locate(f"{inside}{name}", photo, box).removeprefix(inside)

    def plain(name: str, queries: Sequence[tuple[str, str]], pool: Sequence[tuple[str, str]]) -> None:
        """Query i is answered by the i-th of the pool; the others follow it."""
        rows = []
        for i, query in enumerate(queries):
            candidates = [pool[i], *pool[:i], *pool[i + 1 :]]
            rows.append((*query, [text for text, _ in candidates], [path for _, path in candidates]))
        write(name, EVAL, rows)

    last = [photo["captions"][3] for photo in photos]
    parts = [(photo, part) for photo in photos[:6] for part in photo["parts"]]

    name = "ImageNet-1K"
    plain(name, [(CLASSIFY, image(name, p)) for p in photos], [(p["label"], "") for p in photos])
    name = "MSCOCO_i2t"
    plain(name, [(CAPTION, image(name, p)) for p in photos], [(f"{caption}\n", "") for caption in last])
    name = "MSCOCO_t2i"
    queries = [(f"{FIND_IMAGE} {caption}\n", "") for caption in last]
    plain(name, queries, [(IMAGE, image(name, p)) for p in photos])
    name = "EDIS"  # out of distribution; two headlines on the first photograph
    pool = [(f"{HEADLINE} {p['wiki'][1]}\n", image(name, p)) for p in photos[:8]]
    pool += [(f"{HEADLINE} Another headline.\n", image(name, photos[0]))]
    plain(name, [(f"{FIND_HEADLINE} {p['news']}\n", "") for p in photos[:8]], pool)
    name = "MSCOCO"
    queries = [(f'{LABELED_EVAL} "{part["label"]}"\n', image(name, p)) for p, part in parts]
    plain(name, queries, [(CROP, image(name, p, part["box"])) for p, part in parts])

    name = "RefCOCO-Matching"  # out of distribution; the right candidate stands at the end of its list once more
    rows: list[tuple[Any, ...]] = []
    pool = [(f'{REFER} "{part["caption"]}"\n', image(name, p, inside="")) for p, part in parts]
    for i, (photo, part) in enumerate(parts):
        candidates = [pool[i], *pool[:i], *pool[i + 1 :], pool[i]]
        texts, paths = [text for text, _ in candidates], [path for _, path in candidates]
        rows.append((f'{REFER} "{part["label"]}"\n', image(name, photo, inside=""), texts, paths))
    write(name, EVAL, rows)

    # the form with instructions apart: text targets without a column of image paths, and image targets
    name = "A-OKVQA"
    asked, answers = [p["questions"][0][0] for p in photos], [p["questions"][0][1] for p in photos]
    rows = [
        (QUESTION, asked[i], image(name, photos[i]), [answers[i], *answers[:i], *answers[i + 1 :]]) for i in range(8)
    ]
    write(name, ("qry_inst", *EVAL[:3]), rows)
    name, rows = "CIRR", []
    for first, second, change in CHANGES:
        files = [second, *(p["file"] for p in photos if p["file"] not in (first, second))]
        paths = [image(name, file, inside="eval_images/") for file in files]
        query = (CHANGE, change, image(name, first, inside="eval_images/"))
        rows.append((*query, IMAGE, [""] * len(paths), paths))
    write(name, ("qry_inst", *EVAL[:2], "tgt_inst", *EVAL[2:]), rows)
