"""Readers survive what nobody would write; `benchmarks/fuzz.py` tries thousands, in processes of their own."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import fuzz_images
import fuzz_recipes
import fuzz_tables
import pytest
from fuzzing import Kind, survives
from hypothesis import HealthCheck, Phase, given, settings

KINDS = {**fuzz_images.KINDS, **fuzz_tables.KINDS, **fuzz_recipes.KINDS}


def tried(kind: Kind, inputs: int) -> set[str]:
    """What became of so many inputs, the same ones every time."""
    outcomes = set()

    @settings(
        max_examples=inputs,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.cases)
    def run(case):
        with TemporaryDirectory() as folder:
            outcomes.add(survives(kind, case, Path(folder)))

    run()
    return outcomes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_inputs_of_every_kind_are_read_or_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried(KINDS[kind], 40)
    assert os.listdir(tmp_path) == [], "nothing is written, no tag executed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_inputs_of_every_kind_are_read_or_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tried(KINDS[kind], 300) == {"accepted", "refused"}


@pytest.mark.parametrize("files", [fuzz_images.images, fuzz_images.archives, fuzz_tables.tables, fuzz_tables.texts])
def test_the_files_that_are_mutated_are_read(files, tmp_path):
    kinds = {
        fuzz_images.images: "images",
        fuzz_images.archives: "archives",
        fuzz_tables.tables: "parquet, bytes",
        fuzz_tables.texts: "JSON and CSV",
    }
    read = KINDS[kinds[files]]
    refused = set()
    for number, (name, content) in enumerate(files().items()):
        (tmp_path / str(number)).mkdir()
        if survives(read, (name, content), tmp_path / str(number)) == "refused":
            refused.add(name.split("-")[0])
    expected = {fuzz_images.images: OTHER_FORMATS, fuzz_images.archives: {"bzip2", "lzma"}}
    assert refused <= expected.get(files, set())


OTHER_FORMATS = {"DIB", "TGA", "PCX", "IM", "SGI", "ICO", "DDS", "QOI", "EPS", "ICNS", "XBM", "MSP", "SPIDER"}
