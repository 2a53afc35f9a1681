"""Thousands of mutated images, archives, parquet files, texts and recipes: what crashes, hangs or takes all memory?

    python benchmarks/fuzz.py [--inputs 4000] [--kinds images recipes ...] [--seed 0] [--keep DIR]

The strategies are those of `tests/test_fuzz.py`. Inputs are read in child processes, whose address space may grow by
1.5 GB; the resident memory is counted, and may grow by 1 GB. An input may take 2 s of processor time, and 30 s of a
clock (a hang that waits, a busy machine). A child that an input ends is followed by another. Prints a table, and ends
with an error if an input crashed a reader; `--keep` saves such inputs there.
"""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL
import pyarrow
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import __version__ as hypothesis_version
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import fuzz_images
import fuzz_recipes
import fuzz_tables
from fuzzing import Kind, survives

console = Console(width=120)
KINDS: dict[str, Kind] = {**fuzz_images.KINDS, **fuzz_tables.KINDS, **fuzz_recipes.KINDS}
ADDRESS_SPACE = 1_500_000_000
MEMORY = 1_000_000_000
SECONDS = 2
PATIENCE = 30
AT_ONCE = 500
"""Inputs of a child."""


@dataclass
class Tally:
    """What became of the inputs of a kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0
    highest: int = 0
    faults: list[str] = field(default_factory=list)


def memory() -> tuple[int, int]:
    """Bytes of this process: its address space, and what is resident."""
    space, resident = (int(part) for part in Path("/proc/self/statm").read_text().split()[:2])
    return space * resource.getpagesize(), resident * resource.getpagesize()


def highest() -> int:
    """The most bytes that were resident since `clear_refs`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def attempt(kind: Kind, case: Any, folder: Path) -> tuple[str, str, float, int]:
    """(outcome, fault, seconds of processor, bytes) of one input."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began, fault = memory()[1], time.process_time(), ""
    try:
        outcome = survives(kind, case, folder)
    except MemoryError:
        outcome, fault = "crash", "memory"
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        outcome, fault = "crash", f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {str(error)[:200]}"
    seconds, grown = time.process_time() - began, highest() - before
    if grown > MEMORY or seconds > SECONDS:
        outcome, fault = "crash", f"{seconds:.1f} s, {grown / 1e6:.0f} MB"
    return outcome, fault, seconds, grown


def work(name: str, inputs: int, number: int, folder: Path, pipe: Connection) -> None:
    """The child: tell of every input before and after it is read."""
    os.chdir(folder)
    quiet = os.open(os.devnull, os.O_WRONLY)  # libtiff and transformers complain about every other input
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory()[0] + ADDRESS_SPACE,) * 2)
    count = 0

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(KINDS[name].cases)
    def run(case: Any) -> None:
        nonlocal count
        count += 1
        place = folder / f"{number}-{count}"  # archives stay open: never two of one path
        place.mkdir()
        pipe.send(case)
        pipe.send(attempt(KINDS[name], case, place))
        shutil.rmtree(place)

    run()
    pipe.send(None)


def campaign(name: str, inputs: int, first: int, keep: Path | None, progress: Progress) -> Tally:
    """All inputs of a kind, a child after the other."""
    tally, bar, number = Tally(), progress.add_task(name, total=inputs), first
    while sum(tally.outcomes.values()) < inputs:
        number += 1
        left = min(AT_ONCE, inputs - sum(tally.outcomes.values()))
        for case, (outcome, fault, seconds, grown) in results(name, left, number):
            tally.outcomes[outcome] += 1
            tally.slowest, tally.highest = max(tally.slowest, seconds), max(tally.highest, grown)
            if fault:
                tally.faults.append(fault)
                if keep is not None:
                    (keep / f"{name}-{number}-{len(tally.faults)}.pickle").write_bytes(pickle.dumps((fault, case)))
            progress.advance(bar)
    return tally


def results(name: str, inputs: int, number: int) -> Any:
    """Each (input, what `attempt` found) of one child; the last input is the one that ended it, if one did."""
    context = get_context("fork")
    with TemporaryDirectory() as folder:
        pipe, end = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(name, inputs, number, Path(folder), end))
        child.start()
        end.close()
        case = None
        try:
            while (case := _received(pipe, 600)) is not None:
                yield case, _received(pipe, PATIENCE)
        except (EOFError, TimeoutError) as error:
            hung = isinstance(error, TimeoutError)
            if hung:
                os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            fault = f"{PATIENCE} s" if hung else f"the process ended with {child.exitcode}"
            yield case, ("crash", fault, float(PATIENCE * hung), 0)
        child.join()


def _received(pipe: Connection, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise TimeoutError
    return pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=4000, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    versions = {"Pillow": PIL.__version__, "pyarrow": pyarrow.__version__, "PyYAML": yaml.__version__}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    columns = ("kind", "inputs", "accepted", "refused", "crashes", "slowest ms", "highest MB")
    table = Table(*columns, title=f"seed {options.seed}, {told}, hypothesis {hypothesis_version}")
    faults: Counter[str] = Counter()
    with Progress(console=console) as progress:
        for name in options.kinds:
            tally = campaign(name, options.inputs, options.seed * 1_000_000, options.keep, progress)
            counts = [tally.outcomes[each] for each in ("accepted", "refused", "crash")]
            row = (sum(counts), *counts, f"{tally.slowest * 1000:.0f}", f"{tally.highest / 1e6:.0f}")
            table.add_row(name, *map(str, row))
            faults.update(f"{name}: {fault}" for fault in tally.faults)
    console.print(table)
    for fault, count in faults.most_common():
        console.print(f"{count} x {fault}", markup=False)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
