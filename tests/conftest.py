"""Tiny real pipelines with random weights, built without any file; and the small trained ones that ship with cemq."""

from __future__ import annotations

import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from cemq.builtin.training import models as built
from cemq.pipelines.opening import locate, open_pipeline


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="Run the tests marked slow too.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_denoiser(heads: int = 2) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip


@torch.no_grad()
def predict(model: nn.Module, seed: int = 1) -> torch.Tensor:
    """Three images of sixteen tokens, so that the blocks run in integers and the embeddings weight-only."""
    torch.manual_seed(seed)
    sample = torch.randn(3, 4, 8, 8).to(model.pos_embed.proj.weight.dtype)
    return model(sample, timestep=torch.tensor([5, 50, 500]), class_labels=torch.tensor([1, 2, 3])).sample


def identical(left: nn.Module, right: nn.Module) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def run_python(code: str, *arguments: object, **variables: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tiny_vae(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=(4,),
        norm_num_groups=2,
        sample_size=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        mid_block_add_attention=False,
    ).eval()


def make_dit(scheduler=None, head_dim=16) -> DiTPipeline:
    """Class-conditional, guidance batched, learned sigma (the second half of the channels is thrown away)."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=head_dim, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = DiTPipeline(transformer=transformer.eval(), vae=tiny_vae(4), scheduler=scheduler or DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_flux() -> FluxPipeline:
    """Text to image; with true guidance it calls the denoiser twice a step, in the contexts cond and uncond."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    )  # fmt: skip
    tokenizer = built.tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipe = FluxPipeline(
        transformer=transformer.eval(), vae=tiny_vae(1), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModel(clip).eval(), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(), tokenizer_2=built.tokenizer(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


FLUX_CALL = {
    "height": 16, "width": 16, "max_sequence_length": 16, "negative_prompt": "thin", "true_cfg_scale": 2.0,
}  # fmt: skip


@pytest.fixture
def dit() -> DiTPipeline:
    return make_dit()


@pytest.fixture
def dit_multistep() -> DiTPipeline:
    return make_dit(DPMSolverMultistepScheduler())


@pytest.fixture
def flux() -> FluxPipeline:
    return make_flux()


@pytest.fixture
def digits() -> DiTPipeline:
    """The trained class-conditional pipeline that ships with cemq."""
    pipe = open_pipeline(locate("builtin:dit-digits").folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def dit_folder(tmp_path):
    folder = tmp_path / "pipeline"
    make_dit().save_pretrained(folder)
    return folder
