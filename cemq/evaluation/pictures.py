"""Arrays to pictures: one, one that moves, the data URI of either, and the sheet that a model card shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cemq.parallel import ALONE, Processes
from cemq.pipelines.outputs import Kind, as_bytes, kind_of

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDEST = 2048  # pixels of a spectrogram
_MOST_OF_WEBP = 16383  # pixels of a side
_LOSSLESS = 4e6  # pixels of a video, all frames together; larger ones are compressed
# Of a sheet, in pixels: a row of pictures is about so wide; what is smaller than tiny is enlarged.
_ROW, TINY, _GAP, _LINE, _MARGIN, _FONT = 800, 128, 6, 34, 16, 16
_PAPER, _INK, _FULL, _SKIPPED = "#ffffff", "#333333", "#4051b5", "#dfe2f2"
_FEW, _FEW_TINY = 2, 4  # samples of a sheet
_LIGHT = 200_000  # bytes of one as a file


def image_of(picture: np.ndarray, width: int | None = None) -> Image:
    """Of values from 0 to 1; made narrower, by means, where ``width`` says so."""
    from PIL import Image

    image = Image.fromarray(as_bytes(picture))
    return image if width in (None, image.width) else image.resize((width, image.height), Image.Resampling.BOX)


def still_of(pictures: np.ndarray, kind: Kind) -> Image:
    """One picture of an image (1, height, width, 3), or of audio's spectrograms, one channel below the other."""
    stacked = np.concatenate(list(pictures))
    return image_of(stacked, width=None if kind == "image" else min(stacked.shape[1], _WIDEST))


def embedded(picture: Image, kind: str = "WEBP", **options: Any) -> str:
    """A data URI; without loss unless ``options`` say otherwise."""
    file = io.BytesIO()
    if max(picture.size) > _MOST_OF_WEBP:
        kind = "PNG"
    picture.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}) | options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def moving(frames: np.ndarray, rate: float) -> tuple[str, str]:
    """Of a video (frames, height, width, 3) a data URI that moves, and that of its first frame."""
    first, *others = [image_of(frame) for frame in frames]
    few = frames[..., 0].size <= _LOSSLESS
    kept: dict[str, Any] = {"lossless": True} if few else {"lossless": False, "quality": 90}
    return (
        embedded(first, save_all=True, append_images=others, duration=round(1000 / rate), loop=0, **kept),
        embedded(first),
    )


# --- the sheet of a model card


def few_of(
    references: Sequence[np.ndarray], images: Sequence[np.ndarray], total: int, processes: Processes = ALONE
) -> tuple[np.ndarray, np.ndarray] | None:
    """The first few samples of both as small pictures, (n, height, width, 3), 0 to 255; None of audio.

    Of a video it is the frame in the middle.

    Args:
        references: Batches of samples, this process's share; `cemq.pipelines.outputs` knows their shapes.
        images: Others of the same seeds.
        total: Samples of all processes.

    Raises:
        ProcessError: Another process has failed.
    """
    most = _FEW_TINY if references and max(references[0].shape[-3:-1]) < TINY else _FEW
    size = _ROW // max(min(total, most), 2)
    found = []
    for pair in list(zip(references, images, strict=True))[:_FEW_TINY]:
        if kind_of(pair[0]) != "audio":
            found.append(tuple(np.stack([_small(sample, size) for sample in batch[:most]]) for batch in pair))
    gathered = processes.gather(found)
    if not gathered:
        return None
    first, second = (np.concatenate(batches)[:most] for batches in zip(*gathered, strict=True))
    return first, second


def _small(sample: np.ndarray, size: int) -> np.ndarray:
    """An image, or the frame in the middle of a video, whose longer side has at most ``size`` pixels."""
    from PIL import Image

    picture = sample if sample.ndim == 3 else sample[len(sample) // 2]
    if picture.shape[-1] != 3:  # depth, say: no picture is worth ending a build for
        picture = picture[..., :1].repeat(3, -1)
    image, longer = image_of(picture), max(picture.shape[:2])
    if longer > size:
        width, height = (max(1, round(side * size / longer)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image)


def sheet(panels: Sequence[tuple[str, np.ndarray]], marks: str = "") -> Image:
    """Rows of pictures with a line of text above each, and below them a schedule.

    Args:
        panels: Text and pictures (n, height, width, 3), 0 to 255, of each row; of one picture each they stand side by
            side. Tiny ones are enlarged without smoothing.
        marks: As `CacheSchedule.strip` has them; none are drawn of an empty text.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, beside = ImageFont.load_default(_FONT), len(panels[0][1]) == 1
    rows = [_in_a_row(pictures) for _, pictures in panels]
    told = "from noise to picture: dark steps are computed, light ones predicted"
    widths = [max(row.width, round(font.getlength(text))) for (text, _), row in zip(panels, rows, strict=True)]
    width = sum(widths) + _MARGIN * (len(widths) - 1) if beside else max(widths)
    width = max(width, round(font.getlength(told)) if marks else 0)
    height = rows[0].height + _LINE if beside else sum(row.height + _LINE for row in rows)
    page = Image.new("RGB", (width + 2 * _MARGIN, height + (2 * _LINE if marks else 0) + _MARGIN), _PAPER)
    pen, left, top = ImageDraw.Draw(page), _MARGIN, 0
    for (text, _), row, own in zip(panels, rows, widths, strict=True):
        pen.text((left, top + _LINE - 8), text, fill=_INK, font=font, anchor="ls")
        page.paste(row, (left, top + _LINE))
        left, top = (left + own + _MARGIN, top) if beside else (left, top + _LINE + row.height)
    if marks:
        pen.text((_MARGIN, height + _LINE - 8), told, fill=_INK, font=font, anchor="ls")
        _draw_strip(pen, marks, width, height + _LINE)
    return page


def _in_a_row(pictures: np.ndarray) -> Image:
    from PIL import Image

    cell = _ROW // max(len(pictures), 2)
    zoom = max(1, cell // max(pictures.shape[1:3]))
    large = pictures.repeat(zoom, 1).repeat(zoom, 2)
    apart = np.pad(large, ((0, 0), (0, 0), (0, _GAP), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(apart), axis=1)[:, :-_GAP])


def _draw_strip(pen: Any, marks: str, width: int, top: int) -> None:
    """A box for each step, of one with a single branch of guidance half a dark one."""
    edges = _MARGIN + np.linspace(0, width + 2, len(marks) + 1).round().astype(int)
    apart = min(3, width // len(marks) // 2)
    for mark, left, right in zip(marks, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        box = (left, top, max(left, right - apart), top + _LINE)
        pen.rectangle(box, fill=_FULL if mark == "█" else _SKIPPED)
        if mark == "▌":
            pen.rectangle((left, top + _LINE // 2, *box[2:]), fill=_FULL)


def light_webp(picture: Image) -> bytes:
    """A WebP of at most 200 kB: without loss if that is enough, and smaller if compressing it is not."""
    for options in ({"lossless": True}, *({"quality": quality} for quality in (90, 75, 50, 25, 5))):
        file = io.BytesIO()
        picture.save(file, "WEBP", **options)
        if file.tell() <= _LIGHT:
            return file.getvalue()
    return light_webp(picture.reduce(2))
