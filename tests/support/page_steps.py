"""What the tests of the page do again and again."""

import importlib.util
from pathlib import Path

import pytest

PATIENCE_MS, LOOK_MS = 60_000, 50  # patient, for other work may take most of the cores
PLAYED = "document.querySelector('video').currentTime"


def wait_for(page, condition: str) -> None:
    """Until `condition` (JavaScript) holds. Playwright's own waiting evaluates text in the page, which its policy forbids."""
    for _ in range(PATIENCE_MS // LOOK_MS):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(LOOK_MS)
    pytest.fail(f"never came true: {condition}; the page says: {page.get_by_role('status').inner_text()}")


def start(page, server, prompt="a fox in the snow", *, chunks=None) -> None:
    """Open the page, type a prompt, and press Start."""
    page.goto(server.url)
    page.locator("#connection[data-state=ready]").wait_for()
    page.get_by_label("Prompt", exact=True).fill(prompt)
    if chunks:
        page.get_by_label("Chunks", exact=True).fill(str(chunks))
    page.get_by_role("button", name="Start").click()


def accessibility_violations(page) -> list[str]:
    """What axe-core finds wrong with the page as it is now."""
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None or package.origin is None:
        pytest.skip("needs axe-core: pip install '.[test]'")
    page.evaluate((Path(package.origin).parent / "axe.min.js").read_text())
    found = page.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{rule['id']}: {node['html']} {node['failureSummary']}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


def overflow(page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
