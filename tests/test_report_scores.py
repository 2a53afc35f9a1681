"""Scores of the report: averages and intervals by hand-made folders, published numbers only beside MMEB's data sets."""

import numpy as np
import pytest
from test_compare import HIT, MISS, A, B, evaluation

from cocoa.bootstrap import LEVEL
from cocoa.catalogue import datasets as table_of
from cocoa.compare import compare, named_apart, read_run
from cocoa.report_scores import OTHER, Estimate, estimates, score_table
from cocoa.scores import published


def runs(*folders):
    return named_apart([read_run(folder) for folder in folders])


@pytest.fixture
def two(tmp_path):
    return runs(evaluation(tmp_path / "a", A), evaluation(tmp_path / "b", B, "runs/b/final"))


def test_scores_are_those_of_compare_and_differences_too(two, tmp_path):
    found = score_table(two)
    expected = compare([tmp_path / "a", tmp_path / "b"])
    assert found.models == ["a/final", "b/final"] and found.rivals == ("a/final", "b/final")
    assert {name: [each.hit for each in row] for name, row in found.groups.items()} == {
        name: pytest.approx([score.hit for score in row]) for name, row in expected.averages.items()
    }
    assert found.gains == {name: row[1] for name, row in expected.averages.items()}
    assert list(found.datasets) == ["VQA", "Grounding"] and list(found.datasets["VQA"]) == ["GQA", "ChartQA"]
    assert found.ood == {"GQA"} and found.best("OOD (1 of 16 sets)") == 75


def test_whoever_is_the_rival_the_columns_stay_in_order(two):
    found = score_table(two, rivals=("b/final", "a/final"))
    plain = score_table(two)
    assert found.models == plain.models and found.groups == plain.groups
    assert {name: score.difference for name, score in found.gains.items()} == {
        name: pytest.approx(-score.difference) for name, score in plain.gains.items()
    }


def test_an_interval_covers_what_a_binomial_says(tmp_path):
    """The share of samples whose hit@1 lies within, by an exact count of the binomial."""
    rng = np.random.default_rng(0)
    (run,) = runs(evaluation(tmp_path, {"GQA": (1 + (rng.random(400) > 0.3)).tolist()}))
    (found,) = estimates(run, [["GQA"]], 20_000, 0)
    samples = 100 * rng.binomial(400, found.hit / 100, 20_000) / 400
    assert np.mean((samples >= found.low) & (samples <= found.high)) == pytest.approx(LEVEL, abs=0.02)
    assert found.low < found.hit < found.high


def test_averages_vary_less_than_their_data_sets(tmp_path):
    rng = np.random.default_rng(0)
    own = {name: rng.integers(1, 3, 50).tolist() for name in list(table_of())[:9]}
    (run,) = runs(evaluation(tmp_path, own))
    whole, one = estimates(run, [list(own), [next(iter(own))]], 10_000, 0)
    assert (whole.high - whole.low) == pytest.approx((one.high - one.low) / 3, rel=0.15)


def test_without_ranks_there_is_a_score_and_no_interval(tmp_path):
    (run,) = runs(evaluation(tmp_path, A, keep_ranks=False))
    assert estimates(run, [["GQA"]], 100, 0) == [Estimate(25)]
    assert not score_table([run]).intervals


def test_published_numbers_stand_beside_whole_averages_of_mmeb_alone(two, tmp_path):
    part = score_table(two)
    assert [row.model for row in part.published] == [row["model"] for row in published()]
    assert not any(part.marks(group) for group in part.groups)
    scenes = score_table(runs(evaluation(tmp_path / "scenes", {name: [HIT] for name in table_of("scenes")})))
    assert list(scenes.groups)[-1] == "All" and not scenes.published and not scenes.marks("All")
    whole = score_table(runs(evaluation(tmp_path / "whole", {name: [HIT, MISS] for name in table_of()})))
    assert ("CoCoA Qwen2-VL 2B", 66.0) in whole.marks("All")
    assert len(whole.marks("IND")) == sum("IND" in row for row in published()) < len(whole.published)


def test_other_data_sets_stand_last(tmp_path):
    found = score_table(runs(evaluation(tmp_path, {"mine": [HIT], **A})))
    assert list(found.datasets) == ["VQA", "Grounding", OTHER] and found.rivals is None and not found.gains


def test_runs_without_scores_have_no_column(two):
    assert score_table([]) is None
    bare = runs()
    assert score_table(bare) is None
