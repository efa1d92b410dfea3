"""What is added from outside the package: each in one file, found by its entry point."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.pipelines import make_dit

from cemq.errors import InputError
from cemq.predict.predictors import PREDICTORS, register_predictor, serving_matrix
from cemq.quantize.schemes import SCHEMES, Format, register_format

PREDICTOR = """
import numpy as np
import cemq

def mean_of_two(step, full, served):
    row = np.zeros(served.shape[1])
    row[list(full[:2])] = 1 / len(full[:2])
    return row

cemq.register_predictor("mean-of-two", mean_of_two)
"""
POLICY = """
from dataclasses import dataclass
from typing import ClassVar
import cemq
from cemq.runtime.policies import Serving

@cemq.register_policy
@dataclass(frozen=True, kw_only=True)
class EveryNth:
    name: ClassVar[str] = "every-nth"
    most_kept: ClassVar[int] = 1
    n: int = 2
    cache: str = "output"

    def begin(self, num_steps):
        return self

    def decide(self, call):
        return Serving((call.step - call.step % self.n,), (1.0,)) if call.step % self.n else None

    def keeps(self, call, *, served):
        return (call.step - call.step % self.n,)
"""
FORMAT = """
import torch
import cemq

class Nibbles:
    stored, packed = "uint8", 2

    def encode(self, values):
        scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
        codes = (values / scale).round().to(torch.int8) + 8
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8)
        return codes[:, ::2] * 16 + codes[:, 1::2], scale

    def decode(self, codes, scale):
        pairs = torch.stack([codes // 16, codes % 16], -1).reshape(len(codes), -1)
        return (pairs.float() - 8) * scale

cemq.register_format(cemq.Format(name="nibbles", bits=4, codec=Nibbles()))
"""
USE = """
import itertools, json, sys
from pathlib import Path
import numpy as np
import cemq
from cemq.bench import examine
from cemq.extensions import load_extensions

folder = Path(sys.argv[1])
found = {"extensions": load_extensions()}
rng = np.random.default_rng(0)
outputs = np.cumsum(rng.normal(size=(8, 40)), 0)
gram = outputs @ outputs.T / 40
prior = cemq.ErrorPrior(qq=gram, qv=gram, vv=gram, step_sizes=np.ones(8))
planned = cemq.plan_schedule(prior, 3, predictor="mean-of-two")
def cost(full):  # of each segment by itself, as the solver adds them up
    served = cemq.CacheSchedule(num_steps=8, full_steps=full, predictor="mean-of-two").served
    errors = served @ outputs - outputs
    ends = (*full[1:], 8)
    return sum(np.square(errors[start:end].sum(0)).mean() for start, end in zip(full, ends))
schedules = [(0, *rest) for count in (1, 2) for rest in itertools.combinations(range(1, 8), count)]
found["planned"] = list(planned.full_steps)
found["best"] = list(min(schedules, key=cost))
manifest = cemq.quantize_and_schedule(
    str(folder / "pipeline"), folder / "bundle", steps=6, samples=1, planning_samples=1, rounding="nearest",
    effort="quick", budget=3, predictor="mean-of-two", rectify="none", calib=str(folder / "labels.txt"), device="cpu",
)
found["predictors"] = sorted(set(manifest.schedule.predictors))
manifest = cemq.quantize_and_schedule(
    str(folder / "pipeline"), folder / "policy", steps=6, samples=1, rounding="nearest",
    calib=str(folder / "labels.txt"), device="cpu", policy="every-nth:n=3",
)
found["policy"], found["full_steps"] = manifest.policy, manifest.full_steps
manifest = cemq.quantize_and_schedule(
    str(folder / "pipeline"), folder / "format", steps=6, samples=1, planning_samples=1, scheme="w4a4-nibbles",
    effort="quick", budget=6, rectify="none", calib=str(folder / "labels.txt"), device="cpu",
)
found["bytes"], found["psnr_db"] = [manifest.model_bytes, manifest.reference_bytes], manifest.fidelity["psnr_db"]
pipe = cemq.from_pretrained(folder / "format", device="cpu")
layer = pipe.transformer.transformer_blocks[0].attn1.to_q
weight = layer.state_dict()["weight"]
found["layer"] = [type(layer).__name__, str(weight.dtype), list(weight.shape), str(layer.weight.dtype)]
cemq.generate(folder / "format", "1", seed=3, device="cpu").save(folder / "one.png")
rows = examine(quick=True)["rows"]
found["schemes"] = sorted({row["scheme"] for row in rows if "nibbles" in row["scheme"]})
found["states"] = sorted({state for row in rows if "nibbles" in row["scheme"]
                          for state in row["probes"].values()})
print(json.dumps(found))
"""


def installed(folder, name, **modules):
    """A folder that looks as if a package of this name had been installed to it."""
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    entries = "\n".join(f"{module} = {module}" for module in modules)
    (metadata / "entry_points.txt").write_text(f"[cemq.extensions]\n{entries}\n")
    return folder


def use(site, folder):
    (site / "use.py").write_text(USE)
    arguments = [
        sys.executable,
        "-W",
        "always",
        str(site / "use.py"),
        str(folder),
    ]  # its folder is the first of the path
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def test_an_installed_extension_is_planned_built_and_loaded(tmp_path):
    (tmp_path / "site").mkdir()
    site = installed(
        tmp_path / "site", "extra", mean_of_two=PREDICTOR, every_nth=POLICY, nibbles=FORMAT, broken="import nowhere"
    )
    make_dit().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "labels.txt").write_text("1\n2\n3\n")
    done = use(site, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["extensions"] == {
        "mean_of_two": "ok", "every_nth": "ok", "nibbles": "ok",
        "broken": "ModuleNotFoundError: No module named 'nowhere'",
    }  # fmt: skip
    assert "cemq: extension broken cannot be loaded" in done.stderr
    assert found["planned"] == found["best"]
    assert found["predictors"] == ["mean-of-two"]
    assert found["policy"] == {"name": "every-nth", "settings": {"n": 3, "cache": "output"}}
    assert found["full_steps"] == 2
    assert found["bytes"][0] < 0.65 * found["bytes"][1]  # what is no linear layer stays
    assert found["psnr_db"] > 10
    assert found["layer"] == ["CodedLinear", "torch.uint8", [32, 16], "torch.float32"]
    assert (tmp_path / "one.png").stat().st_size > 100
    assert found["schemes"] == ["w4a16-nibbles", "w4a4-nibbles"]
    assert found["states"] == ["ok"]


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("taylor1", lambda step, full, served: served[step - 1], "give a name of its own"),
        ("Two Words", lambda step, full, served: served[step - 1], "give a name of its own"),
        ("ahead", lambda step, full, served: np.eye(8)[min(step + 1, 7)], "of full-compute steps so far only"),
        ("endless", lambda step, full, served: served[step - 1] * np.nan, "finite weights"),
        ("failing", lambda step, full, served: served[99], "the rule fails on a run of 8 steps"),
    ],
)
def test_a_rule_that_is_no_predictor_is_refused(name, rule, message):
    before = dict(PREDICTORS)
    with pytest.raises(InputError, match=message):
        register_predictor(name, rule)
    assert before == PREDICTORS


def test_a_registered_predictor_serves_like_any_other():
    register_predictor("half-way", lambda step, full, served: 0.5 * served[step - 1] + 0.5 * served[full[0]])
    try:
        served = serving_matrix(5, (0, 2), ("half-way",) * 2)
        assert np.array_equal(served[3], np.eye(5)[2])
    finally:
        del PREDICTORS["half-way"]


class _Codec:
    stored, packed = "uint8", 1

    def __init__(self, encode=None, decode=None, **fields):
        self.encode = encode or (lambda values: ((values + 8).to(torch.uint8), torch.ones(len(values), 1)))
        self.decode = decode or (lambda codes, scale: codes.float() - 8)
        vars(self).update(fields)


@pytest.mark.parametrize(
    ("name", "codec", "message"),
    [
        ("x y", _Codec(), "a name of small letters and digits"),
        ("none", None, "give a codec"),
        ("floats", _Codec(encode=lambda v: (v, torch.ones(2, 1)), stored="float32"), "expected integers of float32"),
        ("halves", _Codec(packed=2), r"expected integers of uint8 \(2, 17\)"),
        ("far", _Codec(decode=lambda codes, scale: -codes.float()), "what is decoded is off by"),
    ],
)
def test_a_format_whose_codec_does_not_do_what_it_says_is_refused(name, codec, message):
    before = dict(SCHEMES)
    with pytest.raises(InputError, match=message):
        register_format(Format(name=name, bits=8, codec=codec))
    assert before == SCHEMES
