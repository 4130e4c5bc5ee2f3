"""Render the sprite atlas of EmojiScenes from the three public icon sets.

Only needed to rebuild `atlas.png`; users of the project never run it.

    npm install @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6
    pip install resvg-py pillow
    python data/emoji_scenes/build_atlas.py node_modules/@iconify-json

The atlas has one row per drawing style and one column per object, 64 x 64 RGBA pixels each.
"""

import io
import json
import sys
from pathlib import Path

import resvg_py
from PIL import Image

STYLES = ["noto", "twemoji", "fluent-emoji-flat"]
ICONS = {
    "dog": "dog-face", "cat": "cat-face", "car": "automobile", "apple": "red-apple",
    "banana": "banana", "tree": "deciduous-tree", "star": "star", "heart": "red-heart",
    "house": "house", "fish": "tropical-fish", "ball": "soccer-ball", "flower": "sunflower",
    "pizza": "pizza", "book": "blue-book", "rocket": "rocket", "boat": "sailboat",
    "frog": "frog", "pig": "pig-face", "mushroom": "mushroom", "umbrella": "umbrella",
    "guitar": "guitar", "clock": "alarm-clock", "key": "key", "cake": "birthday-cake",
}  # fmt: skip
SIZE = 64


def render(body: str, box: int) -> Image.Image:
    """Rasterize one icon body on a transparent square of SIZE pixels."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {box} {box}">{body}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def main(icon_sets: Path) -> None:
    atlas = Image.new("RGBA", (SIZE * len(ICONS), SIZE * len(STYLES)))
    for row, style in enumerate(STYLES):
        icons = json.loads((icon_sets / style / "icons.json").read_text())
        for column, name in enumerate(ICONS.values()):
            box = icons["icons"][name].get("width", icons["width"])
            sprite = render(icons["icons"][name]["body"], box)
            atlas.paste(sprite, (column * SIZE, row * SIZE))
    target = Path(__file__).parent
    atlas.save(target / "atlas.png", optimize=True)
    (target / "atlas.json").write_text(
        json.dumps({"objects": list(ICONS), "styles": STYLES, "size": SIZE}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
