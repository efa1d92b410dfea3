"""Methods that decide while a picture is drawn, as policies of ours."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from cemq.evaluation.rivals.methods import MOST_SKIPPED, Bench, Interval, Threshold, add_method
from cemq.runtime import attached
from cemq.runtime.dicache import DiCache
from cemq.runtime.duca import DuCa
from cemq.runtime.easycache import EasyCache
from cemq.runtime.h2cache import H2Cache
from cemq.runtime.magcache import MagCache, fitted_magnitudes
from cemq.runtime.policies import Policy
from cemq.runtime.precisecache import PreciseCache
from cemq.runtime.sencache import SenCache, fitted_sensitivities
from cemq.runtime.teacache import TeaCache, fitted_coefficients

_DETAIL = 0.22 / 0.15  # of H2-Cache's thresholds, as released


def _follow(bench: Bench, policy: Policy) -> AbstractContextManager[Any]:
    return attached(bench.runner.pipe, policy)


@add_method("teacache", "TeaCache, arXiv:2411.19108", Threshold(low=1e-3, high=10.0))
def _teacache(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    coefficients = bench.fitted("teacache", lambda: fitted_coefficients(bench.runner, bench.batches[: bench.planned]))
    return _follow(bench, TeaCache(threshold=knob, coefficients=coefficients))


@add_method("magcache", "MagCache, arXiv:2506.09045", Threshold(low=1e-4, high=20.0))
def _magcache(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    magnitudes = bench.fitted("magcache", lambda: fitted_magnitudes(bench.runner, bench.batches[:1]))
    return _follow(bench, MagCache(threshold=knob, magnitudes=magnitudes, most_skipped=MOST_SKIPPED))


@add_method("easycache", "EasyCache, arXiv:2507.02860", Threshold(low=1e-3, high=20.0))
def _easycache(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    return _follow(bench, EasyCache(threshold=knob))


@add_method("dicache", "DiCache, arXiv:2508.17356", Threshold(low=1e-3, high=20.0))
def _dicache(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    return _follow(bench, DiCache(threshold=knob))


@add_method("sencache", "SenCache, arXiv:2602.24208", Threshold(low=1e-4, high=20.0))
def _sencache(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    tables = bench.fitted("sencache", lambda: fitted_sensitivities(bench.runner, bench.batches[: bench.planned]))
    return _follow(bench, SenCache(threshold=knob, most_skipped=MOST_SKIPPED, **tables._asdict()))


@add_method("precisecache", "PreciseCache's LFCache, arXiv:2603.00976", Threshold(low=1e-3, high=20.0))
def _precisecache(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    return _follow(bench, PreciseCache(threshold=knob))


@add_method("duca", "DuCa, arXiv:2412.18911", Interval(low=2, high=16))
def _duca(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    return _follow(bench, DuCa(interval=int(knob)))


@add_method("h2-cache", "H2-Cache, arXiv:2510.27171", Threshold(low=1e-4, high=10.0))
def _h2cache(bench: Bench, knob: float) -> AbstractContextManager[Any]:
    return _follow(bench, H2Cache(threshold=knob, detail_threshold=knob * _DETAIL))
