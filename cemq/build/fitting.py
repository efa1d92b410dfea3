"""What quantization is fitted to, taken from the reference runs that a build makes anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from cemq.build.within import PieceByPiece
from cemq.errors import ReplayError
from cemq.pipelines.batches import Batch
from cemq.pipelines.opening import denoisers
from cemq.quantize import RECORDED_BYTES, Call, Observer, QuantizationSettings, record_calls
from cemq.runtime.runner import Runner

CALIBRATION_CALLS = 96  # of one sample, that quantization is fitted to, spread over all trajectories

Calls = Mapping[str, Sequence[Call] | Observer]  # of each denoiser, by the component's name


class Fitting(Protocol):
    """Watches reference runs, one after the other."""

    def watch(self, number: int) -> AbstractContextManager[Any]:
        """Enter it for the run of a batch."""
        ...

    def found(self) -> Calls | ReplayError:
        """After all runs, what `quantize_pipeline` takes, or why there is nothing."""
        ...

    def state(self) -> Any:
        """What is known up to now, as values that `stored` can keep."""

    def restore(self, state: Any) -> None:
        """Go on from what was known in an interrupted build."""


def fitting(
    runner: Runner, quantization: QuantizationSettings, batches: Sequence[Batch], pieces: PieceByPiece | None = None
) -> Fitting:
    """Inputs are summed up while full precision runs; where every process has but a share of the runs, calls are
    recorded, and replayed for those sums.

    Args:
        pieces: Where the quantized pipeline is written piece by piece.
    """
    if runner.processes.count > 1:
        return _Recorded(runner, quantization, batches)
    return _Observed(runner, quantization, batches, pieces)


def calls_apart(total: int) -> int:
    """Of how many of all calls one is taken; odd, so that of two calls a step (guidance) both are taken alike."""
    return max(1, total // CALIBRATION_CALLS) | 1


def _every(runner: Runner, batches: Sequence[Batch]) -> int:
    return calls_apart(sum(len(batch.seeds) for batch in batches) * runner.steps)


def _first(number: int, steps: int, every: int) -> int:
    """The first call of a batch's run that is taken: as if all runs were one."""
    return -number * steps % every


class _Observed:
    """Has every denoiser's layers observed while full precision runs."""

    def __init__(
        self,
        runner: Runner,
        quantization: QuantizationSettings,
        batches: Sequence[Batch],
        pieces: PieceByPiece | None,
    ):
        self._steps, self._every, self._pieces = runner.steps, _every(runner, batches), pieces
        self._observers = {
            name: quantization.observer(
                denoiser, runs=len(batches), every=self._every, **pieces.observed(name) if pieces else {}
            )
            for name, denoiser in denoisers(runner.pipe)
            if quantization.is_fitted(denoiser)
        }

    @contextmanager
    def watch(self, number: int) -> Iterator[None]:
        with ExitStack() as watching:
            for observer in self._observers.values():
                watching.enter_context(observer.watch(number, first=_first(number, self._steps, self._every)))
            yield

    def found(self) -> Calls:
        return self._observers

    def state(self) -> dict[str, Any]:
        observers = {name: observer.state() for name, observer in self._observers.items()}
        return {"observers": observers, "pieces": self._pieces.state() if self._pieces else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        if self._pieces:
            self._pieces.restore(state["pieces"])
        for name, observer in self._observers.items():
            observer.restore(state["observers"][name])


class _Recorded:
    """Keeps some calls of every denoiser while full precision runs.

    Calls that cannot be replayed are none: from the first of them on nothing is recorded.
    """

    def __init__(self, runner: Runner, quantization: QuantizationSettings, batches: Sequence[Batch]):
        self._runner, self._quantization = runner, quantization
        self._every = _every(runner, batches)
        self._limit_bytes = RECORDED_BYTES // (len(batches) * len(denoisers(runner.pipe)))
        self._found: list[dict[str, list[Call]] | ReplayError] = []  # of each batch

    @contextmanager
    def watch(self, number: int) -> Iterator[None]:
        """Record the run of a batch.

        Raises:
            ReplayError: Its calls cannot be replayed, nor can be done without.
        """
        if self._found and isinstance(self._found[-1], ReplayError):
            yield
            self._found.append(self._found[-1])
            return
        first = _first(number, self._runner.steps, self._every)
        try:
            with ExitStack() as recording:
                calls = {
                    name: recording.enter_context(
                        record_calls(denoiser, every=self._every, first=first, limit_bytes=self._limit_bytes)
                    )
                    for name, denoiser in denoisers(self._runner.pipe)
                    if self._quantization.is_fitted(denoiser)
                }
                yield
        except ReplayError as error:
            self._quantization.without_calls(error)  # now, and not after the other runs
            self._found = [error] * (len(self._found) + 1)
        else:
            self._found.append(calls)

    def found(self) -> Calls | ReplayError:
        """Of all batches and processes; what this one has kept is let go of."""
        found = self._runner.processes.gather(self._found)
        self._found = []
        if failed := next((each for each in found if isinstance(each, ReplayError)), None):
            return failed
        recorded = [each for each in found if not isinstance(each, ReplayError)]
        return {name: [call for calls in recorded for call in calls[name]] for name in recorded[0]}

    def state(self) -> list[Any]:
        return [str(each) if isinstance(each, ReplayError) else each for each in self._found]

    def restore(self, state: Sequence[Any]) -> None:
        self._found = [ReplayError(each) if isinstance(each, str) else each for each in state]
