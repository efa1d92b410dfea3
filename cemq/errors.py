"""What cemq raises when it is asked for something it cannot do; the command line prints these as one line."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from typing import NoReturn, TypeVar

Name = TypeVar("Name", bound=str)


class CemqError(Exception):
    """Says what was asked, what was found and what to do."""


class ModelError(CemqError):
    """The model cannot be opened, or is not a pipeline that cemq can drive."""


class SchemeError(CemqError):
    """No such quantization scheme or backend."""


class ReplayError(CemqError):
    """A recorded call of a denoiser does not give again what it gave."""


class InfeasibleBudgetError(CemqError):
    """No schedule has this many full-compute steps."""


class PriorMismatchError(CemqError):
    """An error prior was measured under another sampler, step count or scheme."""


class PipelineError(CemqError):
    """The pipeline itself refused how it was called, or failed while it ran; the cause is its own exception."""


class BundleError(CemqError):
    """A bundle is incomplete, edited, of another format, or cannot be written."""


class PlacementError(CemqError):
    """No placement of the weights fits in the memory that was allowed."""


class HubError(CemqError):
    """The Hub cannot be reached, or refuses."""


class ProcessError(CemqError):
    """Another process of the same job has failed or is gone, or does not do the same."""


class InputError(CemqError):
    """A calibration file, recipe or call argument is missing or malformed."""


def first_line(error: BaseException) -> str:
    """What some library's exception says, short enough for a message of one line.

    >>> first_line(ValueError("not today\\nor ever")), first_line(ValueError())
    ('not today', 'ValueError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_one_line(text: str) -> str:
    r"""Text that may hold names of files, which may hold anything, as it can be shown in one line.

    >>> in_one_line("no 'a\nb'")
    "no 'a\\nb'"
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def refuse_method(owner: object, name: str, message: str) -> None:
    """Have one object raise ModelError in place of a method, if it has that."""
    if hasattr(owner, name):
        setattr(owner, name, functools.partial(_refuse, message))


def _refuse(message: str, *_: object, **__: object) -> NoReturn:
    raise ModelError(message)


def check_keywords(function: str, given: Iterable[str], taken: type) -> None:
    """Refuses a keyword that is none of ``taken``, a TypedDict, as Python itself does where a function lists its own.

    Raises:
        TypeError: Such as ``evaluate() got an unexpected keyword argument 'sample'``.
    """
    for name in given:
        if name not in taken.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def choose(kind: str, name: str, known: Iterable[Name], error: type[CemqError] = InputError) -> Name:
    """Return ``name`` if it is known, else raise ``error`` with the nearest known name."""
    names = list(known)
    if found := next((each for each in names if each == name), None):
        return found
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise error(f"unknown {kind} {name!r}: choose from {', '.join(names)}{hint}")
