"""What is done about rows that cannot be used: the first is an error, or they are listed and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from cocoa.errors import CocoaError

Policy = Literal["error", "skip"]
POLICIES: tuple[str, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, or (not `left_out`) that is used without one of its wrong candidates."""

    dataset: str
    row: int
    reason: str
    left_out: bool = True


@dataclass
class BadRows:
    """The rows found bad so far.

    Args:
        policy: `error` raises at the first one, `skip` keeps the list.
    """

    policy: str = "error"
    found: list[BadRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise CocoaError(f"on-bad-row {self.policy!r}: choose {' or '.join(POLICIES)}")

    def add(self, dataset: str, rows: Iterable[int], reason: str, left_out: bool = True) -> None:
        """Take note of rows of a data set that are bad for one reason.

        Raises:
            CocoaError: there is one, and the policy is `error`.
        """
        for row in rows:
            if self.policy == "error":
                raise CocoaError(f"data set {dataset}, row {row}: {reason}")
            self.found.append(BadRow(dataset, row, reason, left_out))

    def left_out(self) -> Counter[str]:
        """How many rows of each data set are left out."""
        return Counter(bad.dataset for bad in self.found if bad.left_out)
