from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel
from torch import nn

from cemq.families import FAMILY_FULL_PRECISION, full_precision_patterns
from cemq.quantize import CemqConfig


def kept_linears(model):
    config = CemqConfig("w4a8", full_precision=full_precision_patterns(type(model).__name__))
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and config.scheme_for(n) is None}


def test_every_family_is_a_class_of_diffusers():
    import diffusers

    assert all(hasattr(diffusers, name) for name in FAMILY_FULL_PRECISION)


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
        "condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.linear_2", "proj_out",
    }  # fmt: skip
