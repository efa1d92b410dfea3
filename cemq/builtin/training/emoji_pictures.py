"""Emoji drawn so that their captions are true.

The pictures are Google's Noto Color Emoji (Apache-2.0), read from Debian's font; their names and keywords come from
Unicode's CLDR (Unicode licence). Both are fetched when training needs them, and neither ships. Size, place and colour
of every picture are chosen first and then said, so "a small red apple on the left" describes it by construction; what
is not said is as usual: of middle size, in the middle, in the emoji's own colour.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

IMAGE_SIZE = 64
FONT_PACKAGE, NAMES_PACKAGE = "fonts-noto-color-emoji", "cldr-annotations-full@48.2.0"
INSTALLED_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE, GLYPH_SIZE = 109, 136  # points, which select the font's bitmaps; pixels of a bitmap

# What each emoji is called besides its CLDR name, in words of that name and of its keywords.
PLAIN = {
    "😀": ("happy face",), "😂": (), "😍": (), "😎": ("cool face",), "😢": ("sad face",), "😡": ("angry face",),
    "🤖": (), "👻": (), "💀": (), "👽": (), "😺": ("grinning cat face", "cat"),
    "😻": (), "🐶": ("dog",), "🐰": ("rabbit", "bunny"), "🦊": ("fox face",), "🐻": ("bear face",),
    "🐼": ("panda face",), "🐨": (), "🐯": ("tiger",), "🦁": ("lion face",), "🐷": ("pig",), "🐸": ("frog face",),
    "🐵": ("monkey",), "🐧": (), "🐤": ("chick",), "🦉": (), "🐞": ("ladybug", "beetle"), "🐢": (), "🐙": (),
    "🦀": (), "🐳": ("whale",), "🍌": (), "🍉": (), "🍓": (), "🍕": ("pizza slice",), "🍔": ("burger",),
    "🍩": ("donut",), "🎂": ("cake",), "🍦": ("ice cream",), "🌻": (), "🌵": (), "🌲": ("tree",), "🍄": (),
    "🌞": ("sun",), "🌙": ("moon",), "🌈": (), "🔥": ("flame",), "🏠": ("home",), "⛵": ("boat",), "🚀": (),
    "⚽": ("football", "soccer ball"), "🏀": (), "👑": (), "🔔": (), "💡": ("bulb",), "🎃": ("pumpkin",),
    "⛄": ("snowman",),
}  # fmt: skip

# CLDR knows a flag by its country; a picture shows what is on it.
FLAGS = {"🇸🇴": ("flag with a star",), "🇯🇵": ("flag with a circle",), "🇨🇭": ("flag with a cross",)}

# The same of emoji that are drawn in any colour: their own, the hues in degrees that are changed to another, and what
# they are called without their colour.
COLOURED = {
    "❤": ("red", (330, 40), ("heart",)), "🍎": ("red", (330, 40), ("apple",)), "🚗": ("red", (330, 30), ("car",)),
    "🎈": ("red", (320, 40), ("balloon",)), "🌹": ("red", (320, 30), ("rose",)), "📕": ("red", (320, 40), ("book",)),
    "🚩": ("red", (320, 40), ("flag",)), "👕": ("blue", (150, 270), ("t-shirt", "shirt")),
    "👗": ("blue", (150, 270), ("dress",)), "🧢": ("blue", (150, 270), ("cap",)),
    "🐦": ("blue", (150, 270), ("bird",)), "☂": ("purple", (200, 300), ("umbrella",)),
    "👾": ("purple", (220, 330), ("alien monster",)), "⭐": ("yellow", (10, 80), ("star",)),
}  # fmt: skip
EMOJI = (*PLAIN, *FLAGS, *COLOURED)
CATEGORIES = ("animal", "fruit", "food", "clothing", "flower")  # keywords that several emoji share

# Hue in degrees, and by what the value (of HSV) is multiplied, so that each looks like its name.
COLOURS = {
    "red": (2, 0.95), "orange": (27, 1.0), "yellow": (50, 1.05), "green": (125, 0.75), "blue": (215, 0.97),
    "purple": (276, 0.85),
}  # fmt: skip
SIZES = {"small": 32, "": 48, "large": 60}  # longer side, pixels
SIDES = {"on the left": -1, "": 0, "on the right": 1}
LAYOUTS = tuple((size, side) for size in SIZES for side in SIDES if size != "large" or not side)
SHIFTS = {"small": 16, "": 8, "large": 0}  # pixels from the middle; whole tokens of the model
ROTATION_DEGREES, SCALING, JITTER = 5.0, 0.03, 1.5  # at most, either way; a share; pixels
PEN_SOFTNESS = 0.45  # pixels: an edge of one pixel would make PSNR a measure of where it falls
CATEGORY_SHARE = 0.05
CAPITAL_SHARE = 0.06  # of captions that begin with a capital letter, and of those that end with a full stop
PAPER_LEVEL = 0.12  # darker than white by this is part of what is drawn
_FINE = 2  # pictures are put together at this many times their size


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What is on a picture: index into EMOJI, a word of COLOURS or none, of SIZES, of SIDES."""

    emoji: int
    colour: str
    size: str
    side: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Font and names, as fetched."""

    font: Path
    names: Path


def fetch(folder: Path) -> Source:
    """Font and CLDR names, downloaded into a folder where they are not there: by apt-get, and by npm."""
    folder.mkdir(parents=True, exist_ok=True)
    names, font = folder / "package" / "annotations" / "en" / "annotations.json", INSTALLED_FONT
    if not names.exists():
        packed = subprocess.run(
            ["npm", "pack", NAMES_PACKAGE], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        subprocess.run(["tar", "xzf", packed, str(names.relative_to(folder))], cwd=folder, check=True)
    if not font.exists():
        font = folder / str(INSTALLED_FONT).lstrip("/")
    if not font.exists():
        subprocess.run(["apt-get", "download", FONT_PACKAGE], cwd=folder, check=True)
        (package,) = folder.glob(f"{FONT_PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
    return Source(font=font, names=names)


def read_names(path: Path) -> tuple[tuple[tuple[str, ...], ...], tuple[frozenset[str], ...]]:
    """What each of EMOJI is called, and its keywords.

    Raises:
        ValueError: A name of this file's tables has a word that CLDR does not know the emoji by.
    """
    found = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
    names, keywords = [], []
    for emoji in EMOJI:
        if emoji in FLAGS:
            names.append(FLAGS[emoji])
            keywords.append(frozenset({"flag"}))
            continue
        name, words = found[emoji]["tts"][0], {word.lower() for word in found[emoji]["default"]}
        own, _, said = COLOURED[emoji] if emoji in COLOURED else ("", (), PLAIN[emoji])
        unknown = {word for phrase in said for word in phrase.split()} - words - set(name.split())
        if unknown:
            raise ValueError(f"{emoji}: CLDR does not say {', '.join(sorted(unknown))}")
        plain = name.removeprefix(f"{own} ") if own else name
        names.append(tuple(dict.fromkeys((plain, *said))))
        keywords.append(frozenset(words))
    return tuple(names), tuple(keywords)


def glyphs(font: Path) -> list[Image.Image]:
    """Every emoji cut out of its surroundings, RGBA."""
    pen = ImageFont.truetype(str(font), FONT_SIZE)
    cut = []
    for emoji in EMOJI:
        page = Image.new("RGBA", (GLYPH_SIZE + 8, GLYPH_SIZE + 8), (255, 255, 255, 0))
        ImageDraw.Draw(page).text((0, 0), emoji, font=pen, embedded_color=True, anchor="lt")
        cut.append(page.crop(page.getchannel("A").point(lambda alpha: 255 * (alpha > 20)).getbbox()))
    return cut


def recoloured(glyph: Image.Image, hues: tuple[int, int], colour: str) -> Image.Image:
    """The glyph with every strong hue within ``hues``, in degrees, moved to the colour's; shades stay apart by half."""
    target, brightness = COLOURS[colour]
    hue, saturation, value = (np.asarray(part, np.float64) for part in glyph.convert("RGB").convert("HSV").split())
    degrees, (low, high) = hue * 360 / 256, hues
    offset = (degrees - low) % 360
    changed = (offset < (high - low) % 360) & (saturation > 40)
    if not changed.any():
        return glyph
    weight = np.where(changed, saturation * (np.asarray(glyph.getchannel("A")) > 128), 0)
    middle = (offset * weight).sum() / weight.sum()
    moved = (target + (offset - middle) / 2) % 360
    shown = weight > 0
    stronger = max(1.0, 190 / saturation[shown].mean())  # in pale ones all colours would look alike
    lighter = brightness * max(1.0, 225 / value[shown].mean())
    parts = (
        np.where(changed, moved * 256 / 360, hue),
        np.where(changed, saturation * stronger, saturation),
        np.where(changed, value * lighter, value),
    )
    channels = [Image.fromarray(np.clip(part, 0, 255).astype(np.uint8)) for part in parts]
    painted = Image.merge("HSV", channels).convert("RGB")
    painted.putalpha(glyph.getchannel("A"))
    return painted


