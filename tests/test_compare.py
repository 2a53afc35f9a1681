"""Runs beside each other: the table's numbers from hand-made folders, what cannot be compared, mistakes."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cocoa.account import FACTS
from cocoa.bootstrap import interval, outcomes, resampled_differences
from cocoa.catalogue import datasets as table
from cocoa.cli import app
from cocoa.compare import Score, compare, read_run
from cocoa.compare_table import markdown, numbers, sections
from cocoa.errors import CocoaError
from cocoa.files import write_json
from cocoa.metrics import metrics
from cocoa.scores import write_ranks, write_scores

HIT, MISS = 1, 2
A = {"GQA": [HIT, MISS, MISS, MISS], "ChartQA": [HIT] * 3 + [MISS] * 7, "MSCOCO": [HIT, MISS]}
B = {"GQA": [HIT, HIT, HIT, MISS], "ChartQA": [MISS] * 2 + [HIT] * 2 + [MISS] * 6, "MSCOCO": [HIT, MISS]}
"""Ranks: hit@1 of 25, 30, 50 % and of 75, 20, 50 %."""


def evaluation(folder, ranks, model="runs/a/final", record=None, hashes=None, keep_ranks=True):
    """An evaluation's folder, as `cocoa evaluate` writes it."""
    tensors = {name: torch.tensor(own) for name, own in ranks.items()}
    about = {"model": model, "recipe": record or {}, "data_hash": dict.fromkeys(ranks, "same") | (hashes or {})}
    if keep_ranks:
        write_ranks(folder, tensors, {name: list(range(len(own))) for name, own in ranks.items()})
    write_scores(folder, {name: metrics(own) for name, own in tensors.items()}, about)
    return folder


def record(stage="contrastive", seconds=60.0, tokens=1000, peak=2.0, device="cpu", history=()):
    return dict(zip(FACTS, (stage, 3, seconds, tokens, peak, device), strict=True)) | {"history": list(history)}


def hits(scores):
    return [score.hit for score in scores]


# ---------------------------------------------------------------------------------------------- the numbers


def test_averages_and_differences_by_hand(tmp_path):
    runs = [evaluation(tmp_path / "a", A), evaluation(tmp_path / "b", B, "runs/b/final")]
    found = compare(runs)
    assert [run.name for run in found.runs] == ["a/final", "b/final"] and not found.notes
    assert {name: hits(row) for name, row in found.datasets.items()} == {
        "GQA": pytest.approx([25, 75]),
        "ChartQA": pytest.approx([30, 20]),
        "MSCOCO": pytest.approx([50, 50]),
    }
    assert {name: hits(row) for name, row in found.averages.items()} == {
        "VQA (2 of 10 sets)": pytest.approx([27.5, 47.5]),
        "Grounding (1 of 4 sets)": pytest.approx([50, 50]),
        "IND (2 of 20 sets)": pytest.approx([40, 35]),
        "OOD (1 of 16 sets)": pytest.approx([25, 75]),
        "All (3 of 36 sets)": pytest.approx([35, 145 / 3]),
    }
    assert set(found.members["All (3 of 36 sets)"]) == set(A)
    for row in (*found.averages.values(), *found.datasets.values()):
        assert row[0].difference is None and row[1].difference == pytest.approx(row[1].hit - row[0].hit)


def test_intervals_are_those_of_the_bootstrap_over_the_row_s_data_sets(tmp_path):
    rng = np.random.default_rng(0)
    a, b = ({name: rng.integers(1, 4, 300).tolist() for name in A} for _ in range(2))
    runs = [evaluation(tmp_path / "a", a), evaluation(tmp_path / "b", b, "runs/b/final")]
    found = compare(runs, resamples=5000, seed=3)
    counts = np.array([outcomes(np.array(a[name]) == HIT, np.array(b[name]) == HIT) for name in A])
    drawn = 100 * resampled_differences(counts, 20_000, seed=9)  # GQA, ChartQA, MSCOCO
    for score, places in (
        (found.averages["VQA (2 of 10 sets)"][1], [0, 1]),
        (found.averages["All (3 of 36 sets)"][1], [0, 1, 2]),
        (found.datasets["ChartQA"][1], [1]),
    ):
        own = drawn[:, places].mean(1)
        assert (score.low, score.high) == pytest.approx(interval(own), abs=0.15 * own.std())
    again = compare([*runs, runs[0]], resamples=5000, seed=3)  # whoever stands beside it
    assert [row[1] for row in again.datasets.values()] == [row[1] for row in found.datasets.values()]
    assert compare(runs, resamples=5000, seed=4).datasets != found.datasets


