"""The stages of a build: each can be kept as a file, and a build goes on from what was kept as if nothing had been."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from support.pipelines import FLUX_CALL, make_flux

import cemq
from cemq.build import stored
from cemq.bundle.manifest import EVIDENCE, read_bundle
from cemq.errors import BundleError
from cemq.pipelines.batches import Batch
from cemq.quantize import Call

SETTINGS = {
    "scheme": "w8a8", "steps": 8, "also_steps": [6], "budget": 4, "samples": 2, "planning_samples": 2, "batch_size": 1,
    "effort": "quick", "call": FLUX_CALL,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    make_flux().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a seven\na three\na bold two\nan eight\n")
    return str(tmp_path / "pipeline")


def same(one, other):
    """Equal in every value, type and bit."""
    assert type(one) is type(other)
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            same(getattr(one, field.name), getattr(other, field.name))
    elif torch.is_tensor(one):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif isinstance(one, dict):
        same(list(one), list(other))
        same(list(one.values()), list(other.values()))
    else:
        assert one == other or (one != one and other != other)


def test_a_build_whose_stages_were_all_read_again_gives_the_bundle_of_one_that_read_none(tmp_path, model, monkeypatch):
    settings = SETTINGS | {"calib": str(tmp_path / "prompts.txt")}
    cemq.quantize_and_schedule(model, tmp_path / "at once", device="cpu", **settings)
    write, names = stored.write, []

    def written(folder, name, value):
        write(folder, name, value)
        same(stored.read(folder, name), value)
        names.append(name)

    monkeypatch.setattr(stored, "write", written)
    cemq.quantize_and_schedule(model, tmp_path / "again", device="cpu", **settings)
    assert {"opened", "samples", "fitted-0", "run-reference-runs-1", "pipeline", "prior", "plans", "check"} < {*names}
    at_once, again = (read_bundle(tmp_path / name, verify=True) for name in ("at once", "again"))
    assert at_once == again
    assert len(at_once.other_runs) == 1
    files = [json.loads((tmp_path / name / "cemq.json").read_text())["files"] for name in ("at once", "again")]
    assert files[0] == files[1]
    assert EVIDENCE in files[0]


def test_values_come_back_as_they_were(tmp_path):
    shared = torch.arange(6).reshape(2, 3).T  # not contiguous
    call = Call((shared, None, True), {"sizes": [(1, 2.5)], "kind": torch.bfloat16, "again": shared})
    value = {
        "call": call, 7: torch.ones(2, dtype=torch.bfloat16), "not a number": math.nan, "endless": -math.inf,
        "place": torch.device("cpu"), "array": np.eye(3), "empty": (), "batch": Batch(conditions=("ä",), seeds=(1,)),
        "scalar": torch.tensor(3.0), "number": 1.5,
    }  # fmt: skip
    stored.write(tmp_path, "value", value)
    found = stored.read(tmp_path, "value")
    same(found, value)
    assert found["call"].arguments[0] is found["call"].keywords["again"]
    assert found["call"].arguments[0].stride() == shared.stride()  # kernels may depend on it


def test_tensors_are_written_from_where_they_lie_but_for_those_that_share_memory(tmp_path, monkeypatch):
    """Hessians are gigabytes, and kept after every reference run."""
    written, save = {}, stored.save_file

    def spy(tensors, path):
        written.update(tensors)
        save(tensors, path)

    monkeypatch.setattr(stored, "save_file", spy)
    whole, other = torch.arange(12.0).reshape(3, 4), torch.ones(5)
    stored.write(tmp_path, "value", [whole, other, whole[:2]])
    assert [each.data_ptr() for each in written.values()][:2] == [whole.data_ptr(), other.data_ptr()]
    same(stored.read(tmp_path, "value"), [whole, other, whole[:2]])


def test_what_is_no_plain_data_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(BundleError, match="stage 'calls' cannot be kept: it holds a Generator, which is no plain data"):
        stored.write(tmp_path, "calls", [torch.Generator()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["", "{", '{"Trajectory": {"predictions": 1, "more": 2}}', '{"tensor": "9"}'])
def test_a_damaged_file_is_one_line(tmp_path, damage):
    stored.write(tmp_path, "stage", {"a": torch.ones(1)})
    (tmp_path / "stage.json").write_text(damage)
    with pytest.raises(BundleError, match=r"stage 'stage' in .* cannot be read"):
        stored.read(tmp_path, "stage")
    with pytest.raises(BundleError, match=r"stage 'other' in .* cannot be read"):
        stored.read(tmp_path, "other")
