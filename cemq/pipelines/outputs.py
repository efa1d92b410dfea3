"""What pipelines make: images, videos and audio. As arrays to compare, and as files to look at or listen to.

Arrays tell what they hold by their dimensions: images (n, height, width, 3) and videos (n, frames, height, width, 3) in
[0, 1], audio (n, channels, samples) in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from cemq.errors import InputError, ModelError
from cemq.families import DEFAULT_FRAME_RATE, FRAME_RATES
from cemq.files import check_writable, written_whole

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Kind = Literal["image", "video", "audio"]
_FIELDS: dict[str, Kind] = {"images": "image", "frames": "video", "audios": "audio"}
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp"),
    "video": (".mp4", ".gif", ".webp", ".png"),
    "audio": (".wav",),
}
_SPECTRUM_BINS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One finished sample: an image (height, width, 3), a video (frames, height, width, 3), audio (channels, samples).

    ``rate`` is frames or audio samples a second, 0 for images.
    """

    kind: Kind
    values: np.ndarray
    rate: float = 0.0

    def to_pil(self) -> Any:
        """A PIL image, or a list of them for a video."""
        from PIL import Image

        frames = [Image.fromarray(frame) for frame in as_bytes(self.values.reshape(-1, *self.values.shape[-3:]))]
        return frames if self.kind == "video" else frames[0]

    def save(self, path: Path) -> None:
        """Write a file of the format that its suffix names; `check_path` says beforehand what is possible.

        Raises:
            InputError: This kind of sample cannot be written so, or nothing can be written there.
        """
        check_path(path, self.kind)
        with written_whole(path) as partial:
            self._write(partial)

    def _write(self, path: Path) -> None:
        if self.kind == "audio":
            _write_wave(path, self.values, round(self.rate))
        elif self.kind == "image":
            self.to_pil().save(path)
        elif path.suffix.lower() == ".mp4":
            import imageio

            imageio.mimwrite(path, list(as_bytes(self.values)), fps=self.rate, macro_block_size=1)
        else:
            first, *others = self.to_pil()
            first.save(path, save_all=True, append_images=others, duration=round(1000 / self.rate), loop=0)


def output_kind(pipe: DiffusionPipeline) -> Kind:
    """What a pipeline makes, told by the output class that its module names.

    Raises:
        InputError: Neither images nor frames nor audio.
    """
    from diffusers.utils import BaseOutput

    for kind in type(pipe).__mro__:
        for value in vars(sys.modules[kind.__module__]).values():
            if isinstance(value, type) and issubclass(value, BaseOutput) and dataclasses.is_dataclass(value):
                for field in dataclasses.fields(value):
                    if field.name in _FIELDS:
                        return _FIELDS[field.name]
    raise InputError(f"{type(pipe).__name__} makes neither images nor frames nor audio: cemq cannot compare its output")


def check_path(path: Path, kind: Kind | None = None) -> None:
    """Raises InputError unless a sample can be written there; a None stands for any kind of sample."""
    suffix = path.suffix.lower()
    known = SUFFIXES[kind] if kind else tuple(dict.fromkeys(s for suffixes in SUFFIXES.values() for s in suffixes))
    if suffix not in known:
        found = f"{'an' if kind != 'video' else 'a'} {kind}" if kind else "a sample"
        raise InputError(f"output '{path}': {found} is written to a file that ends in {', '.join(known)}")
    check_writable(path)
    if suffix == ".mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
        raise InputError(f"output '{path}': mp4 needs a package, 'pip install imageio imageio-ffmpeg'; or take .gif")


def first_tensor(answer: Any) -> torch.Tensor:
    """The first tensor in what a denoiser answers: some answer with a tuple, others with a dataclass."""
    while not isinstance(answer, torch.Tensor):
        answer = next(iter(answer.values() if isinstance(answer, dict) else answer))
    return answer


