"""What the pages tell a reader to run."""

import re
from pathlib import Path

from PIL import Image

from cocoa.data_check import check_data
from cocoa.mmeb_eval import read_eval

DOCS = Path(__file__).parents[1] / "docs"


def test_ten_lines_write_a_data_set_of_ones_own(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(from pathlib.*?)```", (DOCS / "data.md").read_text(), re.S)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    (tmp_path / "mydata" / "photos").mkdir()
    for name in ("cat", "coffee"):
        Image.new("RGB", (60, 60)).save(tmp_path / "mydata" / "photos" / f"{name}.jpg")
    (report,) = check_data("mydata")
    assert (report.name, report.rows, report.images, report.bad, report.error) == ("Photos", 2, 2, [], "")
    (found,) = read_eval("mydata")
    sides = [found.inputs[i] for i in (found.queries[1], *found.candidates[1])]
    assert sides[0].prompt() == "Find the photo: a cup of coffee"
    assert [Path(side.image).name for side in sides[1:]] == ["coffee.jpg", "cat.jpg"]
