"""The report's page: the facts that stand on it, read back from its HTML."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cocoa.compare import Score
from cocoa.eos_attention import AttentionMap, EosAttention
from cocoa.errors import CocoaError
from cocoa.gallery import Gallery, gallery, mistakes
from cocoa.metrics import rank
from cocoa.mmeb_eval import EvalDataset
from cocoa.pairs import Side
from cocoa.rebuild import RebuiltImage, RebuiltText, Word
from cocoa.report import TINY, Missing, Report, shown, to_html, write_report
from cocoa.report_curves import HEIGHT, WIDTH, axis_ticks, log_ticks, stage_charts
from cocoa.report_scores import Estimate, Published, ScoreTable

VOID = {"meta", "img", "line", "polyline", "circle", "rect", "path", "br"}


class Element:
    def __init__(self, tag, attributes, parent=None):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    @property
    def classes(self):
        return self.attributes.get("class", "").split()

    @property
    def text(self):
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join("".join(parts).split())

    def all(self, tag=None, name=None):
        """Every element below with this tag and class, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if (tag is None or child.tag == tag) and (name is None or name in child.classes):
                    found.append(child)
                found += child.all(tag, name)
        return found

    def by_id(self, name):
        return next(element for element in self.all() if element.attributes.get("id") == name)


class Page(HTMLParser):
    """A page as a tree; an element that is never closed, or closed out of order, is an error."""

    def __init__(self, text):
        super().__init__()
        self.root = self.current = Element("", {})
        self.feed(text)
        assert self.current is self.root, f"<{self.current.tag}> is not closed"

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes), self.current)
        self.current.children.append(element)
        if tag not in VOID:
            self.current = element

    def handle_startendtag(self, tag, attributes):
        self.current.children.append(Element(tag, dict(attributes), self.current))

    def handle_endtag(self, tag):
        assert tag == self.current.tag, f"</{tag}> closes <{self.current.tag}>"
        self.current = self.current.parent

    def handle_data(self, data):
        self.current.children.append(data)


def page(report):
    return Page(to_html(report)).root


def picture(colour, size=(84, 84)):
    return Image.new("RGB", size, colour)


