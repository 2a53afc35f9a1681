"""README's table: `python studies/demo_seeds.py runs/demo-*`, mean and range over the seeds of finished demos.

Each folder is the output of one `cocoa demo --seed N`; scenes and backbone are the same, all else is drawn anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from cocoa.demo import MODELS
from cocoa.errors import CocoaError


def main() -> None:
    """Print a Markdown table of hit@1 in percent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="outputs of cocoa demo")
    found = [json.loads((folder / "results.json").read_text()) for folder in parser.parse_args().folders]
    for key in ("backbone", "versions"):
        if any(run[key] != found[0][key] for run in found):
            raise CocoaError(f"results.json: {key} differs between the folders; compare seeds alone")
    if len({run["seed"] for run in found}) < len(found):
        raise CocoaError("results.json: two folders have the same seed; run cocoa demo with another --seed")
    groups = list(found[0]["models"]["cocoa"])
    print(f"| {found[0]['backbone']}, seeds {', '.join(str(run['seed']) for run in found)} | {' | '.join(groups)} |")
    print(f"|---|{'---|' * len(groups)}")
    for model, title in MODELS.items():
        cells = []
        for group in groups:
            values = [run["models"][model][group] for run in found]
            cells.append(f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})")
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
