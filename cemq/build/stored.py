"""Results of stages as files: JSON for what they hold, safetensors for their tensors and arrays, and no pickle.

The JSON comes last and begins with checksums of both, so that a file is believed if it is whole and as it was written.

A value may be made of None, numbers, texts, lists, tuples, dictionaries, tensors, arrays, dtypes and devices, and of
the dataclasses that stages return. Tensors that are the same object are written once, and read as one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cemq.build.references import Opened, Reference, Samples
from cemq.build.stages import Checked, Plans
from cemq.errors import BundleError, first_line
from cemq.evaluation.compare import Fidelity
from cemq.files import kept_whole, sha256
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
        *(Batch, CacheSchedule, Call, Checked, Correction, ErrorPrior, Fidelity, Opened, Outcome, Plan, Planned, Plans),
        *(PriorMetadata, Reference, SamplerFingerprint, Samples, Trajectory),
    )
}
_PLAIN = (bool, int, str, type(None))


def write(folder: Path, name: str, value: Any) -> None:
    """Write ``value`` as NAME.json and NAME.safetensors; the JSON last, so that without it there is nothing.

    Raises:
        BundleError: There is something in it that cannot be written so.
        OSError, SafetensorError: The disk is full, or gone.
    """
    tensors: dict[str, torch.Tensor] = {}
    known: dict[int, str] = {}
    memory: set[int] = set()  # of the tensors that are written as they are: they may be gigabytes

    def keep(tensor: torch.Tensor, of: Any) -> str:
        if id(of) not in known:
            known[id(of)] = str(len(known))
            found = tensor.detach().to("cpu")
            shared = found.untyped_storage().data_ptr() in memory  # which safetensors does not write
            memory.add(found.untyped_storage().data_ptr())
            tensors[known[id(of)]] = found.clone() if shared else found
        return known[id(of)]

    def encoded(each: Any) -> Any:
        if isinstance(each, float):
            return each if math.isfinite(each) else {"float": repr(each)}
        if type(each) in _PLAIN:
            return each
        if isinstance(each, np.generic):
            return encoded(each.item())
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            key = keep(each, each)
            strides = () if tensors[key].is_contiguous() else tensors[key].stride()
            return {"tensor": [key, *strides]}
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
    with kept_whole(folder / f"{name}.safetensors") as partial:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        checksum = sha256(partial)
    with kept_whole(folder / f"{name}.json") as partial:
        partial.write_text(f"{_digest(text)} {checksum}\n{text}\n", encoding="utf-8")


def read(folder: Path, name: str) -> Any:
    """What was written, equal in value and type; tensors are laid out as they were, in memory of their own.

    Raises:
        BundleError: It is not there, or damaged.
    """
    try:
        first, _, text = (folder / f"{name}.json").read_text(encoding="utf-8").partition("\n")
        tensors = folder / f"{name}.safetensors"
        if first.split() != [_digest(text[:-1]), sha256(tensors)]:
            raise ValueError("it is not what was written")
        # copied: kernels may depend on how memory is aligned, and a mapped file on a share may go away
        return _decoded(json.loads(text), {key: tensor.clone() for key, tensor in load_file(tensors).items()})
    except Exception as error:  # whatever reading a damaged file raises, in four libraries
        raise BundleError(f"stage '{name}' in '{folder}' cannot be read: {first_line(error)}") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _decoded(content: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(content, list):
        return [_decoded(item, tensors) for item in content]
    if not isinstance(content, dict):
        return content
    ((kind, held),) = content.items()
    if kind == "float":
        return float(held)
    if kind == "tensor":
        key, *strides = held
        if (found := tensors[key]).stride() != tuple(strides) and strides:
            tensors[key] = torch.empty_strided(found.shape, strides, dtype=found.dtype).copy_(found)
        return tensors[key]
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