def stage(folder, name, log):
    folder.mkdir(parents=True)
    (folder / "cocoa.json").write_text(json.dumps({"stage": name}))
    (folder / "training_log.json").write_text(json.dumps(log))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two runs that share their last stage."""
    joint = [
        {"step": step, "loss": 9.0, "token_loss": 4 - step / 20, "patch_loss": 1 / step, "token_accuracy": step / 100}
        for step in (10, 20, 40)
    ]
    bridge = [{"step": step, "loss": 3.0, "token_loss": 3.0, "first_loss": 2.0} for step in (10, 20)]
    contrastive = [{"step": 5, "loss": 2.0}, {"step": 5, "eval_validation_hit@1": 0.25}, {"step": 10, "loss": 1.5}]
    alone = [{"step": 5, "loss": 2.5}, {"step": 10, "loss": float("nan")}, {"step": 10, "train_loss": 7.0}]
    return {
        "contrastive": [stage(tmp_path / "contrastive" / "final", "contrastive", alone)],
        "cocoa": [
            stage(tmp_path / "cocoa" / "1-joint_reconstruction", "joint_reconstruction", joint),
            stage(tmp_path / "cocoa" / "2-eos_bridge", "eos_bridge", bridge),
            stage(tmp_path / "cocoa" / "final", "contrastive", contrastive),
        ],
    }


# ------------------------------------------------------------------------------------------------ galleries


def planted(scores, ids=None):
    """A data set of one query whose candidates have these cosines; `ids` say which of them are the same input."""
    ids = list(range(len(scores))) if ids is None else ids
    vectors = [(1.0, 0.0), *((score, (1 - score**2) ** 0.5) for score in scores)]
    sides = [Side(text="query"), *(Side(text=f"candidate {i}") for i in range(len(scores)))]
    return EvalDataset("toy", sides, np.array([0]), [np.array(ids) + 1]), torch.tensor(vectors)


@pytest.mark.parametrize(
    ("scores", "ids", "order"),
    [
        ([0.5, 0.9, 0.1, 0.6], None, [1, 3, 0, 2]),
        ([0.5, 0.5, 0.5, 0.9], None, [3, 1, 2, 0]),  # last among equals
        ([0.5, 0.9, 0.1, 0.4], [0, 1, 0, 3], [1, 0, 3]),  # its duplicate leaves the list
        ([0.5, 0.9, 0.1, 0.4], [0, 1, 1, 3], [1, 1, 0, 3]),  # a wrong one's does not
    ],
)
def test_the_nearest_come_first_and_the_right_one_stands_at_its_rank(scores, ids, order):
    dataset, embeddings = planted(scores, ids)
    (found,) = gallery(dataset, embeddings, [0], top=4)
    assert [int(candidate.side.text.split()[1]) for candidate in found.nearest] == order
    assert [candidate.right for candidate in found.nearest] == [number == 0 for number in order]
    assert [candidate.score for candidate in found.nearest] == pytest.approx([scores[number] for number in order])
    assert found.rank == order.index(0) + 1 == rank(dataset, embeddings).item()
    assert (found.candidates, found.answer.side.text, found.query.text) == (len(order), "candidate 0", "query")


def test_a_gallery_takes_the_rows_it_is_asked_for_and_no_more_than_the_top():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    candidates = [np.arange(10 * row + 4, 10 * row + 12) for row in range(3)]
    dataset = EvalDataset("toy", [Side(text=str(i)) for i in range(40)], np.array([0, 1, 2]), candidates)
    found = gallery(dataset, embeddings, [2, 0], top=3)
    assert [one.query.text for one in found] == ["2", "0"]
    assert [len(one.nearest) for one in found] == [3, 3]
    assert [one.rank for one in found] == [rank(dataset, embeddings)[row].item() for row in (2, 0)]
    embeddings[15] = float("nan")
    with pytest.raises(CocoaError, match="not finite"):
        gallery(dataset, embeddings, [1])


def test_the_most_confidently_wrong_come_first_and_each_query_once():
    angles = torch.tensor([0.0, 0.5, 0.1, 0.0, 0.9, 0.1, 0.2, 0.3, 0.25, 0.1])  # three queries and their candidates
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    sides = [Side(text=str(number)) for number in range(len(angles))]
    candidates = [np.array([1, 2]), np.array([4, 5]), np.array([7, 8])]  # wrong by some, by much, by little
    dataset = EvalDataset("toy", sides, np.array([0, 3, 6]), candidates)
    right = replace(dataset, queries=np.array([6]), candidates=[np.array([8, 9])])
    found = mistakes([right, dataset, dataset], [embeddings] * 3, 4)
    assert [one.found.query.text for one in found] == ["3", "0", "6"]
    margins = [np.cos(0.1) - np.cos(0.9), np.cos(0.1) - np.cos(0.5), np.cos(0.05) - np.cos(0.1)]
    assert [one.margin for one in found[:2]] == pytest.approx(margins[:2])
    assert [(one.found.nearest[0].side.text, one.found.answer.side.text) for one in found[:2]] == [
        ("5", "4"),
        ("2", "1"),
    ]
    assert len(mistakes([dataset], [embeddings], 1)) == 1 and not mistakes([right], [embeddings], 4)


# --------------------------------------------------------------------------------------------------- curves


def test_each_stage_s_terms_are_drawn_apart_and_a_sum_of_terms_is_not(runs):
    charts = stage_charts(runs)
    assert list(charts) == ["joint_reconstruction", "eos_bridge", "contrastive"]
    labels = {name: [chart.label.partition(":")[0] for chart in found] for name, found in charts.items()}
    assert labels["joint_reconstruction"] == ["predicted text tokens", "hidden patches", "predicted text tokens"]
    assert labels["eos_bridge"] == ["predicted text tokens", "first token of B, from EOS"]
    assert labels["contrastive"] == ["InfoNCE loss (nats)", "validation"]
    loss, hits = charts["contrastive"]
    assert [(line.run, line.number, line.last) for line in loss.lines] == [
        ("contrastive", 1, 2.5),  # not the NaN
        ("cocoa", 2, 1.5),
    ]
    assert [(line.run, line.last) for line in hits.lines] == [("cocoa", 25.0)]


def test_points_stand_where_the_axis_says(runs):
    token, patch, share = stage_charts(runs)["joint_reconstruction"]
    for chart, values in ((token, [3.5, 3.0, 2.0]), (patch, [0.1, 0.05, 0.025]), (share, [10, 20, 40])):
        assert chart.steps == 40 and "log" not in chart.label
        (y0, low), (y1, high) = chart.ticks[0], chart.ticks[-1]
        assert (y0, y1) == (HEIGHT, 0)
        points = chart.lines[0].points
        assert [x for x, _ in points] == [WIDTH / 4, WIDTH / 2, WIDTH]
        back = [float(low) + (HEIGHT - y) / HEIGHT * (float(high) - float(low)) for _, y in points]
        assert back == pytest.approx(values)


def test_a_loss_that_falls_far_is_drawn_on_a_log_axis(tmp_path):
    log = [{"step": step, "loss": loss} for step, loss in ((1, 20.0), (2, 2.0), (4, 1.0))]
    (chart,) = stage_charts({"run": [stage(tmp_path / "final", "contrastive", log)]})["contrastive"]
    assert chart.label.endswith("log scale")
    assert [tick for _, tick in chart.ticks] == ["1", "2", "5", "10", "20"]
    at = {tick: y for y, tick in chart.ticks}
    assert [y for _, y in chart.lines[0].points] == pytest.approx([at["20"], at["2"], at["1"]])
    assert at["1"] == HEIGHT and at["2"] - at["20"] == pytest.approx(HEIGHT * np.log(10) / np.log(20))


def test_what_is_measured_before_the_first_step_alone_is_drawn_too(tmp_path):
    log = [{"step": 0, "eval_validation_hit@1": 0.5}]
    (chart,) = stage_charts({"run": [stage(tmp_path / "final", "contrastive", log)]})["contrastive"]
    assert [x for x, _ in chart.lines[0].points] == [0]


@pytest.mark.parametrize(("low", "high"), [(0, 0), (2, 2), (-3, -3), (0.3, 4.1), (12.5, 31), (0, 1e-7), (-2, 5)])
def test_ticks_span_the_values_and_stay_above_zero_with_them(low, high):
    ticks = axis_ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1] and len(ticks) >= 2 and ticks == sorted(set(ticks))
    assert ticks[0] >= 0 or low < 0


@pytest.mark.parametrize(("low", "high"), [(1, 2), (0.03, 17), (9.9, 10.1), (1e-6, 1e3)])
def test_log_ticks_span_the_values(low, high):
    ticks = log_ticks(low, high)
    assert ticks[0] <= low < ticks[1] and ticks[-2] < high <= ticks[-1] and ticks == sorted(set(ticks))


def test_a_stage_that_comes_twice_in_a_run_is_numbered(tmp_path):
    log = [{"step": 1, "loss": 1.0}]
    folders = [stage(tmp_path / str(i), "contrastive", log) for i in range(2)]
    assert list(stage_charts({"run": folders})) == ["contrastive", "contrastive (2)"]


def test_a_folder_without_a_log_is_named(runs, tmp_path):
    (runs["cocoa"][1] / "training_log.json").unlink()
    with pytest.raises(CocoaError, match=r"2-eos_bridge: no training_log\.json"):
        stage_charts(runs)
    with pytest.raises(CocoaError, match=r"no cocoa\.json"):
        stage_charts({"run": [tmp_path]})


# ----------------------------------------------------------------------------------------------------- page


def table(models=("backbone", "contrastive", "cocoa"), rivals=("contrastive", "cocoa")):
    """Three models; the second and third are equally good at VQA as it is shown."""
    groups = {
        "VQA": [Estimate(0.96), Estimate(1.04, 0.5, 1.5), Estimate(1.0, 0.4, 1.6)],
        "Retrieval": [Estimate(1.0), Estimate(2.0, 1.0, 3.0), Estimate(0.04, 0.0, 0.9)],
    }
    gains = {"VQA": Score(1.0, -0.04, -0.6, 0.5), "Retrieval": Score(0.04, -1.96, -2.5, -1.0)}
    datasets = {"VQA": {"GQA": groups["VQA"]}, "Retrieval": {"mine": groups["Retrieval"]}}
    return ScoreTable(list(models), groups, datasets, frozenset({"GQA"}), rivals, gains)


def test_the_table_shows_every_score_its_interval_the_best_of_each_row_and_the_difference():
    rows = page(Report("title", table())).by_id("scores").all("table")[0].all("tr")
    assert [cell.text for cell in rows[0].all("th")] == ["", "backbone", "contrastive", "cocoa", "gain"]
    cells = {row.all("td")[0].text: [cell.text for cell in row.all("td")[1:]] for row in rows[1:]}
    assert cells == {
        "VQA": ["1.0", "1.00.5–1.5", "1.00.4–1.6", "-0.0-0.6 to +0.5"],
        "Retrieval": ["1.0", "2.01.0–3.0", "0.00.0–0.9", "-2.0-2.5 to -1.0"],
    }
    best = {row.all("td")[0].text: [cell.children[0] for cell in row.all("td", "best")] for row in rows[1:]}
    assert best == {"VQA": ["1.0", "1.0", "1.0"], "Retrieval": ["2.0"]}, "equal as shown is equally good"


def test_bars_and_their_whiskers_are_as_long_as_the_scores_say():
    section = page(Report("title", table())).by_id("scores")
    drawn = section.all("svg", "bar")
    assert [bar.all("rect")[1].attributes["width"] for bar in drawn] == ["0.96", "1.04", "1.00", "1.00", "2.00", "0.04"]
    whiskers = [[path.attributes["d"] for path in bar.all("path")] for bar in drawn]
    assert whiskers[:2] == [[], ["M0.50 5H1.50M0.50 2V8M1.50 2V8"]]
    assert [bar.all("rect")[1].classes for bar in drawn[:3]] == [["run-1"], ["run-2"], ["run-3"]]
    assert [heading.text for heading in section.all("h5")] == ["GQA OOD", "mine"]


def test_published_numbers_are_marked_as_such_and_stand_beside_whole_averages():
    published = [Published("CoCoA 2B", {"VQA": 57.4, "Retrieval": 69.6})]
    whole = table()
    part = replace(whole, groups={"VQA (2 of 10 sets)": whole.groups["VQA"]}, gains={}, published=published)
    for found, marks in ((replace(whole, published=published), 6), (part, 0)):
        card = page(Report("t", found)).by_id("scores").all(name="published")[0]
        assert len(card.all("g", "mark")) == marks
        assert [cell.text for cell in card.all("td")] == ["CoCoA 2B", "57.4", "69.6"]
        assert "Published, as printed in table 1 of arXiv 2603.01471" in card.text
        assert ("averages over a part" in card.text) == (not marks)
    assert not page(Report("t", whole)).by_id("scores").all(name="published")


def test_one_model_has_no_rival():
    alone = ScoreTable(["final"], {"All": [Estimate(3.0)]}, {})
    assert alone.best("All") is None
    assert "gain" not in [cell.text for cell in page(Report("t", alone)).all("th")]


def test_what_was_equal_and_what_not_and_the_seconds_are_said():
    seconds = {"scenes": 8.26, "cocoa": 245.2}
    report = Report("t", seconds=seconds, equal=["same pairs"], unequal=["more steps", "more time"])
    section = page(report).by_id("training")
    lists = [[item.text for item in one.all("li")] for one in section.all("ul")]
    assert lists == [["same pairs"], ["more steps", "more time"]]
    tiles = [card.text for tile in section.all(name="tiles") for card in tile.all(name="card")]
    assert tiles == ["8.3 sscenes", "4 min 5 scocoa"]


def test_every_line_of_every_stage_is_on_the_page(runs):
    section = page(Report("t", runs=runs)).by_id("curves")
    assert [card.all("h4")[0].text for card in section.all(name="card")] == list(stage_charts(runs))
    drawn = [line.attributes["points"] for line in section.all("polyline")]
    assert drawn == [line.path() for found in stage_charts(runs).values() for chart in found for line in chart.lines]
    assert section.all(name="key")[-2].text == "contrastive: last 2.5cocoa: last 1.5"


def test_rebuilt_pictures_stand_in_order_pixel_by_pixel():
    colours = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
    image = RebuiltImage("toy/0", "a red star", *(picture(colour) for colour in colours), 0.25, 0.5)
    (card,) = page(Report("t", images=[image])).by_id("images").all("article")
    shown_as = [
        Image.open(io.BytesIO(base64.b64decode(one.attributes["src"].partition(",")[2]))) for one in card.all("img")
    ]
    assert [one.getpixel((5, 5)) for one in shown_as] == colours and shown_as[0].size == (84, 84)
    assert [one.text for one in card.all("figcaption")] == ["original", "masked", "rebuilt"]
    assert all(one.classes == ["tiny"] for one in card.all("img"))
    assert "a red star" in card.text and "error 0.25, flat guess 0.50" in card.text


def test_small_pictures_keep_their_pixels_and_photographs_are_shrunk(pictures):
    exact = shown(pictures[0])
    assert exact.tiny and exact.uri.startswith("data:image/png;base64,")
    loaded = Image.open(io.BytesIO(base64.b64decode(exact.uri.partition(",")[2])))
    assert np.array_equal(np.asarray(loaded), np.asarray(pictures[0]))
    photo = shown(picture("red", (TINY + 1, 900)))
    assert not photo.tiny and photo.uri.startswith("data:image/jpeg;base64,")


def text(right=(True, False, True), truth="a red cup"):
    words = tuple(Word(word, good) for word, good in zip(("a", " blue", " cup"), right, strict=True))
    return RebuiltText("toy/0", Side("Find:", "it", picture("red")), truth, words, len(right), sum(right))


def test_wrong_words_are_marked_beside_the_truth():
    section = page(Report("t", texts=[text(), text((True, True, True))])).by_id("texts")
    first, second = section.all("article")
    assert [one.text for one in first.all("dd")] == ["a red cup", "a blue cup"]
    assert [one.text for one in first.all("span", "miss")] == ["blue"] and not second.all("span", "miss")
    assert "Find: it" in first.text and "2 of 3 tokens right" in first.text and len(first.all("img")) == 1
    assert "5 of 6 tokens right (83 %)" in section.all(name="legend")[0].text
    assert "guessed" not in section.all(name="legend")[0].text
    guessed = page(Report("t", texts=[text()], texts_elsewhere=[text((False, False, True))])).by_id("texts")
    assert "1 of 3 tokens right (33 %): so many are guessed" in guessed.all(name="legend")[0].text


def galleries(pictures_as_candidates):
    """Two models on one query with seven candidates: the right one is second, and seventh."""
    image = picture("blue") if pictures_as_candidates else None
    found = {}
    for name, own in (("contrastive", 0.55), ("cocoa", 0.15)):
        dataset, embeddings = planted([own, 0.9, 0.5, 0.4, 0.3, 0.25, 0.2])
        if image is not None:
            sides = [Side("Find:", "query"), *(Side("Represent.", "", image) for _ in range(7))]
            dataset = EvalDataset("toy", sides, dataset.queries, dataset.candidates)
        found[name] = gallery(dataset, embeddings, [0])
    return Gallery("toy set", found)


@pytest.mark.parametrize("pictures_as_candidates", [False, True])
def test_both_models_stand_side_by_side_with_the_right_answer_marked(pictures_as_candidates):
    section = page(Report("t", galleries=[galleries(pictures_as_candidates)])).by_id("galleries")
    one, other = section.all(name="finds")
    assert [finds.all("h5")[0].text for finds in (one, other)] == [
        "contrastive right answer at place 2 of 7",
        "cocoa right answer at place 7 of 7",
    ]
    assert [item.classes[0] for item in one.all("li")] == ["wrong", "right", *["wrong"] * 3]
    assert [item.classes[0] for item in other.all("li")] == [*["wrong"] * 5, "right"]
    assert "beyond" in other.all("li")[-1].classes and not one.all("li", "beyond")
    assert other.all("li")[-1].all("small")[0].text == "7 ✓ 0.15"
    assert len(one.all("img")) == (5 if pictures_as_candidates else 0)
    if not pictures_as_candidates:
        assert [item.all("span")[0].text for item in one.all("li")] == [f"candidate {i}" for i in (1, 0, 2, 3, 4)]


def looks(side=None, words=((" red", 0.5), (" cup", 6.0))):
    """Before and after, in two layers: of a picture, or of a text alone."""
    shares = {"picture": 0.25, "text": 0.75}
    drawn = None if side is None or side.image is None else picture("orange")
    maps = [AttentionMap(layer, shares, drawn, tuple(words)) for layer in (3, 6)]
    return EosAttention(side or Side(text="red cup"), {"before": maps, "after": maps})


def test_where_eos_looks_is_drawn_over_the_picture_or_the_words():
    shown_as = page(Report("t", attention=[looks(Side(image=picture("red"))), looks()])).by_id("attention")
    first, second = shown_as.all(name="card")
    assert len(first.all("img")) == 5 and not first.all(name="weighed")
    assert first.all("figcaption")[1].text == "layer 6picture 25 %text 75 %"
    assert [heading.text for heading in first.all("h5")] == ["before", "after"]
    weights = [word.attributes["style"] for word in second.all(name="weighed")[0].all("span")]
    assert weights == ["--a: 17%", "--a: 100%"] and not second.all("img")


def test_failures_show_what_was_found_and_what_was_right():
    dataset, embeddings = planted([0.5, 0.9, 0.1])
    found = {"VQA": mistakes([dataset], [embeddings], 4)}
    section = page(Report("t", mistakes=found, mistakes_of="cocoa")).by_id("mistakes")
    wrong, right = section.all(name="two")[0].all("div")
    assert wrong.text == "candidate 1✗ found, cosine 0.90" and wrong.classes == ["found"]
    assert right.text == "candidate 0✓ right answer, place 2, cosine 0.50"
    assert "by cocoa" in section.text and section.all("h5")[0].text == "toy wrong by 0.40"


def test_what_is_missing_stands_with_its_remedy():
    section = page(Report("t", missing=[Missing("scores", "not scored", "cocoa evaluate X")])).by_id("missing")
    assert section.all("li")[0].text == "scores: not scored. cocoa evaluate X"


def full(runs):
    image = RebuiltImage("toy/0", "text", *[picture("red")] * 3, 0.25, 0.5)
    dataset, embeddings = planted([0.5, 0.9, 0.1])
    return Report(
        "t",
        table(),
        {"a": 1.0},
        ["e"],
        ["u"],
        runs,
        images=[image],
        texts=[text()],
        texts_elsewhere=[text()],
        attention=[looks(Side("Find:", "it", picture("red"))), looks()],
        galleries=[galleries(True)],
        mistakes={"VQA": mistakes([dataset], [embeddings], 4)},
        mistakes_of="cocoa",
        notes=["n"],
        missing=[Missing("x", "y", "z")],
    )


def test_the_page_stands_alone_and_says_where_each_part_is_explained(runs, tmp_path):
    path = tmp_path / "deep" / "report.html"
    write_report(path, full(runs))
    written = path.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|iframe)|@import|url\(|http|src=\"(?!data:)|href=\"(?!#)", written)
    assert "prefers-color-scheme: dark" in written and 'name="viewport"' in written
    root = Page(written).root
    sections = root.all("section")
    order = ["scores", "training", "curves", "images", "texts", "attention", "galleries", "mistakes", "missing"]
    assert [section.attributes["id"] for section in sections] == order
    assert [link.attributes["href"][1:] for link in root.all("nav")[0].all("a")] == [
        s.attributes["id"] for s in sections
    ]
    for section in sections:
        (pointer,) = section.all("span", "doc")
        name, heading = re.search("docs/(.*).md, “(.*)”", pointer.text).groups()
        lines = (Path(__file__).parents[1] / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines()
        assert heading in {line.lstrip("# ") for line in lines if line.startswith("#")}
    with pytest.raises(CocoaError, match=r"report\.html.*cannot be written"):
        write_report(path / "below", full(runs))


def test_what_is_empty_has_no_section():
    root = page(Report("only a title"))
    assert not root.all("section") and root.all("h1")[0].text == "only a title"


def test_text_from_the_data_is_inert(runs):
    evil = '<script>alert(1)</script> & "q" {{ 1234 * 1001 }} \x1b[31m'
    rebuilt = RebuiltText(evil, Side(evil, evil), evil, (Word(evil, False), Word(evil, True)), 2, 1)
    dataset, embeddings = planted([0.5, 0.9])
    dataset = EvalDataset(evil, [Side(evil, evil)] * 3, dataset.queries, dataset.candidates)
    found = Gallery(evil, {evil: gallery(dataset, embeddings, [0])})
    image = RebuiltImage(evil, evil, *[picture("red")] * 3, 0.0, 0.0)
    report = Report(
        evil,
        replace(table((evil, "b", "c"), (evil, evil)), datasets={"VQA": {evil: [Estimate(1.0)]}}),
        {evil: 1.0},
        [evil],
        [evil],
        {evil: runs["cocoa"]},
        images=[image],
        images_of=evil,
        texts=[rebuilt],
        texts_of=evil,
        attention=[replace(looks(Side(evil, evil), [(evil, 1.0)]), models={evil: looks().models["before"]})],
        galleries=[found],
        mistakes={"VQA": mistakes([dataset], [embeddings], 1)},
        mistakes_of=evil,
        notes=[evil],
        missing=[Missing(evil, evil, evil)],
    )
    written = to_html(report)
    assert not re.search(r"<script|\x1b|1235234", written)
    assert written.count("&lt;script&gt;") > 25