def test_a_whole_benchmark_has_the_averages_of_its_summary(tmp_path):
    rng = np.random.default_rng(0)
    ranks = [{name: rng.integers(1, 4, 30).tolist() for name in table()} for _ in range(2)]
    runs = [evaluation(tmp_path / str(i), own, f"runs/{i}/final") for i, own in enumerate(ranks)]
    found = compare(runs, resamples=200)
    for i, run in enumerate(runs):
        averages = json.loads((run / "summary.json").read_text())["averages"]
        assert {name: row[i].hit for name, row in found.averages.items()} == {
            name: pytest.approx(average["hit@1"]) for name, average in averages.items()
        }
    assert all(row[1].low < row[1].difference < row[1].high for row in found.averages.values())


def test_the_same_run_twice_differs_by_nothing(tmp_path):
    run = evaluation(tmp_path / "a", A)
    found = compare([run, run])
    assert [one.name for one in found.runs] == [f"a/final ({run}) #1", f"a/final ({run}) #2"]
    for row in (*found.averages.values(), *found.datasets.values()):
        assert (row[1].difference, row[1].low, row[1].high) == (0, 0, 0)
        assert str(row[1]).endswith("+0.0 [+0.0, +0.0]")


def test_one_run_alone_is_shown_without_differences(tmp_path):
    found = compare([evaluation(tmp_path / "a", A)])
    assert hits(found.datasets["GQA"]) == pytest.approx([25]) and not found.notes
    assert "bootstrap" not in markdown(found, False) and "| GQA | 25.0 |" in markdown(found, True)


def test_own_data_sets_have_an_average(tmp_path):
    own = {"mine": [HIT, MISS], "yours": [HIT, HIT]}
    found = compare([evaluation(tmp_path / "own", own)])
    assert {name: hits(row) for name, row in found.averages.items()} == {"mean of these 2": [75]}
    found = compare([evaluation(tmp_path / "both", {**A, **own})])
    assert hits(found.averages["mean of these 5"]) == pytest.approx([(25 + 30 + 50 + 50 + 100) / 5])
    assert hits(found.averages["All (3 of 36 sets)"]) == pytest.approx([35])
    scenes = compare([evaluation(tmp_path / "scenes", {name: [HIT] for name in table("scenes")})])
    assert list(scenes.averages) == ["Classification", "VQA", "Retrieval", "Grounding", "IND", "OOD", "All"]


def test_a_data_set_with_an_average_s_name_is_a_data_set(tmp_path):
    found = compare([evaluation(tmp_path, {**{name: [HIT] for name in table("scenes")}, "VQA": [MISS]})])
    assert (found.averages["VQA"], found.datasets["VQA"]) == ([Score(100)], [Score(0)])


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Score(), "-"),
        (Score(46.94), "46.9"),
        (Score(46.94, -0.01), "46.9 +0.0"),
        (Score(46.94, 12.24, 10.11, 14.38), "46.9 +12.2 [+10.1, +14.4]*"),
        (Score(46.94, -2.0, -4.0, -0.1), "46.9 -2.0 [-4.0, -0.1]*"),
        (Score(46.94, 2.0, 0.0, 4.0), "46.9 +2.0 [+0.0, +4.0]"),
    ],
)
def test_a_cell_is_marked_where_its_interval_excludes_nothing(score, text):
    assert str(score) == text


# ------------------------------------------------------------------------------------- what cannot be compared


def test_other_data_is_refused_for_that_data_set(tmp_path):
    runs = [
        evaluation(tmp_path / "a", A),
        evaluation(tmp_path / "b", B, "runs/b/final", hashes={"GQA": "another"}),
    ]
    found = compare(runs)
    assert list(found.datasets) == ["ChartQA", "MSCOCO"] and "OOD (1 of 16 sets)" not in found.averages
    (note,) = found.notes
    assert note.startswith("left out: GQA: ") and "a/final and b/final" in note and "same files" in note
    with pytest.raises(
        CocoaError, match=r"no data set can be compared: left out: GQA, .* on different data; evaluate both"
    ):
        compare([evaluation(tmp_path / "c", A), evaluation(tmp_path / "d", B, hashes=dict.fromkeys(A, "another"))])


def test_a_data_set_that_is_not_in_all_runs_is_left_out_and_named(tmp_path):
    some = {name: B[name] for name in ("ChartQA", "MSCOCO")}
    runs = [evaluation(tmp_path / "a", A), evaluation(tmp_path / "b", some, "runs/b/final")]
    for order in (runs, runs[::-1]):
        found = compare(order)
        assert set(found.datasets) == set(some)
        assert found.notes == ["left out: GQA: not scored in b/final"]


def test_an_evaluation_without_ranks_has_scores_and_no_interval(tmp_path):
    runs = [evaluation(tmp_path / "a", A), evaluation(tmp_path / "old", B, "runs/old/final", keep_ranks=False)]
    found = compare(runs)
    assert found.datasets["GQA"][1] == Score(75, 50) and found.averages["All (3 of 36 sets)"][1].low is None
    (note,) = found.notes
    assert "old/final: " in note and "ranks.parquet" in note and "evaluate again" in note
    assert "bootstrap" not in markdown(found, True)


