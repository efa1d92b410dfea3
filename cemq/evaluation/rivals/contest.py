"""Methods side by side: the same pipeline, the same seeds, as near to equal compute as their knobs allow."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cemq.errors import CemqError, first_line
from cemq.evaluation.compare import Fidelity, measure_fidelity
from cemq.evaluation.rivals.methods import Bench, Method
from cemq.evaluation.rivals.sweep import settle
from cemq.evaluation.rivals.work import counted_work
from cemq.evaluation.within import Room
from cemq.pipelines.batches import Batch
from cemq.runtime import find_hook
from cemq.runtime.runner import Outcome, Runner

FULL = "full compute"
_PROBED = 2  # samples that settings are tried on; runs are timed on one
_NEAR = 1.05  # of the work asked for: what computes more is another matter
_TIMED = 2  # turns of runs that wall ratios are the median of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one setting, or why there is none.

    Args:
        scheme: Of the pipeline that it was put on.
        target: The compute ratio asked for.
        setting: Of the method's knob.
        compute_ratio: Multiply-accumulates of full compute over those of the method, in layers of the denoiser.
        wall_ratio: Seconds of full compute over those of the method, one sample, runs taking turns; median.
        psnr_db: To full precision, uncached; mean over samples.
        p5_db: The fifth percentile of it.
        worst_db: The worst of it.
        change_psnr_db: Of the differences between neighbouring frames, mean over samples; None where there are no
            frames.
        status: ``ok``, or why there is nothing to tell.
    """

    method: str
    source: str
    scheme: str
    target: float
    setting: float | None = None
    compute_ratio: float | None = None
    wall_ratio: float | None = None
    psnr_db: float | None = None
    p5_db: float | None = None
    worst_db: float | None = None
    ssim: float | None = None
    change_psnr_db: float | None = None
    status: str = "ok"

    @property
    def figures(self) -> tuple[float, ...]:
        """Compute ratio, wall ratio, mean, fifth percentile and worst PSNR: as many as there are, all of what is ok."""
        told = self.compute_ratio, self.wall_ratio, self.psnr_db, self.p5_db, self.worst_db
        return tuple(figure for figure in told if figure is not None)

    @property
    def is_near(self) -> bool:
        """Whether it computes no more than was asked for, or hardly so."""
        return self.compute_ratio is not None and self.compute_ratio * _NEAR >= self.target


@dataclass(kw_only=True, eq=False)
class Contest:
    """One pipeline that methods take turns on.

    Args:
        bench: What they are fitted to.
        scheme: Of its weights and activations, for the rows.
        batches: The samples that they are compared on.
        references: What the full-precision pipeline makes of those.
        room: Within a limit, what is left of it for caches.
    """

    bench: Bench
    scheme: str
    batches: Sequence[Batch]
    references: Sequence[Outcome]
    room: Room | None = None

    def __post_init__(self) -> None:
        first = self.bench.batches[0]
        self._probe = Batch(conditions=first.conditions[:_PROBED], seeds=first.seeds[:_PROBED])
        self._timed = Batch(conditions=first.conditions[:1], seeds=first.seeds[:1])
        with counted_work(self.runner.pipe) as work:
            self.runner.run_one(self._probe)
        self._full = work.operations
        self._expected = self.runner.run_one(self._timed)

    @property
    def runner(self) -> Runner:
        return self.bench.runner

    def uncached(self) -> Row:
        """Full compute, which loses what quantization does."""
        fidelity = measure_fidelity(self.references, self.runner.run(self.batches), batches=self.batches)
        return Row(
            method=FULL, source="", scheme=self.scheme, target=1.0, compute_ratio=1.0, wall_ratio=1.0,
            **_told(fidelity),
        )  # fmt: skip

    def rows(self, method: Method, targets: Sequence[float]) -> list[Row]:
        """Settle a method's knob for each target, then run it on the samples; what it fails with is the row's status.

        Raises:
            CemqError: The method left the pipeline other than it was: all that follows would be wrong.
        """
        known: dict[str, Any] = {"method": method.name, "source": method.source, "scheme": self.scheme}
        if method.package is not None and importlib.util.find_spec(method.package) is None:
            return [Row(**known, target=each, status=f"{method.package} is not installed") for each in targets]
        ratios: dict[float, float] = {}
        judged: dict[float, dict[str, Any]] = {}  # by setting: two targets may come to the same
        found = []
        for target in targets:
            try:
                setting = self._settled(method, target, ratios)
                if setting not in judged:
                    judged[setting] = self._judged(method, setting)
                found.append(Row(**known, target=target, setting=setting, **judged[setting]))
            except Exception as error:  # of other people's code on a model it may not know
                cause = error.__cause__ or error  # a run that fails is told as what the pipeline was called with
                found.append(Row(**known, target=target, status=f"{type(cause).__name__}: {first_line(cause)}"[:300]))
        walls = self._wall_ratios(method, list(judged))
        return [each if each.setting is None else replace(each, wall_ratio=walls[each.setting]) for each in found]

    def _settled(self, method: Method, target: float, ratios: dict[float, float]) -> float:
        def measured(setting: float) -> float:
            with self._put_on(method, setting), counted_work(self.runner.pipe) as work:
                self.runner.run_one(self._probe)
            return self._full / work.operations

        return settle(method.knob, target, measured, self.bench.num_steps, ratios)

    def _judged(self, method: Method, setting: float) -> dict[str, Any]:
        with self._put_on(method, setting), counted_work(self.runner.pipe) as work:
            outcomes = self.runner.run(self.batches)
        fidelity = measure_fidelity(self.references, outcomes, batches=self.batches)
        probes = sum(len(batch.seeds) for batch in self.batches) / len(self._probe.seeds)
        return {"compute_ratio": self._full * probes / work.operations, **_told(fidelity)}

    def _wall_ratios(self, method: Method, settings: Sequence[float]) -> dict[float, float]:
        """At each setting; runs of full compute before, between and after show whether the method is gone again."""
        turns: list[list[float]] = []
        for _ in range(_TIMED):
            full = self._run_clean(method)
            turns.append([])
            for setting in settings:
                with self._put_on(method, setting):
                    turns[-1].append(full / self.runner.run_one(self._timed).seconds)
        self._run_clean(method)
        return dict(zip(settings, np.median(turns, axis=0).tolist(), strict=True))

    def _run_clean(self, method: Method) -> float:
        """Seconds of one sample at full compute."""
        found = self.runner.run_one(self._timed)
        if not np.array_equal(found.images, self._expected.images):
            raise CemqError(f"method {method.name} left the pipeline other than it was: compare without it")
        return found.seconds

    @contextmanager
    def _put_on(self, method: Method, setting: float) -> Iterator[None]:
        """Raises PlacementError where what is cached does not fit into a limit; other libraries do not say what is."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that are tried on what they do not know
            with method.apply(self.bench, setting):
                hook = find_hook(self.runner.pipe)
                if self.room is not None and hook is not None:
                    self.room.check(hook.plan.cache, hook.run.decider.most_kept)
                yield


def _told(fidelity: Fidelity) -> dict[str, Any]:
    scores, changes = fidelity.scores["psnr_db"], fidelity.scores.get("change_psnr_db")
    return {
        "psnr_db": fidelity.psnr_db, "p5_db": scores["p5"], "worst_db": scores["worst"], "ssim": fidelity.ssim,
        "change_psnr_db": changes and changes["mean"],
    }  # fmt: skip
