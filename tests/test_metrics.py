"""The metric: ranks with ties and duplicates, metrics by hand, averages over data sets."""

from math import log2

import numpy as np
import pytest
import torch

from cocoa import metrics as module
from cocoa.catalogue import datasets as mmeb_datasets
from cocoa.errors import CocoaError
from cocoa.metrics import distinct_rows, metrics, rank, summary
from cocoa.mmeb_eval import EvalDataset
from cocoa.pairs import Side

KINDS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")


# ---------------------------------------------------------------------------------------------------- ranks


def planted(*lists):
    """A data set and embeddings whose row i compares its query with candidates at the cosines of list i."""
    vectors, queries, candidates = [], [], []
    for cosines in lists:
        queries.append(len(vectors))
        candidates.append(np.arange(len(vectors) + 1, len(vectors) + 1 + len(cosines)))
        vectors += [(1.0, 0.0), *((cosine, (1 - cosine**2) ** 0.5) for cosine in cosines)]
    sides = [Side(text=str(i)) for i in range(len(vectors))]
    return EvalDataset("toy", sides, np.array(queries), candidates), torch.tensor(vectors)


def test_the_rank_is_that_of_the_first_candidate_in_lists_of_any_length():
    dataset, embeddings = planted([0.5, 0.9, 0.1], [0.5, 0.1], [0.1, 0.2, 0.3, 0.4, 0.0], [0.7])
    assert rank(dataset, embeddings).tolist() == [2, 1, 4, 1]


def test_a_tie_counts_against_the_model():
    dataset, embeddings = planted([0.5, 0.5, 0.1], [0.9, 0.9, 0.9], [0.5, 0.4, 0.4])
    assert rank(dataset, embeddings).tolist() == [2, 3, 1]


@pytest.mark.parametrize("candidates", [2, 3, 5, 7, 200, 365, 1000])
def test_a_collapsed_model_scores_nothing(candidates):
    """Whatever the pool's size: a matrix product may round equal candidates differently by their place."""
    vector = torch.nn.functional.normalize(torch.randn(1536, generator=torch.Generator().manual_seed(0)), dim=0)
    embeddings = vector.repeat(candidates + 1, 1)
    sides = [Side(text=str(i)) for i in range(candidates + 1)]
    ranks = rank(EvalDataset("toy", sides, np.array([0]), [np.arange(1, candidates + 1)]), embeddings)
    assert ranks.tolist() == [candidates]
    assert metrics(ranks)["hit@1"] == 0


@pytest.mark.parametrize("at_once", [1, 50, 2**26])
def test_ranks_are_those_of_a_plain_loop(monkeypatch, at_once):
    """Random pools of unequal length, coarse values so that ties abound, and right candidates that come twice."""
    monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    embeddings = torch.from_numpy(rng.integers(-2, 3, (60, 4)).astype(np.float32))
    queries = rng.integers(0, 60, 40)
    candidates = [rng.integers(0, 60, rng.integers(1, 30)) for _ in queries]
    expected = []
    for query, ids in zip(queries, candidates, strict=True):
        scores = [float(embeddings[query] @ embeddings[i]) for i in ids]
        expected.append(1 + sum(s >= scores[0] and i != ids[0] for s, i in zip(scores, ids, strict=True)))
    dataset = EvalDataset("toy", [Side(text=str(i)) for i in range(60)], queries, candidates)
    assert rank(dataset, embeddings).tolist() == expected


def test_equal_rows_are_one():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -0.0], [0.0, 1.0], [0.5, 0.5]])
    vectors, which = distinct_rows(rows)
    assert which.tolist() == [0, 1, 0, 1, 2]
    torch.testing.assert_close(vectors[which], rows, atol=0, rtol=0)


def test_exact_duplicates_of_the_right_candidate_leave_the_list():
    dataset, embeddings = planted([0.5, 0.9, 0.1])
    right, better, worse = dataset.candidates[0].tolist()
    for ids, expected in (([right, worse, right], 1), ([right, right, better, worse], 2)):
        again = EvalDataset("toy", dataset.inputs, dataset.queries, [np.array(ids)])
        assert rank(again, embeddings).tolist() == [expected]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["query", "right candidate", "other candidate"])
def test_an_embedding_that_is_not_finite_is_named(value, place):
    dataset, embeddings = planted([0.5, 0.4], [0.5, 0.4])
    embeddings[3 + ("query", "right candidate", "other candidate").index(place), 1] = value
    with pytest.raises(CocoaError, match="data set toy, row 1: an embedding is not finite"):
        rank(dataset, embeddings)


