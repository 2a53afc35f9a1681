"""A headless browser for the tests that look at pages; where there is none they are skipped."""

import shutil
from contextlib import contextmanager

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu")
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
"""A browser's own requests would be refused, many at a time, where there is no network."""


@contextmanager
def headless_browser():
    """Playwright's browser, closed in the end."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=[*FLAGS, *QUIET])
        yield found
        found.close()