class Studio:
    """Draws emoji, and says what it drew."""

    def __init__(self, source: Source):
        self.names: tuple[tuple[str, ...], ...]
        self.keywords: tuple[frozenset[str], ...]
        self.names, self.keywords = read_names(source.names)
        self.glyphs: dict[tuple[int, str], Image.Image] = {}
        for number, (emoji, glyph) in enumerate(zip(EMOJI, glyphs(source.font), strict=True)):
            if emoji in COLOURED:
                own, hues, _ = COLOURED[emoji]
                self.glyphs |= {(number, colour): recoloured(glyph, hues, colour) for colour in COLOURS}
                self.glyphs[number, ""] = self.glyphs[number, own]
            else:
                self.glyphs[number, ""] = glyph

    def words(self) -> list[str]:
        """Every word of the captions."""
        said = {word for names in self.names for name in names for word in name.lower().split()}
        said |= {"a", "an", *COLOURS, *SIZES, *CATEGORIES} | {word for side in SIDES for word in side.split()}
        return sorted(said - {""})

    def choose(self, count: int, seed: int) -> list[Drawn]:
        """What to draw: every emoji in every layout equally often; the coloured ones three times as often, as they are
        many."""
        rng = np.random.default_rng(seed)
        rounds = [
            (number, colour, *layout)
            for number, emoji in enumerate(EMOJI)
            for colour in (rng.permutation(list(COLOURS))[:3] if emoji in COLOURED else [""])
            for layout in LAYOUTS
        ]
        chosen = []
        while len(chosen) < count:
            for place in rng.permutation(len(rounds)):
                number, colour, size, side = rounds[place]
                if colour:  # another each time
                    colour = str(rng.choice(list(COLOURS)))
                chosen.append(Drawn(emoji=number, colour=colour, size=size, side=side))
        return chosen[:count]

    def draw(self, drawn: Drawn, rng: np.random.Generator) -> np.ndarray:
        """One picture on white, shape (64, 64, 3), uint8."""
        glyph = self.glyphs[drawn.emoji, drawn.colour]
        longer = SIZES[drawn.size] * (1 + rng.uniform(-SCALING, SCALING)) * _FINE
        factor = longer / max(glyph.size)
        size = tuple(max(round(side * factor), 1) for side in glyph.size)
        white = Image.new("RGBA", size, (255, 255, 255, 0))
        glyph = Image.alpha_composite(white, glyph.resize(size, Image.Resampling.LANCZOS))
        angle = rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES)
        glyph = glyph.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        middle = (IMAGE_SIZE / 2 + SHIFTS[drawn.size] * SIDES[drawn.side], IMAGE_SIZE / 2)
        corner = [
            round((where + rng.uniform(-JITTER, JITTER)) * _FINE - side / 2)
            for where, side in zip(middle, glyph.size, strict=True)
        ]
        page = Image.new("RGB", (IMAGE_SIZE * _FINE,) * 2, "white")
        page.paste(glyph, tuple(corner), glyph)
        return np.asarray(page.filter(ImageFilter.GaussianBlur(PEN_SOFTNESS * _FINE)).reduce(_FINE))

    def pictures(self, what: Sequence[Drawn], seed: int) -> np.ndarray:
        """A picture of each, shape (n, 3, 64, 64), uint8."""
        rng = np.random.default_rng(seed)
        return np.stack([self.draw(each, rng) for each in what]).transpose(0, 3, 1, 2)

    def describe(self, drawn: Drawn, rng: np.random.Generator, *, article: bool = True) -> str:
        """A prompt that says all there is to say, by one of the emoji's names."""
        names = self.names[drawn.emoji]
        name = names[0] if rng.random() < 0.5 else names[rng.integers(len(names))]
        return phrase(drawn.size, drawn.colour, name, drawn.side, article=article)

    def caption(self, drawn: Drawn, rng: np.random.Generator) -> str:
        """A prompt that is true of the picture and does not always say all: the emoji's own colour may be left out, and
        now and then only the kind of thing is named."""
        emoji = EMOJI[drawn.emoji]
        if emoji in COLOURED and COLOURED[emoji][0] == drawn.colour and rng.random() < 0.4:
            drawn = replace(drawn, colour="")
        article = bool(rng.random() < 0.8)
        text = self.describe(drawn, rng, article=article)
        kinds = [kind for kind in CATEGORIES if kind in self.keywords[drawn.emoji]]
        if kinds and rng.random() < CATEGORY_SHARE:
            text = phrase(drawn.size, drawn.colour, str(rng.choice(kinds)), drawn.side, article=article)
        text = text[0].upper() + text[1:] if rng.random() < CAPITAL_SHARE else text
        return f"{text}." if rng.random() < CAPITAL_SHARE else text


