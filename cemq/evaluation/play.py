"""A turn of the page that `cemq play` shows: settings in; steps as they run, pictures, seconds and decibels out."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np

from cemq.bundle.load import Loading, from_pretrained
from cemq.bundle.manifest import Manifest, read_bundle
from cemq.bundle.original import Original, find_original
from cemq.errors import CemqError, InputError, check_keywords, first_line
from cemq.evaluation.pictures import embedded, moving, still_of
from cemq.evaluation.scores import METRICS
from cemq.pipelines.batches import EVALUATION_SEED_OFFSET, Batch, check_conditions, condition_argument
from cemq.pipelines.opening import BUILTIN_PREFIX, default_device
from cemq.pipelines.outputs import Sample, as_pictures, kind_of, rate_of
from cemq.runtime import attached, detach, schedule_hook
from cemq.runtime.attach import Run
from cemq.runtime.runner import Outcome, Runner
from cemq.schedule.plan import Plan

if TYPE_CHECKING:
    from cemq.runtime.policies import Policy

Side = Literal["bundle", "reference"]
NO_REFERENCE = "none"
_KEPT = 4  # samples of full precision, the latest, that are not drawn again for another budget


class StoppedError(Exception):
    """A run was ended because nobody waits for it any more; no `CemqError`, for there is nobody to tell."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be drawn.

    Args:
        condition: A prompt, or a class by name or number.
        budget: Full-compute steps; None takes the bundle's own schedule.
        quantized: By the bundle's weights, else by those of the original.
        cached: Skipping steps.
    """

    condition: str
    seed: int
    budget: int | None = None
    quantized: bool = True
    cached: bool = True

    @classmethod
    def from_dict(cls, fields: Any) -> Asked:
        """Of what a page sends. Raises InputError for anything else."""
        kinds = {
            "condition": (str,),
            "seed": (int,),
            "budget": (int, type(None)),
            "quantized": (bool,),
            "cached": (bool,),
        }
        if not isinstance(fields, dict) or fields.keys() != kinds.keys():
            raise InputError(f"a turn has the keys {', '.join(kinds)}")
        for name, value in fields.items():
            if type(value) not in kinds[name]:
                raise InputError(f"{name}={value!r}: this is no {' or '.join(kind.__name__ for kind in kinds[name])}")
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A run has begun; ``marks`` are what `CacheSchedule.strip` has of it, and empty where a policy decides."""

    side: Side
    marks: str


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A step has been made, and what became of it."""

    side: Side
    step: int
    mark: str


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A run has ended.

    Args:
        marks: What became of every step.
        picture: Data URI of an image, of a video that moves, or of spectrograms.
        sound: Data URI of audio.
        kept: Whether it was drawn for an earlier turn.
    """

    side: Side
    marks: str
    picture: str
    sound: str
    seconds: float
    num_steps: int
    full_steps: float
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How far the two are from each other; None where one of them is no picture but NaN."""

    psnr_db: float | None


Event = Begun | Stepped | Drawn | Measured
Tell = Callable[[Event], None]


def to_dict(event: Event) -> dict[str, Any]:
    """For JSON: what it says, and what it is under ``event``."""
    return {"event": type(event).__name__.lower()} | dataclasses.asdict(event)


@dataclass(kw_only=True, eq=False)
class Player:
    """What draws a turn: a bundle's pipeline, and that of its original where it is at hand.

    Args:
        runner: Of the bundle, with nothing attached.
        followed: What the bundle follows.
        original: Of full precision; None where it is not at hand.
        absent: Why it is not.
    """

    name: str
    manifest: Manifest
    runner: Runner
    followed: Plan | Policy
    original: Runner | None = None
    absent: str = ""
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _stopped: threading.Event = field(init=False, default_factory=threading.Event)
    _kept: dict[Batch, tuple[Outcome, Drawn]] = field(init=False, default_factory=dict)
    _plans: dict[int, Plan] = field(init=False, default_factory=dict)

    @property
    def labels(self) -> dict[str, int]:
        """Names of classes, where the pipeline has any."""
        return dict(getattr(self.runner.pipe, "labels", None) or {})

    @property
    def takes_labels(self) -> bool:
        return condition_argument(self.runner.pipe) == "class_labels"

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    @property
    def first(self) -> Asked:
        """What to begin with: a condition and a seed that nothing was profiled with, and the bundle as it is."""
        condition, budget = self.manifest.held_out_conditions[0], None
        names: dict[str | int, str] = {number: name for name, number in self.labels.items()}
        if isinstance(self.followed, Plan):
            budget = self.followed.schedule.budget
        return Asked(condition=str(names.get(condition, condition)), seed=EVALUATION_SEED_OFFSET, budget=budget)

    def follows(self, asked: Asked) -> Plan | Policy | None:
        """What a run is to follow; None: every step is computed.

        Raises:
            InfeasibleBudgetError: The budget is out of range.
            InputError: A budget, of a bundle with a policy.
        """
        if not asked.cached:
            return None
        if not isinstance(self.followed, Plan):
            if asked.budget is not None:
                raise InputError(f"budget={asked.budget}: a policy decides in this bundle: leave it out")
            return self.followed
        if asked.budget is None:
            return self.followed
        if asked.budget not in self._plans:  # from the bundle's own, so that a budget always gives the same
            self._plans[asked.budget] = self.followed.with_budget(asked.budget)
        return self._plans[asked.budget]

    def marks(self, asked: Asked) -> str:
        """What is to become of every step, as far as that is known: see `Begun`. Raises as `follows` does."""
        followed = self.follows(asked)
        if followed is None:
            return "█" * self.manifest.schedule.num_steps
        return followed.schedule.strip() if isinstance(followed, Plan) else ""

    def turn(self, asked: Asked, tell: Tell) -> None:
        """Draw what was asked for and, where that is at hand, the same in full precision without a cache.

        One turn at a time: another waits for its end.

        Args:
            tell: Told every `Event` as it happens; what it raises ends the turn.

        Raises:
            CemqError: It cannot be drawn.
            StoppedError: `stop` was called.
        """
        with self._lock:
            (condition,) = check_conditions(self.runner.pipe, [asked.condition])
            batch = Batch(conditions=(condition,), seeds=(asked.seed,))
            runner = self.runner if asked.quantized else self.original
            if runner is None:
                raise InputError(f"full precision is not at hand: {self.absent}")
            outcome, drawn = self._run("bundle", runner, asked, batch, tell)
            if not (asked.quantized or asked.cached):
                self._keep(batch, outcome, drawn)
            reference = self._reference(batch, tell)
            if reference is not None:
                psnr = float(METRICS["psnr_db"].compare(reference.images, outcome.images)[0])
                tell(Measured(psnr_db=None if math.isnan(psnr) else psnr))

    def stop(self) -> None:
        """End the turn that is under way at its next step, and wait for that; every later one ends at once."""
        self._stopped.set()
        with self._lock:
            pass

    def _reference(self, batch: Batch, tell: Tell) -> Outcome | None:
        if self.original is None:
            return None
        if batch in self._kept:
            outcome, drawn = self._kept[batch]
            tell(Begun(side="reference", marks=drawn.marks))
            tell(dataclasses.replace(drawn, side="reference", kept=True))
        else:
            asked = Asked(condition="", seed=batch.seeds[0], quantized=False, cached=False)
            outcome, drawn = self._run("reference", self.original, asked, batch, tell)
        self._keep(batch, outcome, drawn)
        return outcome

    def _keep(self, batch: Batch, outcome: Outcome, drawn: Drawn) -> None:
        self._kept.pop(batch, None)
        self._kept[batch] = outcome, drawn
        for old in list(self._kept)[:-_KEPT]:
            del self._kept[old]

    def _run(self, side: Side, runner: Runner, asked: Asked, batch: Batch, tell: Tell) -> tuple[Outcome, Drawn]:
        followed, marks, steps = self.follows(asked), [], itertools.count()
        tell(Begun(side=side, marks=self.marks(asked)))
        with nullcontext() if followed is None else attached(runner.pipe, followed) as hook:

            def on_step() -> None:
                if self.is_stopped:
                    raise StoppedError
                step = next(steps)
                marks.append("█" if hook is None else mark_of(hook.run, step))
                tell(Stepped(side=side, step=step, mark=marks[-1]))

            outcome = runner.run_one(batch, on_step)
        picture, sound = files_of(outcome.images, rate_of(runner.pipe, runner.call))
        drawn = Drawn(
            side=side, marks="".join(marks), picture=picture, sound=sound, seconds=outcome.seconds,
            num_steps=outcome.num_steps, full_steps=outcome.full_steps,
        )  # fmt: skip
        tell(drawn)
        return outcome, drawn


def mark_of(run: Run, step: int) -> str:
    """What became of a step, as `CacheSchedule.strip` has it: one of which some calls were served is half a one."""
    if not run.served[step]:
        return "█"
    return "▌" if run.computed[step] else "·"


def files_of(samples: np.ndarray, rate: float) -> tuple[str, str]:
    """Data URIs of the first sample: a picture to look at, and of audio what is to be heard, else an empty text.

    Args:
        rate: Of frames or of audio samples, a second.
    """
    kind, pictures = kind_of(samples), as_pictures(samples[:1])[0]
    if kind == "video":
        return moving(pictures, rate)[0], ""
    picture = embedded(still_of(pictures, kind))
    if kind == "image":
        return picture, ""
    with tempfile.TemporaryDirectory(prefix="cemq-") as folder:
        file = Path(folder) / "a.wav"
        Sample(kind=kind, values=samples[0], rate=rate).save(file)
        return picture, f"data:audio/wav;base64,{base64.b64encode(file.read_bytes()).decode()}"


# --- opening


def open_player(bundle: str | Path, *, reference: str | None = None, **loading: Unpack[Loading]) -> Player:
    """Load a bundle and, where that is at hand, its original.

    Args:
        reference: The original, into which the bundle's LoRAs are fused; ``none`` leaves it out. None takes the model
            the bundle was made from where that is on this machine: nothing is downloaded, and with ``vram`` it is
            left out.
        device: Where both run; None takes CUDA where there is one.
        verify: When checksums are compared: ``always``, ``once`` on this machine, which is the default, or ``never``.
        vram: Device memory that the bundle is to stay within, see `cemq.from_pretrained`.
        offload_folder: For placements that keep weights on disk; None takes ``~/.cache/cemq/offload``.

    Raises:
        CemqError: The bundle, or the original that is named, cannot be used.
    """
    check_keywords("open_player", loading, Loading)
    manifest = read_bundle(Path(bundle), verify=loading.get("verify", "once"))
    found, absent = _find_reference(manifest, reference, limited=loading.get("vram") is not None)
    pipe = from_pretrained(bundle, **loading | {"verify": "never"})
    followed = schedule_hook(pipe).followed
    detach(pipe)
    original = None
    if found is not None:
        original = found.open(dtype=manifest.dtype, device=loading.get("device") or default_device())
        original.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    steps, call = manifest.num_inference_steps, manifest.call
    return Player(
        name=Path(bundle).resolve().name, manifest=manifest, runner=Runner(pipe=pipe, steps=steps, call=call),
        followed=followed, absent=absent, original=original and Runner(pipe=original, steps=steps, call=call),
    )  # fmt: skip


def _find_reference(manifest: Manifest, reference: str | None, *, limited: bool) -> tuple[Original | None, str]:
    """The original, or why there is none.

    Raises:
        ModelError: The one that is named cannot be used.
    """
    if reference == NO_REFERENCE:
        return None, f"--reference {NO_REFERENCE} left it out"
    if reference is not None:
        return find_original(manifest, reference), ""
    if limited:
        return None, "--vram may leave no room for it: name it with --reference to load it all the same"
    try:
        return find_original(manifest, _on_this_machine(manifest)), ""
    except CemqError as error:
        return None, f"{error}; --reference names another place"


def _on_this_machine(manifest: Manifest) -> str | None:
    """Where the original lies, for `find_original`; of one from the Hub, the folder in its cache.

    Raises:
        InputError: It is not in that cache.
    """
    name = manifest.model
    if name.startswith(BUILTIN_PREFIX) or Path(name).is_absolute():
        return None
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=manifest.revision, local_files_only=True)
    except Exception as error:  # huggingface_hub raises many unrelated types
        raise InputError(f"'{name}' is not on this machine ({first_line(error)})") from None
