"""Time and memory of the head on masked positions only, against all positions: `python benchmarks/masked_head.py`.

Forward and backward of the language-model head with cross-entropy, at Qwen2-VL-2B's width and vocabulary; one
run prints the ratio. Both compute the same loss (checked).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cocoa.corruption import IGNORE_INDEX, choose
from cocoa.reconstruction import predict_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the positions that are masked")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(args.hidden, args.vocabulary, bias=False, device=device)
    states = torch.randn(1, args.positions, args.hidden, generator=generator).to(device).requires_grad_()
    labels = torch.randint(1, args.vocabulary, (1, args.positions), generator=generator)
    hidden = choose(args.positions - 1, args.ratio, generator)
    labels[0, 1:][~hidden] = IGNORE_INDEX
    labels[0, 0] = IGNORE_INDEX
    labels = labels.to(device)

    def masked() -> Tensor:
        return predict_tokens(states, head, labels, excluded_ids=[0]).losses.sum()

    def everywhere() -> Tensor:
        logits = head(states)[:, :-1].float()
        logits[..., 0] = float("-inf")
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    assert torch.allclose(masked(), everywhere(), rtol=1e-4)
    times = {name: seconds(loss, args.repeats, device) for name, loss in (("masked", masked), ("all", everywhere))}
    logits = {"masked": int(hidden.sum()), "all": args.positions - 1}
    for name, median in times.items():
        megabytes = logits[name] * args.vocabulary * 4 / 1e6
        print(f"{name:>6}: {1000 * median:8.1f} ms, {megabytes:8.1f} MB of float32 logits")
    print(f" ratio: {times['all'] / times['masked']:.1f} x the time, on {device}, torch {torch.__version__}")


def seconds(loss: Callable[[], Tensor], repeats: int, device: str) -> float:
    """Median of a forward and backward pass, after one that is not counted."""
    measured = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured[1:])


if __name__ == "__main__":
    main()
