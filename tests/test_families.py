from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel
from support.checks import CHECKS
from support.families import FAMILIES
from torch import nn

from cemq.errors import ModelError
from cemq.families import FAMILY_FULL_PRECISION, FRAME_RATES, full_precision_patterns
from cemq.pipelines.opening import denoisers
from cemq.quantize import CemqConfig

# One of every kind by default; the others with --slow, and `tests/families_page.py` runs them all.
FEW = ("dit", "flux", "sd15", "wan22")
PACKED = ("flux", "stable_audio")
COMPILED = ("dit", "wan22")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # diffusers' own names, in Chroma and the ControlNets
    "ignore:In CPU autocast",  # Mochi asks for float32
)


# What is refused, and with which words.
REFUSED = {
    ("sd15", "residual cache"): "DownBlock2D returns a shape that it is not given",
    ("sdxl", "residual cache"): "DownBlock2D returns a shape that it is not given",
    ("sd15", "module cache"): "DownBlock2D has no attention or feed-forward module that cemq knows by name",
    ("sdxl", "module cache"): "DownBlock2D has no attention or feed-forward module that cemq knows by name",
}


def cells(column, quick):
    for name in FAMILIES:
        yield pytest.param(name, column, marks=[] if name in quick else [pytest.mark.slow], id=f"{name}-{column}")


@pytest.mark.parametrize(
    ("name", "column"),
    [
        *cells("output cache", FAMILIES),
        *cells("residual cache", FEW),
        *cells("module cache", FEW),
        *cells("W8A8", ("hunyuan_dit", "z_image")),
        *cells("W4A8", PACKED),
        *cells("bundle", ("stable_audio", "wan22")),
        *cells("offload", FEW),
        *cells("compile", COMPILED),
    ],
)
def test_every_family_keeps_every_promise(name, column):
    refusal = REFUSED.get((name, column))
    with pytest.raises(ModelError, match=refusal) if refusal else nullcontext():
        CHECKS[column](FAMILIES[name])


def test_the_page_of_families_is_whole():
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    table = page.split("<!-- table")[1].split("<!-- end")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    assert rows[0][-len(CHECKS) :] == list(CHECKS)
    assert [row[0] for row in rows[2:]] == list(FAMILIES)
    assert all(cell and not cell.startswith("FAILED") for row in rows for cell in row)


def kept_linears(model):
    config = CemqConfig("w4a8", full_precision=full_precision_patterns(type(model).__name__))
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and config.scheme_for(n) is None}


def test_every_family_is_a_class_of_diffusers():
    import diffusers

    assert all(hasattr(diffusers, name) for name in (*FAMILY_FULL_PRECISION, *FRAME_RATES))


def test_every_pattern_of_a_family_keeps_a_layer():
    unused = {name: set(patterns) for name, patterns in FAMILY_FULL_PRECISION.items()}
    for family in FAMILIES.values():
        for _, denoiser in denoisers(family.pipeline()):
            patterns = unused.get(type(denoiser).__name__, set())
            patterns -= {
                pattern
                for pattern in patterns
                if any(fnmatchcase(n, pattern) for n, m in denoiser.named_modules() if isinstance(m, nn.Linear))
            }
    assert unused.pop("WanTransformer3DModel") <= {"condition_embedder.image_embedder*"}  # image to video only
    assert not any(unused.values())


def test_the_ends_of_a_denoiser_stay_in_full_precision_and_its_blocks_do_not():
    qwen = QwenImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    assert kept_linears(qwen) == {"img_in", "txt_in", "norm_out.linear", "proj_out"}
    wan = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=1,
    )  # fmt: skip
    assert kept_linears(wan) == {
        "condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.linear_2",
        "condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2", "proj_out",
    }  # fmt: skip