def phrase(size: str, colour: str, name: str, side: str, *, article: bool = True) -> str:
    """As in "a small red apple on the left"."""
    text = " ".join(word for word in (size, colour, name.lower(), side) if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}" if article else text


def measured_box(picture: np.ndarray) -> tuple[float, float]:
    """Longer side of what is drawn on white, and where its middle is from left to right, in pixels; picture (64, 64, 3)
    in [0, 1]."""
    rows, columns = np.nonzero((1 - picture).max(-1) > PAPER_LEVEL)
    if rows.size == 0:
        return 0.0, IMAGE_SIZE / 2
    sides = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    return float(max(sides)), float(columns.max() + columns.min() + 1) / 2


def measured_colour(picture: np.ndarray) -> str:
    """The word of COLOURS whose hue is nearest to the mean hue of the strongly coloured pixels, within 60 degrees of
    the hue that most of them have (a leaf is not what is coloured); picture (64, 64, 3) in [0, 1]."""
    largest, least = picture.max(-1), picture.min(-1)
    strength = largest - least
    weight = np.where(strength > 0.25, strength, 0.0)
    if weight.sum() == 0:
        return ""
    red, green, blue = np.moveaxis(picture, -1, 0)
    turned = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)  # hue in radians
    counts, edges = np.histogram(turned, 36, (-np.pi, np.pi), weights=weight)
    around = np.roll(counts, 1) + counts + np.roll(counts, -1)
    most = edges[around.argmax()] + np.pi / 36
    near = np.cos(turned - most) > 0.5
    direction = np.angle((weight * np.exp(1j * turned))[near].sum())
    away = {word: np.cos(direction - np.deg2rad(hue)) for word, (hue, _) in COLOURS.items()}
    return max(away, key=away.__getitem__)
