"""Draws what a bundle found over its picture: Pillow and numpy, nothing of ours and no Keras."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito, "Color universal design", 2008 (https://jfly.uni-koeln.de/color/): told apart by colour-blind people.
# Black is left out, which is no colour on a dark picture. After seven classes come darker shades of the same.
_COLOURS = ((213, 94, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (204, 121, 167), (230, 159, 0))
_SHADES = (1, 0.6, 0.35)
_MASK_OPACITY = 0.5
_BACKGROUND = "background"  # a class of this name is what isn't any other: it stays as it is


def draw_boxes(image: Image.Image, outputs: dict, answer: dict, names: list) -> Image.Image:
    """Outlines on the outermost pixels of each box, and label and score above it; the likeliest are on top."""
    draw, font = ImageDraw.Draw(image), _font(image)
    last_x, last_y = image.width - 1, image.height - 1
    for row in reversed(answer["boxes"]):
        colour = colour_of(names.index(row["label"]))
        left, top = min(max(round(row["xmin"]), 0), last_x), min(max(round(row["ymin"]), 0), last_y)
        right, bottom = min(max(round(row["xmax"]) - 1, left), last_x), min(max(round(row["ymax"]) - 1, top), last_y)
        draw.rectangle([left, top, right, bottom], outline=colour, width=max(2, max(image.size) // 400))
        text = f"{row['label']} {row['score']:.2f}"
        width, height = (round(length) + 2 for length in font.getbbox(text)[2:])
        x, y = max(0, min(left, image.width - width)), top - height if top >= height else top
        draw.rectangle([x, y, x + width - 1, y + height - 1], fill=colour)
        draw.text([x + 1, y], text, fill="black" if _is_light(colour) else "white", font=font)
    return image


def draw_masks(image: Image.Image, outputs: dict, answer: dict, names: list) -> Image.Image:
    """The picture under each class' colour, and below it a strip that says which class has which."""
    class_map = outputs["class_map"]
    colours = np.array([colour_of(index) for index in range(len(names))], np.uint8)
    is_masked = np.array([name != _BACKGROUND for name in names])[class_map]
    blended = Image.blend(image, Image.fromarray(colours[class_map]), _MASK_OPACITY)
    masked = Image.composite(blended, image, Image.fromarray(is_masked.astype(np.uint8) * 255))
    strip = _legend(image, [(colour_of(i), names[i]) for i in np.unique(class_map) if names[i] != _BACKGROUND])
    drawn = Image.new("RGB", [image.width, image.height + strip.height])
    drawn.paste(masked, [0, 0])
    drawn.paste(strip, [0, image.height])
    return drawn


def _legend(image: Image.Image, entries: list[tuple]) -> Image.Image:
    """A white strip as wide as the picture, which cuts what is wider, with a square and a name for each class."""
    font = _font(image)
    line = round(font.size * 1.5)
    places, x, y = [], 0, 0
    for _, name in entries:
        width = round(line * 1.5 + font.getlength(name))
        if x and x + width > image.width:
            x, y = 0, y + line
        places.append((x, y))
        x += width
    strip = Image.new("RGB", [image.width, y + line if entries else 0], "white")
    draw = ImageDraw.Draw(strip)
    for (colour, name), (x, y) in zip(entries, places, strict=True):
        draw.rectangle([x + 3, y + 3, x + line - 4, y + line - 4], fill=colour)
        draw.text([x + line, y + line / 2], name, fill="black", font=font, anchor="lm")
    return strip


def as_rgb(picture: np.ndarray) -> Image.Image:
    """What the model sees: grey as colour, alpha over black."""
    num_channels = picture.shape[-1]
    if num_channels in (2, 4):
        picture = picture[..., :-1] * (picture[..., -1:] / 255)
    picture = np.broadcast_to(np.rint(picture).astype(np.uint8), [*picture.shape[:2], 3])
    return Image.fromarray(np.ascontiguousarray(picture))


def colour_of(index: int) -> tuple[int, int, int]:
    """Returns the colour, 0 to 255, of a class."""
    shade = _SHADES[index // len(_COLOURS) % len(_SHADES)]
    return tuple(round(part * shade) for part in _COLOURS[index % len(_COLOURS)])


def _is_light(colour: tuple[int, int, int]) -> bool:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128  # ITU-R BT.601 luma


def _font(image: Image.Image) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(12, max(image.size) // 60))
