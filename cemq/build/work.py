"""What a build has finished by now, kept beside its output: the same build goes on from there, whatever ended it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from cemq import __version__
from cemq.build import stored
from cemq.build.references import PIPELINE, RUN, agree, library_versions
from cemq.build.settings import BuildSettings
from cemq.bundle.staging import Place, claimed
from cemq.errors import BundleError, ProcessError
from cemq.files import flush, kept_whole, sha256
from cemq.memory.placement import format_bytes
from cemq.parallel import ALONE, Processes
from cemq.pipelines.batches import BUILD_LOG
from cemq.recipe import find_calibration
from cemq.runtime.runner import Generations

_ASKED = "asked.json"
_JOURNAL = "schedules-"
_DONE = {PIPELINE: "quantized", "prior": "profiled", "plans": "planned", "check": "checked"}

Result = TypeVar("Result")


class Work:
    """Results of the stages of a build: each is computed unless it was kept.

    What a result took is kept with it, so that ``generations`` count the whole build, and nothing that was broken off.

    Args:
        folder: Where they are kept; all processes see it. None where nothing is.
        processes: Those that work on the build.
        place: Where the bundle is to be; None in all processes but the main one.
        keeps: Whether anything is; if not, the folder is but there to write the bundle in.
    """

    def __init__(
        self, folder: Path | None, processes: Processes = ALONE, place: Place | None = None, *, keeps: bool = True
    ):
        self._folder = folder
        self.processes: Processes = processes
        self.generations: Generations = Generations()
        self._place, self._keeps = place, keeps
        self._whole: dict[str, bool] = {}  # folders, by name
        self._lost: set[str] = set()  # what was said of results that cannot be kept

    @property
    def folder(self) -> Path:
        """Where results are kept."""
        assert self._folder is not None
        return self._folder

    def keep(self, name: str, make: Callable[[], Result]) -> Result:
        """What a stage gives, in which all processes take part: run by all of them unless every one can read it."""
        found = self._read(name)
        if not all(self.processes.gather([found is not None])):
            value, counts = self._counted(make)
            found = value, self.processes.gather([counts])
            if self.processes.is_main:
                self._write(name, found)
        value, counts = found
        self._count(counts[self.processes.rank])
        return value

    def kept(self, name: str) -> Any:
        """What this process alone has kept; None if there is nothing, or not all of it."""
        found = self._read(name)
        if found is None:
            return None
        value, counts = found
        self._count(counts)
        return value

    def keep_own(self, name: str, make: Callable[[], Result]) -> Result:
        """What this process alone makes, to be `kept`."""
        value, counts = self._counted(make)
        self._write(name, (value, counts))
        self._count(counts)
        return value

    def keep_folder(self, name: str, write: Callable[[Path], None]) -> tuple[Path, dict[str, str]]:
        """A folder that ``write`` fills in the main process, while the others take part in what it takes; and there the
        checksums of its files as they were written."""
        folder, partial = self.folder / name, self.folder / f".{name}"

        def make() -> dict[str, str]:
            if self.processes.is_main:
                for old in (folder, partial):
                    shutil.rmtree(old, ignore_errors=True)
                partial.mkdir()
            write(partial)
            if not self.processes.is_main:
                return {}
            flush(partial)
            partial.rename(folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): sha256(path) for path in files}

        if not self.has_folder(name):
            self.forget(f"{name}.json")
            self.processes.wait()
        return folder, self.keep(name, make)

    def has_folder(self, name: str) -> bool:
        """Whether `keep_folder` has it, with every file as it was written."""
        if name not in self._whole:
            listed = self._read(name) if self.processes.is_main else None
            whole = listed is not None and self._is_whole(name, listed[0])
            self._whole[name] = self.processes.gather([whole])[0]
        return self._whole[name]

    def _is_whole(self, name: str, files: dict[str, str]) -> bool:
        for file, checksum in files.items():
            path = self.folder / name / file
            if not path.is_file() or sha256(path) != checksum:
                self._warn(name, f"its file '{file}' is not what was written")
                return False
        return True

    def journal(self, name: str) -> Journal:
        """What this process keeps line by line."""
        return Journal(self.folder / f"{_JOURNAL}{name}-{self.processes.rank}.jsonl" if self._keeps else None)

    def forget(self, start: str) -> None:
        """Remove what begins so and is not needed any more."""
        if self.processes.is_main:
            for path in self.folder.glob(f"{start}*"):
                path.unlink()

    def finish(self, bundle: Path) -> None:
        """Put the bundle in its place, and remove all that was kept for it; in all processes, once it is there."""
        if self._place is not None:
            self._place.take(bundle)
        self.processes.wait()

    def say_what_is_kept(self, runs: int) -> None:
        """Log what need not be run again.

        Args:
            runs: How many there are at full precision.
        """
        if not self.processes.is_main:
            return
        done = [text for name, text in _DONE.items() if (self.folder / f"{name}.json").exists()]
        schedules = sum(path.read_bytes().count(b"\n") for path in self.folder.glob(f"{_JOURNAL}*"))
        if schedules and "planned" not in done:
            done.append(f"{schedules} runs of schedules")
        if found := len(list(self.folder.glob(f"{RUN}*.json"))):
            logging.getLogger(BUILD_LOG).info("resuming: %s", ", ".join([f"{found} of {runs} reference runs", *done]))

    def is_worth_keeping(self) -> bool:
        """Whether a run has ended, and is kept."""
        return self._keeps and any(self.folder.glob(f"{RUN}*.json"))

    def _counted(self, make: Callable[[], Result]) -> tuple[Result, list[float]]:
        """What it gives, and what that took."""
        before = self.generations.counts
        self.generations.counts = [0.0] * len(before)
        try:
            return make(), self.generations.counts
        finally:
            self.generations.counts = before

    def _count(self, counts: list[float]) -> None:
        self.generations.counts = [a + b for a, b in zip(self.generations.counts, counts, strict=True)]

    def _read(self, name: str) -> Any:
        if not self._keeps or not (self.folder / f"{name}.json").exists():
            return None
        try:
            return stored.read(self.folder, name)
        except BundleError as error:
            self._warn(name, str(error))
            return None

    def _write(self, name: str, value: Any) -> None:
        if not self._keeps:
            return
        try:
            stored.write(self.folder, name, value)
        except BundleError as error:  # a pipeline may hand its denoiser objects of its own
            if str(error).partition(":")[2] not in self._lost:
                self._lost.add(str(error).partition(":")[2])
                logging.getLogger(BUILD_LOG).info("%s; it is run again, should this build be ended", error)

    def _warn(self, name: str, fault: str) -> None:
        logging.getLogger(BUILD_LOG).warning("stage '%s' was kept and is damaged, so it is run again: %s", name, fault)


class Journal(dict[str, Any]):
    """Plain data by name, each line of it in a file as soon as it is known; without a file it is a dictionary."""

    def __init__(self, file: Path | None):
        super().__init__()
        self._file = file
        if file is None or not file.exists():
            return
        lines = file.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if _is_whole(line)]
        if whole != lines:  # the last one was being written; and what was damaged later
            with kept_whole(file) as partial:
                partial.write_bytes(b"".join(whole))
        self.update(json.loads(line[9:]) for line in whole)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if self._file is not None:
            text = json.dumps([name, value]).encode()
            with self._file.open("ab") as file:
                file.write(b"%08x %s\n" % (zlib.crc32(text), text))


def _is_whole(line: bytes) -> bool:
    """Whether a line of a journal is as it was written: its checksum, and what that is of."""
    return line.endswith(b"\n") and line[:9] == b"%08x " % zlib.crc32(line[9:-1])


@contextmanager
def building(
    output: Path,
    settings: BuildSettings,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    keeps: bool = True,
    processes: Processes = ALONE,
) -> Iterator[Work]:
    """What was kept of this very build, to go on with. Where it fails, whatever it has finished stays for the next.

    Work on the same output with other settings stays as well, until a bundle is written there: who has mistyped an
    option is to lose nothing by it.

    Args:
        fresh: Remove all that was kept for this output first.
        keeps: Whether anything is to be.

    Raises:
        BundleError: As of `claimed`.
        ProcessError: The processes were asked for different things, or do not see one folder.
    """
    agree(settings, processes)
    asked = what_decides(settings, processes)
    with claimed(output, overwrite=overwrite) if processes.is_main else nullcontext() as place:
        if place and fresh:
            place.clear()
        folder = Path(processes.gather([str(_begun(place, asked)) if place else ""])[0])
        if unseen := [rank for rank, seen in enumerate(processes.gather([folder.is_dir()])) if not seen]:
            raise ProcessError(f"output '{output}': process {unseen[0]} does not see its folder: name one that all see")
        work = Work(folder, processes, place, keeps=keeps)
        try:
            yield work
        except BaseException as error:
            if place and not work.is_worth_keeping():
                shutil.rmtree(folder, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt("what is finished is kept, and the same command goes on from there") from None
            raise


def what_decides(settings: BuildSettings, processes: Processes) -> dict[str, Any]:
    """All that the result of a build depends on."""
    recipe, source = settings.recipe, settings.source
    device = torch.device(settings.device)
    named = [recipe.calib and find_calibration(recipe.calib), *recipe.call.values()]
    given = {str(path): sha256(Path(path)) for path in named if isinstance(path, (str, Path)) and os.path.isfile(path)}
    return recipe.model_dump() | {
        "model": source.name,
        "model files": source.revision or _identity(source.folder),
        "given files": given,
        "LoRAs": [lora.fused.sha256 for lora in settings.loras],
        "limit": settings.limit and dataclasses.asdict(settings.limit),
        "dtype": settings.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": processes.count,
        "libraries": library_versions() | {"cemq": __version__},
    }


def _identity(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file that is not hidden."""
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {name: path.stat() for name, path in names.items() if not any(part.startswith(".") for part in name.parts)}
    return {name.as_posix(): [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _begun(place: Place, asked: dict[str, Any]) -> Path:
    """The folder of these settings, new or with what was kept in it; others are only spoken of."""
    # what JSON does not know is equal to nothing, not even to itself the next time
    text = json.dumps(asked, sort_keys=True, default=lambda _: secrets.token_hex())
    own = place.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    for folder in [path for path in place.folder.iterdir() if path.is_dir() and path != own]:
        try:
            other = dict(json.loads((folder / _ASKED).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError):  # killed before anything was in it
            shutil.rmtree(folder)
            continue
        logging.getLogger(BUILD_LOG).info(
            "kept as well: %s of an unfinished build of '%s' with other settings (%s), until a bundle is written there",
            format_bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())),
            place.target.name, _difference(json.loads(text), other),
        )  # fmt: skip
    own.mkdir(exist_ok=True)
    for path in own.glob(".*"):  # what was being written
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with kept_whole(own / _ASKED) as partial:
        partial.write_text(text, encoding="utf-8")
    return own


def _difference(asked: dict[str, Any], other: dict[str, Any]) -> str:
    """In words, what another build was asked for."""
    names = [name for name in asked if asked[name] != other.get(name)]
    plain = [name for name in names if not isinstance(asked[name], dict)]
    said = [f"{name} {other.get(name)} instead of {asked[name]}" for name in plain]
    return ", ".join(said + [f"other {name}" for name in names if name not in plain])
