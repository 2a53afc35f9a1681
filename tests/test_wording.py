"""Numbers as people read them."""

from cocoa.wording import count, duration, percent, short, size


def test_numbers_in_words():
    assert [size(n) for n in (0, 999, 1500, 2.5e9, 3e12)] == ["0 B", "999 B", "1.5 kB", "2.5 GB", "3 TB"]
    assert [duration(h) for h in (0.001, 0.5, 2.25, 80)] == ["< 1 min", "≈ 30 min", "≈ 2.2 h", "≈ 80 h"]
    assert [short(x) for x in (0.25, 9.7656, 6000)] == ["0.25", "9.77", "6,000"]
    assert [percent(p, 1000) for p in (6.7, 630, 1000)] == ["0.67 %", "63 %", "100 %"]
    assert [count(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
