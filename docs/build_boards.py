"""Photograph the four boards for the README and the tour: a real JupyterLab, in a headless Chromium.

    pip install playwright        (and a Chromium: $CHROMIUM, else /usr/bin/chromium)
    python docs/build_boards.py [microscope what_if training frontier]

Minutes, most of them for `training` and `frontier`. `$SPEEDRL_BROWSER_SECONDS` (180) is how long one wait may take.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "browser"))
from workbench import Browser, Locator, Notebook, chromium, expect, serve, with_parameters  # noqa: E402

FOLDER = Path(__file__).resolve().parent / "boards"
COLORS = 192  # of a GIF
MOST = 700_000  # bytes of a picture
MARGIN = 12  # pixels around a board


class Studio(Notebook):
    """A notebook without a side bar, to be photographed."""

    def __init__(self, browser: Browser, address: str, name: str, width: int):
        super().__init__(browser, address, name, size=(width, 1600))
        self.page.keyboard.press("Control+b")

    def picture(self, box: Locator, height: int | None = None) -> Image.Image:
        """What an element shows, or the upper part of it, with a margin."""
        self.page.wait_for_timeout(1500)  # what the kernel sent last may not be drawn yet
        shown = Image.open(io.BytesIO(box.screenshot())).convert("RGB")
        shown = shown.crop((0, 0, shown.width, min(shown.height, height or shown.height)))
        return ImageOps.expand(shown, MARGIN, "white")


def microscope(browser: Browser, address: str, home: Path) -> None:
    """Play the film of notebook 01."""
    given = {"prompts": ["a rocket left of an apple on a white background"]}
    with_parameters(home / "notebooks", "01_watch_sampling", "microscope", given)
    book = Studio(browser, address, "microscope", 1010)
    book.run()
    box = book.page.locator(".widget-vbox:has(.widget-play)").first
    shown = [book.picture(box)]
    for step in range(1, 9):
        before = book.pictures(".widget-vbox")
        book.press(">")
        expect(book.page.locator(f"text=/^{step} of 8 steps/")).to_be_visible()
        book.changed(".widget-vbox", before)
        shown.append(book.picture(box))
    write_gif("microscope", shown, [1200, *[700] * 7, 3000])


def what_if(browser: Browser, address: str, home: Path) -> None:
    """Raise the speed weight in notebook 02, then drop samples of low quality."""
    given = {"preset": "emoji", "seed": 2}
    with_parameters(home / "notebooks", "02_rewards", "what_if", given)
    book = Studio(browser, address, "what_if", 1130)
    book.run()
    box = book.page.locator(".widget-vbox:has(.widget-hslider)").first
    shown = [book.picture(box, height=760)]
    for keys in (10, 10, 20):  # to 1, 1.5 and 2.5
        before = book.pictures(".widget-vbox")
        book.slide("speed weight", keys)
        book.changed(".widget-vbox", before)
        shown.append(book.picture(box, height=760))
    before = book.pictures(".widget-vbox")
    book.choose("low quality", "drop")
    book.changed(".widget-vbox", before)
    shown.append(book.picture(box, height=760))
    write_gif("what_if", shown, 2000)


def training(browser: Browser, address: str, home: Path) -> None:
    """Train with notebook 03, and change the speed weight in the middle."""
    given = {"preset": "emoji", "run": "training", "iterations": 40, "num_groups": 6, "group_size": 6,
             "warmup_iterations": 3, "speed_weight": 0.2}  # fmt: skip
    with_parameters(home / "notebooks", "03_speed_rl", "training", given)
    book = Studio(browser, address, "training", 1130)
    book.start()
    box = book.page.locator(".widget-vbox:has(.jupyter-button)").last
    shown = []
    for iteration in range(4, 40, 6):
        book.wait(lambda least=iteration: len(lines(home / "outputs" / "training")) >= least, f"iteration {iteration}")
        if iteration == 22:  # the first cell of training ends at 20
            book.press("Pause")
            book.button("Paused").wait_for()
            book.enter("speed", "3")
            expect(book.page.locator("text=/speed = 3 from the next iteration on/").last).to_be_visible()
            shown.append(book.picture(box))
            book.press("Go on")
        else:
            shown.append(book.picture(box))
    write_gif("training", shown, [1500] * (len(shown) - 1) + [4000])


def lines(folder: Path) -> list[str]:
    """Records of a run that are on disk."""
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def frontier(browser: Browser, address: str, home: Path) -> None:
    """Point at a point of notebook 05: a small measurement, for a picture and no more."""
    policies = [f"speed-rl={ROOT / 'data' / 'weights' / 'speed_rl.safetensors'}"]
    given = {"preset": "emoji", "run": "frontier", "policies": policies, "budgets": [1, 2, 4, 8],
             "num_prompts": 24, "num_seeds": 1, "search_prompts": 6}  # fmt: skip
    with_parameters(home / "notebooks", "05_frontier", "frontier", given)
    book = Studio(browser, address, "frontier", 1130)
    book.run()
    box = book.page.locator(".widget-vbox:has(.js-plotly-plot)").first
    point = book.page.locator(".widget-vbox .js-plotly-plot .scatterlayer .points path.point").first
    point.scroll_into_view_if_needed()
    place = point.bounding_box()
    book.page.mouse.move(place["x"] - 30, place["y"] - 30)
    book.page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2, steps=10)
    book.page.wait_for_timeout(3000)
    book.idle()
    write_png("frontier", book.picture(box))


def write_gif(name: str, shown: list[Image.Image], milliseconds: int | list[int]) -> None:
    """Write frames, all in the same colors, on a canvas of the largest."""
    size = max(frame.width for frame in shown), max(frame.height for frame in shown)
    frames = []
    for frame in shown:
        frames.append(Image.new("RGB", size, "white"))
        frames[-1].paste(frame)
    sheet = Image.new("RGB", (size[0], size[1] * len(frames)))
    for row, frame in enumerate(frames):
        sheet.paste(frame, (0, row * size[1]))
    colors = sheet.quantize(COLORS, Image.Quantize.MEDIANCUT)
    frames = [frame.quantize(palette=colors, dither=Image.Dither.NONE) for frame in frames]
    path = FOLDER / f"{name}.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, optimize=True)
    check(path)


def write_png(name: str, shown: Image.Image) -> None:
    """Write a picture in 256 colors."""
    path = FOLDER / f"{name}.png"
    shown.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    check(path)


def check(path: Path) -> None:
    """Say how large a picture is; AssertionError where it is too large for a page."""
    size = path.stat().st_size
    print(f"{path}: {Image.open(path).size[0]} x {Image.open(path).size[1]}, {size / 1e3:.0f} kB")
    assert size < MOST, f"{path} is larger than {MOST} bytes: fewer frames, or fewer colors"


BOARDS = {board.__name__: board for board in (microscope, what_if, training, frontier)}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for board in [BOARDS[name] for name in sys.argv[1:]] or BOARDS.values():
        # A server each: a kernel that goes on would take time and memory from the next.
        with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as address, chromium() as browser:
            board(browser, address, Path(folder))
