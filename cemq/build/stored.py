"""Results of stages as files: JSON for what they hold, safetensors for their tensors and arrays, and no pickle.

A value may be made of None, numbers, texts, lists, tuples, dictionaries, tensors, arrays, dtypes and devices, and of
the dataclasses that stages return. Tensors that are the same object are written once, and read as one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cemq.build.stages import Originals, Plans, Samples
from cemq.errors import BundleError, first_line
from cemq.evaluation.compare import Fidelity
from cemq.pipelines.batches import Batch
from cemq.pipelines.fingerprint import SamplerFingerprint
from cemq.pipelines.trajectory import Trajectory
from cemq.prior.error_prior import ErrorPrior, PriorMetadata
from cemq.quantize import Call
from cemq.runtime.runner import Outcome
from cemq.schedule import CacheSchedule
from cemq.schedule.plan import Plan
from cemq.schedule.rectify import Correction
from cemq.search.choose import Planned

_KNOWN = {
    kind.__name__: kind
    for kind in (
        *(Batch, CacheSchedule, Call, Correction, ErrorPrior, Fidelity, Originals, Outcome, Plan, Planned, Plans),
        *(PriorMetadata, SamplerFingerprint, Samples, Trajectory),
    )
}
_PLAIN = (bool, int, str, type(None))


def write(folder: Path, name: str, value: Any) -> None:
    """Write ``value`` as NAME.json and NAME.safetensors; the JSON last, so that without it there is nothing.

    Raises:
        BundleError: There is something in it that cannot be written so.
    """
    tensors: dict[str, torch.Tensor] = {}
    known: dict[int, str] = {}

    def keep(tensor: torch.Tensor, of: Any) -> str:
        if id(of) not in known:
            known[id(of)] = str(len(known))
            tensors[known[id(of)]] = tensor.detach().to("cpu", copy=True).contiguous()
        return known[id(of)]

    def encoded(each: Any) -> Any:
        if isinstance(each, float):
            return each if math.isfinite(each) else {"float": repr(each)}
        if type(each) in _PLAIN:
            return each
        if isinstance(each, np.generic):
            return encoded(each.item())
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            return {"tensor": keep(each, each)}
        if isinstance(each, np.ndarray):
            return {"array": keep(torch.from_numpy(np.array(each, order="C")), each)}  # a copy: it may be read-only
        if isinstance(each, (torch.dtype, torch.device)):
            return {type(each).__name__: str(each).removeprefix("torch.")}
        if type(each) is list:
            return [encoded(item) for item in each]
        if type(each) is tuple:
            return {"tuple": [encoded(item) for item in each]}
        if type(each) is dict:
            return {"dict": [[encoded(key), encoded(item)] for key, item in each.items()]}
        if _KNOWN.get(type(each).__name__) is type(each):
            fields = [field for field in dataclasses.fields(each) if field.init]
            return {type(each).__name__: {field.name: encoded(getattr(each, field.name)) for field in fields}}
        raise BundleError(f"stage '{name}' cannot be kept: it holds a {type(each).__name__}, which is no plain data")

    text = json.dumps(encoded(value))
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def read(folder: Path, name: str) -> Any:
    """What was written, equal in value and type.

    Raises:
        BundleError: It is not there, or damaged.
    """
    try:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{name}.safetensors")
        return _decoded(content, tensors)
    except Exception as error:  # whatever reading a damaged file raises, in four libraries
        raise BundleError(f"stage '{name}' in '{folder}' cannot be read: {first_line(error)}") from error


def _decoded(content: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(content, list):
        return [_decoded(item, tensors) for item in content]
    if not isinstance(content, dict):
        return content
    ((kind, held),) = content.items()
    if kind == "float":
        return float(held)
    if kind == "tensor":
        return tensors[held]
    if kind == "array":
        return tensors[held].numpy()
    if kind == "dtype":
        return getattr(torch, held)
    if kind == "device":
        return torch.device(held)
    if kind == "tuple":
        return tuple(_decoded(item, tensors) for item in held)
    if kind == "dict":
        return {_decoded(key, tensors): _decoded(item, tensors) for key, item in held}
    return _KNOWN[kind](**{field: _decoded(item, tensors) for field, item in held.items()})
