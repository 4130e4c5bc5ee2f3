"""The frontier explorer in a real JupyterLab; how to run these: browse_notebooks.py beside this file."""

import re
from pathlib import Path

import pytest

pytest_plugins = ["browser_fixtures"]
playwright = pytest.importorskip("playwright.sync_api")

EXPLORER = ".widget-vbox:has(.js-plotly-plot)"
SHOWN = f"{EXPLORER} .jupyter-widgets.widget-html img[src^='data:image/png']"


def sources(book) -> list[str]:
    return book.page.locator(SHOWN).evaluate_all("images => images.map(image => image.src)")


def wait_for_others(book, before: list[str]) -> list[str]:
    book.page.wait_for_function(
        "([where, old]) => JSON.stringify([...document.querySelectorAll(where)].map(i => i.src)) != old",
        arg=[SHOWN, book.page.evaluate("JSON.stringify", before)],
    )
    return sources(book)


def test_frontier_explorer(opened, lab):
    """Choices change figure, table and samples; the mouse shows a point, a click pins it; exports are files."""
    book = opened("05_frontier")
    book.run()
    book.page.locator(f"{EXPLORER} .js-plotly-plot").first.scroll_into_view_if_needed()
    playwright.expect(book.page.locator(SHOWN).first).to_be_visible()
    book.shot("explorer")
    choices(book)
    pinning(book)
    exports(book, lab[1] / "outputs" / "05_frontier")


def choices(book) -> None:
    axis = book.page.locator(f"{EXPLORER} .js-plotly-plot .ytitle")
    playwright.expect(axis).to_contain_text("exact object counts")
    before = sources(book)
    book.choose("samples", "best")
    wait_for_others(book, before)
    book.choose("judge", "PSNR to the nearest valid scene (dB)")
    playwright.expect(axis).to_contain_text("PSNR")
    book.choose("cost", "seconds per image, with decoding")
    playwright.expect(book.page.locator(f"{EXPLORER} .js-plotly-plot .xtitle")).to_contain_text("with decoding")
    playwright.expect(book.page.locator(f"{EXPLORER} .equal b")).to_contain_text("with decoding at equal PSNR")
    book.shot("chosen")


def pinning(book) -> None:
    before = sources(book)
    place = book.page.locator(f"{EXPLORER} .js-plotly-plot .scatterlayer .points path.point").first.bounding_box()
    middle = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    book.page.mouse.move(middle[0] - 40, middle[1] - 40)
    book.page.mouse.move(*middle, steps=10)
    after = wait_for_others(book, before)
    book.page.mouse.click(*middle)
    pinned = book.page.locator('button.jupyter-widgets:text-is("pinned")')
    playwright.expect(pinned).to_have_class(re.compile("mod-active"))
    assert sources(book) == after
    book.shot("pinned")


def exports(book, folder: Path) -> None:
    for kind in ("png", "svg", "html"):
        book.choose("export as", kind)
        book.press("Export")
        playwright.expect(book.page.locator(f"text=/wrote .*frontier-psnr-seconds_total.{kind}/")).to_be_visible()
    assert len(list(folder.glob("*/frontier-psnr-seconds_total.*"))) == 3
