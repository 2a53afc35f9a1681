"""Batches of equal work, and what they need made ahead."""

import time

import pytest

from cocoa.batching import AHEAD, MOST_SHORT, equal_work, filled, prepared


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_hold_every_input_once_and_no_more_tokens_than_that_many_of_the_longest(batch_size):
    lengths = [(7 * i) % 50 + 1 for i in range(200)] + [300]
    batches = equal_work(lengths, batch_size)
    assert sorted(index for batch in batches for index in batch) == list(range(201))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= batch_size * 300
        assert len(batch) <= batch_size * MOST_SHORT
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True)  # what needs the most memory comes first


def test_inputs_of_no_tokens_make_batches_too():
    assert equal_work([0, 0, 0], 2) == [[0, 1], [2]]


def test_equal_lengths_make_plain_batches_and_nothing_makes_none():
    assert equal_work([5] * 7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert equal_work([], 3) == []


def test_batches_are_prepared_ahead_in_order_and_not_all_at_once():
    asked = []

    def prepare(batch):
        asked.append(batch[0])
        return batch[0] * 10

    found = prepared([[i] for i in range(20)], prepare)
    assert next(found) == ([0], 0)
    time.sleep(0.2)
    assert len(asked) <= AHEAD + 1
    assert list(found) == [([i], i * 10) for i in range(1, 20)]


def test_a_failure_to_prepare_is_raised():
    def prepare(batch):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(prepared([[0]], prepare))


def test_parts_keep_the_order_and_hold_no_more_than_asked_but_for_one_that_is_larger():
    assert filled([3, 3, 4, 12, 1, 9, 1], 10) == [[0, 1, 2], [3], [4, 5], [6]]
    assert filled([], 10) == []