# -------------------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand():
    """Four queries, their right candidates at ranks 1, 2, 6 and 11."""
    found = metrics(torch.tensor([1, 2, 6, 11]))
    expected = {
        "hit": (1 / 4, 2 / 4, 3 / 4),
        "recall": (1 / 4, 2 / 4, 3 / 4),
        "precision": (1 / 4, 2 / 4 / 5, 3 / 4 / 10),
        "f1": (1 / 4, 2 * (1 / 3) / 4, 3 * (2 / 11) / 4),  # 2 P R / (P + R) with P = 1 / k and R = 1
        "mrr": (1 / 4, (1 + 1 / 2) / 4, (1 + 1 / 2 + 1 / 6) / 4),
        "map": (1 / 4, (1 + 1 / 2) / 4, (1 + 1 / 2 + 1 / 6) / 4),
        "ndcg_linear": (1 / 4, (1 + 1 / log2(3)) / 4, (1 + 1 / log2(3) + 1 / log2(7)) / 4),
        "ndcg_exponential": (1 / 4, (1 + 1 / log2(3)) / 4, (1 + 1 / log2(3) + 1 / log2(7)) / 4),
    }
    for name, values in expected.items():
        for k, value in zip((1, 5, 10), values, strict=True):
            assert found[f"{name}@{k}"] == pytest.approx(value), f"{name}@{k}"
    assert (found["num_pred"], found["num_data"]) == (4, 4)
    assert set(found) == {f"{kind}@{k}" for kind in KINDS for k in (1, 5, 10)} | {"num_pred", "num_data"}


# ------------------------------------------------------------------------------------------------- averages


def test_averages_are_plain_means_over_data_sets_not_over_groups():
    """VLM2Vec-V2.0-2B's own scores, each data set at its group's mean: 64.92 overall, where groups would give 66.52."""
    groups = {"Classification": 62.93, "VQA": 56.42, "Retrieval": 69.60, "Grounding": 77.12}
    scores = {entry.name: {"hit@1": groups[entry.meta_task] / 100} for entry in mmeb_datasets().values()}
    averages = summary(scores)["averages"]
    assert averages["All"]["hit@1"] == pytest.approx(64.92, abs=0.005)
    for group, value in groups.items():
        assert averages[group]["hit@1"] == pytest.approx(value)
    sizes = {group: average["datasets"] for group, average in averages.items()}
    assert sizes == {"Classification": 10, "VQA": 10, "Retrieval": 12, "Grounding": 4, "IND": 20, "OOD": 16, "All": 36}
    assert not any(average["missing"] for average in averages.values())


def test_in_and_out_of_distribution_make_up_the_whole():
    """Its IND 68.82 over 20 data sets and OOD 60.05 over 16 are its 64.92 over 36."""
    scores = {entry.name: {"hit@1": 0.6005 if entry.ood else 0.6882} for entry in mmeb_datasets().values()}
    averages = summary(scores)["averages"]
    assert (averages["IND"]["hit@1"], averages["OOD"]["hit@1"]) == (pytest.approx(68.82), pytest.approx(60.05))
    assert averages["All"]["hit@1"] == pytest.approx(64.92, abs=0.005)


def test_what_is_missing_is_named_and_own_data_sets_stand_alone():
    scores = {name: {"hit@1": hit} for name, hit in (("GQA", 0.2), ("ChartQA", 0.6), ("MSCOCO", 0.1), ("mine", 0.9))}
    found = summary(scores)
    assert found["datasets"] == {name: pytest.approx(100 * score["hit@1"]) for name, score in scores.items()}
    averages = found["averages"]
    assert averages["VQA"]["hit@1"] == pytest.approx(40) and averages["VQA"]["datasets"] == 2
    assert averages["VQA"]["of"] == 10 and len(averages["VQA"]["missing"]) == 8
    assert "DocVQA" in averages["VQA"]["missing"] and "GQA" not in averages["VQA"]["missing"]
    assert averages["All"]["hit@1"] == pytest.approx(30)
    assert averages["OOD"]["hit@1"] == pytest.approx(20)
    assert averages["Retrieval"]["hit@1"] is None and len(averages["Retrieval"]["missing"]) == 12


def test_scenes_are_averaged_over_their_own_table():
    table = mmeb_datasets("scenes")
    scores = {entry.name: {"hit@1": 0.2 if entry.ood else 0.6} for entry in table.values()}
    averages = summary(scores)["averages"]
    assert averages["All"]["hit@1"] == pytest.approx(40) and averages["All"]["of"] == len(table)
    assert (averages["IND"]["hit@1"], averages["OOD"]["hit@1"]) == (pytest.approx(60), pytest.approx(20))
    assert not averages["Grounding"]["missing"]
