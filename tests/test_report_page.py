"""The report's page in a browser: as wide as the screen and no wider, on a phone and on a desk, without JavaScript."""

from dataclasses import replace

import pytest
from browsers import headless_browser
from test_report import full, runs, table  # noqa: F401  (a fixture)

from cocoa.pairs import Side
from cocoa.report import write_report
from cocoa.report_scores import Estimate, Published
from cocoa.scores import published

WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def browser():
    with headless_browser() as found:
        yield found


@pytest.fixture
def address(runs, tmp_path):  # noqa: F811
    """A page of every section, with what is hard to fit: five models, published numbers, words without a space."""
    long = "averylongnameofadatasetwithoutanyspace" * 4
    models = (long, "contrastive", "cocoa", "another-run-of-cocoa", "mini-qwen2-vl")
    estimates = [Estimate(25.0 * number, 20.0 * number, 25.0 * number) for number in range(5)]
    rows = [Published(row["model"], {key: row[key] for key in row if key != "model"}) for row in published()]
    whole = full(runs)
    scores = replace(
        table(models),
        groups={"VQA (2 of 10 sets)": estimates, "All": estimates},
        datasets={"VQA": {long: estimates}},
        gains={},
        published=rows,
    )
    mistakes = whole.mistakes["VQA"][0]
    spoken = replace(mistakes, found=replace(mistakes.found, query=Side(long, long), answer=mistakes.found.nearest[0]))
    looks = [
        replace(one, models={f"{long} {i}": maps for i, maps in enumerate(one.models.values())})
        for one in whole.attention
    ]
    report = replace(whole, title=long, scores=scores, notes=[long], attention=looks, mistakes={"VQA": [spoken]})
    write_report(tmp_path / "page.html", report)
    return (tmp_path / "page.html").as_uri()


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(browser, address, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(address)
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    outside = """() => [...document.querySelectorAll('main *')].filter(one => !one.closest('.scores, .wide-table')
        && one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.tagName + '.' + one.className)"""
    assert page.evaluate(outside) == []  # tables alone may scroll, in their own frames
    page.close()


@pytest.mark.slow
def test_everything_shows_without_javascript_and_without_the_network(browser, address):
    context = browser.new_context(java_script_enabled=False, viewport={"width": WIDTHS[0], "height": 800})
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    sections = page.locator("main > section")
    assert sections.count() == 9 and all(sections.nth(i).is_visible() for i in range(9))
    assert page.locator("img").count() > 10 and page.locator("script").count() == 0
    assert [url for url in asked if not url.startswith("data:")] == [address]
    context.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser, address, scheme):
    """Contrast of body text by WCAG's formula, at least 4.5 to 1 (AA)."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(address)
    light = """([name, property]) => {
        const parts = getComputedStyle(document.querySelector(name))[property].match(/[0-9.]+/g).slice(0, 3);
        const linear = parts.map(p => p / 255).map(p => p <= 0.03928 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    }"""
    behind = page.evaluate(light, [".card", "backgroundColor"])
    for name in (".card", ".small", ".scores .best", "figcaption"):
        text = page.evaluate(light, [name, "color"])
        assert (max(text, behind) + 0.05) / (min(text, behind) + 0.05) >= 4.5, name
    page.close()