# ------------------------------------------------------------------------------------------- what training took


def trained(folder, **facts):
    (folder / "final").mkdir(parents=True)
    write_json(folder / "final" / "cocoa.json", {**record(**facts), "image": {}, "versions": {}})
    return folder


def test_a_training_run_shows_what_it_took_and_its_scores_where_they_are(tmp_path):
    first = {key: value for key, value in record("joint_reconstruction", 40.0, 234_567, 1.5).items() if key in FACTS}
    cocoa = trained(tmp_path / "cocoa", seconds=60.0, tokens=1_000_000, history=[first])
    rival = trained(tmp_path / "rival", seconds=55.0, tokens=900_000, peak=1.25, device="H100")
    found = compare([rival, cocoa])
    assert [run.name for run in found.runs] == ["rival/final", "cocoa/final"]
    assert (found.averages, found.datasets) == ({}, {}) and len(found.notes) == 2 and "no scores" in found.notes[0]
    assert sections(found, False)[-1] == {
        "training: seconds": ["55", "100"],
        "tokens": ["900,000", "1,234,567"],
        "peak memory (GB)": ["1.2", "2.0"],
        "device": ["H100", "cpu"],
        "stages (steps)": ["contrastive (3)", "joint_reconstruction (3), contrastive (3)"],
    }
    whole = json.loads((cocoa / "final" / "cocoa.json").read_text())
    made = {key: value for key, value in whole.items() if key not in ("image", "versions")}
    evaluation(cocoa / "scores", A, str(cocoa / "final"), made)
    found = compare([cocoa, rival])
    assert hits(found.datasets["GQA"]) == [25, None] and found.datasets["GQA"][1] == Score()
    assert found.runs[0].stages == read_run(cocoa / "scores").stages  # by its run, or by its scores
    assert any("no scores" in note for note in compare([rival, cocoa]).notes)
    assert "no differences" in compare([rival, cocoa, cocoa]).notes[-1]

    evaluation(cocoa / "scores", A, str(cocoa / "final"), made | {"seconds": 61.0})
    with pytest.raises(CocoaError, match=r"scores: of another checkpoint than .*final; evaluate again"):
        compare([cocoa])


def test_an_untouched_backbone_has_no_account(tmp_path):
    found = compare([evaluation(tmp_path, A, "mini-qwen2-vl")])
    assert {cell for row in sections(found, False)[-1].values() for cell in row} == {"-"}


# ---------------------------------------------------------------------------------------- command, and mistakes


def test_the_command_shows_the_table_and_writes_it(tmp_path):
    runs = [evaluation(tmp_path / "a", A, record=record()), evaluation(tmp_path / "b", B, "runs/b|c/final")]
    page, file = tmp_path / "new" / "table.md", tmp_path / "numbers.json"
    options = ["--datasets", "--output", str(page), "--json", str(file), "--resamples", "500", "--seed", "7"]
    done = CliRunner().invoke(app, ["compare", *map(str, runs), *options], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    found = compare(runs, 500, 7)
    for text in (
        "VQA (2 of 10 sets)",
        "GQA",
        str(found.datasets["GQA"][1]),
        "500 resamples, seed 7",
        "tokens",
        "1,000",
    ):
        assert text in done.output
    assert json.loads(file.read_text()) == json.loads(json.dumps(numbers(found)))
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert lines[:2] == ["|  | a/final | b/c/final |", "| --- | ---: | ---: |"]
    assert f"| ChartQA | 30.0 | {found.datasets['ChartQA'][1]} |".replace("*", "\\*") in lines
    assert len({line.count("|") for line in lines}) == 1
    short = CliRunner().invoke(app, ["compare", *map(str, runs)], env={"COLUMNS": "200"})
    assert "GQA" not in short.output and "VQA" in short.output


def test_mistakes_name_the_folder_and_the_remedy(tmp_path):
    with pytest.raises(CocoaError, match=r"nowhere: neither summary\.json nor final/cocoa\.json .* `cocoa train`"):
        compare([tmp_path / "nowhere"])
    run = evaluation(tmp_path / "a", A)
    (run / "ranks.parquet").write_bytes(b"broken")
    with pytest.raises(CocoaError, match=r"ranks\.parquet: cannot be read .*evaluate again"):
        compare([run])
    evaluation(run, A)
    write_ranks(run, {"GQA": torch.tensor([1, 1, 2, 2])}, {"GQA": [0, 1, 2, 3]})
    with pytest.raises(CocoaError, match=r"data set GQA: .*ranks\.parquet and summary\.json are of two evaluations"):
        compare([run])
    for text in ("{", "[]", "{}", '{"model": "a", "datasets": 3}'):
        (run / "summary.json").write_text(text)
        with pytest.raises(CocoaError, match=r"summary\.json: not a summary of `cocoa evaluate`"):
            compare([run])
