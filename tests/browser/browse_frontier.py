"""The frontier explorer in a real JupyterLab; how to run these: browse_notebooks.py beside this file."""

import re

import pytest
from browse_notebooks import browser, lab, opened, playwright  # noqa: F401  (fixtures)

EXPLORER = ".widget-vbox:has(.js-plotly-plot)"
SHOWN = f"{EXPLORER} .jupyter-widgets.widget-html img[src^='data:image/png']"


@pytest.fixture
def book(opened):  # noqa: F811
    """05_frontier, all cells run, scrolled to the explorer."""
    found = opened("05_frontier")
    found.page.locator(f"{EXPLORER} .js-plotly-plot").first.scroll_into_view_if_needed()
    playwright.expect(found.page.locator(SHOWN).first).to_be_visible()
    return found


def sources(book) -> list[str]:
    return book.page.locator(SHOWN).evaluate_all("images => images.map(image => image.src)")


def wait_for_others(book, before: list[str]) -> list[str]:
    book.page.wait_for_function(
        "([where, old]) => JSON.stringify([...document.querySelectorAll(where)].map(i => i.src)) != old",
        arg=[SHOWN, book.page.evaluate("JSON.stringify", before)],
    )
    return sources(book)


def test_choices_change_figure_table_and_samples(book):
    axis = book.page.locator(f"{EXPLORER} .js-plotly-plot .ytitle")
    playwright.expect(axis).to_contain_text("exact object counts")
    book.choose("judge", "PSNR to the nearest valid scene (dB)")
    playwright.expect(axis).to_contain_text("PSNR")
    book.choose("cost", "seconds per image, with decoding")
    playwright.expect(book.page.locator(f"{EXPLORER} .js-plotly-plot .xtitle")).to_contain_text("with decoding")
    playwright.expect(book.page.locator(f"{EXPLORER} .equal b")).to_contain_text("with decoding at equal psnr")
    before = sources(book)
    book.choose("samples", "best")
    wait_for_others(book, before)
    book.shot("chosen")


def test_a_click_pins_a_point(book):
    before = sources(book)
    points = book.page.locator(f"{EXPLORER} .js-plotly-plot .scatterlayer .trace .points path.point")
    place = points.first.bounding_box()
    middle = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    book.page.mouse.move(middle[0] - 3, middle[1] - 3)
    book.page.mouse.move(*middle)
    after = wait_for_others(book, before)
    book.page.mouse.click(*middle)
    pinned = book.page.locator('button.jupyter-widgets:text-is("pinned")')
    playwright.expect(pinned).to_have_class(re.compile("mod-active"))
    assert sources(book) == after
    book.shot("pinned")


def test_export_writes_a_file(book, lab):  # noqa: F811
    for kind in ("png", "svg", "html"):
        book.choose("export as", kind)
        book.press("Export")
        playwright.expect(book.page.locator(f"text=/wrote .*frontier-accuracy-forwards.{kind}/")).to_be_visible()
    assert len(list((lab[1] / "outputs" / "05_frontier").glob("*/frontier-accuracy-forwards.*"))) == 3
