"""Learning rates and weight decay after a restart: those of the run that goes on, where its recipe has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_KEPT = ("initial_lr", "weight_decay")


def rates_of(optimizer: Any) -> list[dict[str, float]]:
    """What each group of an optimizer is set to, to be kept when its state is read."""
    return [{key: group[key] for key in _KEPT if key in group} for group in optimizer.param_groups]


def keep_rates(own: Sequence[dict[str, float]], optimizer: Any, scheduler: Any) -> None:
    """Put them back, and the learning rates of this moment in proportion; in place.

    Args:
        own: what `rates_of` gave before the states were read.
        optimizer: whose state was read.
        scheduler: likewise.
    """
    groups = optimizer.param_groups
    for group, values in zip(groups, own, strict=True):
        if (new := values.get("initial_lr")) != (old := group.get("initial_lr")):
            group["lr"] *= new / old
        group.update(values)
    rates = {"base_lrs": "initial_lr", "_last_lr": "lr"}
    restored = {name: [group.get(key, group["lr"]) for group in groups] for name, key in rates.items()}
    scheduler.load_state_dict(scheduler.state_dict() | restored)