def channel_axis(dimensions: int) -> int:
    """Where the channels of a latent are: last in packed tokens (batch, tokens, channels), else second."""
    return 2 if dimensions == 3 else 1


def shared_channels(output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both without the channels that the other lacks: those of a predicted variance, or of a picture as condition.

    Raises:
        ModelError: They differ in more than channels.
    """
    if output.dim() == sample.dim():
        axis = channel_axis(output.dim())
        both = min(output.shape[axis], sample.shape[axis])
        narrowed = output.narrow(axis, 0, both), sample.narrow(axis, 0, both)
        if narrowed[0].shape == narrowed[1].shape:
            return narrowed
    raise ModelError(
        f"the denoiser's output {tuple(output.shape)} and its sample {tuple(sample.shape)} differ in more than channels"
    )


def as_array(output: Any) -> np.ndarray:
    """What a pipeline called with ``output_type="np"`` made, as one float array; see above for the shapes."""
    if isinstance(output, (list, tuple)):
        output = np.stack([as_array(one) for one in output])
    if torch.is_tensor(output):
        output = output.detach().float().cpu().numpy()
    values = np.asarray(output, dtype=np.float32)
    return values[:, None] if values.ndim == 2 else values  # audio of one channel may come without its dimension


def kind_of(values: np.ndarray) -> Kind:
    """What an array of `as_array` holds."""
    kinds: dict[int, Kind] = {3: "audio", 4: "image", 5: "video"}
    return kinds[values.ndim]


def rate_of(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> float:
    """Frames or audio samples a second of what ``pipe`` makes; 0 for images."""
    kind = output_kind(pipe)
    if kind == "video":
        known = FRAME_RATES.get(type(pipe).__name__, DEFAULT_FRAME_RATE)
        return float(call.get("frame_rate") or known)
    if kind == "audio":
        for part in (getattr(pipe, "vocoder", None), getattr(pipe, "vae", None)):
            if rate := getattr(getattr(part, "config", None), "sampling_rate", None):
                return float(rate)
        raise InputError(f"{type(pipe).__name__} does not say how many audio samples a second it makes")
    return 0.0


def as_pictures(values: np.ndarray) -> np.ndarray:
    """Pictures of samples, (n, pictures, height, width, 3) in [0, 1]: frames of videos, spectrograms of audio."""
    if values.ndim == 3:
        return _spectrograms(values)
    return values if values.ndim == 5 else values[:, None]


def as_levels(values: np.ndarray) -> np.ndarray:
    """The same values on a scale from 0 to 1, as PSNR wants them."""
    return (values + 1) / 2 if values.ndim == 3 else values


def _spectrograms(audio: np.ndarray) -> np.ndarray:
    """Logarithmic magnitudes, one picture a channel: 0 is 80 dB below full scale, 1 is full scale."""
    samples, channels, length = audio.shape
    window = min(2 * (_SPECTRUM_BINS - 1), max(4, length // 4 * 2))
    flat = torch.from_numpy(np.ascontiguousarray(audio)).reshape(-1, length)
    spectrum = torch.stft(
        flat, window, hop_length=max(1, window // 4), pad_mode="constant", return_complex=True,
        window=torch.hann_window(window, dtype=torch.float32, device="cpu"),
    ).abs() / (window / 4)  # fmt: skip
    levels = (1 + 20 * torch.log10(spectrum.clamp_min(1e-4)) / 80).clamp(0, 1).flip(1)
    return levels[..., None].expand(-1, -1, -1, 3).reshape(samples, channels, *levels.shape[1:], 3).numpy()


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as 0 to 255; what lies outside or is no number is brought in."""
    return (np.clip(np.nan_to_num(values), 0, 1) * 255).round().astype(np.uint8)


def _write_wave(path: Path, values: np.ndarray, rate: int) -> None:
    """16-bit PCM, from the standard library."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(values))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(values, -1, 1).T * 32767).round().astype("<i2").tobytes())
