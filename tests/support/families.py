"""A tiny pipeline of every family, in its real diffusers class, with random weights and built without any file.

`FAMILIES` maps a name to a `Family`: how it is built, and what it is called with beside the prompt. The tests and
``families_page.py`` share them. Weights are random: they show that the plumbing is right, nothing of image quality.
"""

from __future__ import annotations

import atexit
import copy
import functools
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers as D
import numpy as np
import torch
import transformers as T
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

PROMPT = "a photo of a cat sitting on a mat"
OTHER_PROMPT = "a squirrel eating a burger"
NEGATIVE = "low quality, blurry"
VOCABULARY = 1000
STEPS = 6


@dataclass(frozen=True)
class Family:
    """``call`` is JSON and holds everything but the prompt; pictures in it are paths."""

    name: str
    build: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    conditions: tuple[str | int, str | int] = (PROMPT, OTHER_PROMPT)
    kind: str = "image"

    def pipeline(self) -> Any:
        pipe = self.build()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()  # a model made from a config is in training mode
        pipe.set_progress_bar_config(disable=True)
        return pipe


FAMILIES: dict[str, Family] = {}


def family_with(name: str, **call: Any) -> Family:
    return replace(FAMILIES[name], call=FAMILIES[name].call | call)


def family(kind: str = "image", conditions: tuple = (PROMPT, OTHER_PROMPT), **call: Any) -> Callable:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        FAMILIES[build.__name__] = Family(build.__name__, build, call, conditions, kind)
        return build

    return register


@contextmanager
def small_hidream() -> Any:
    """HiDream enlarges every picture to an area that is fixed in its constructor; make that area small."""
    kind = D.HiDreamImagePipeline
    init = kind.__init__

    @functools.wraps(init)
    def smaller(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.default_sample_size = 8

    kind.__init__ = smaller
    try:
        yield
    finally:
        kind.__init__ = init


@functools.cache
def picture(size: int = 16) -> str:
    """The path of a small PNG."""
    from PIL import Image

    folder = tempfile.TemporaryDirectory(prefix="cemq-tiny-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return str(path)


def seeded(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A model with the same random weights every time."""
    torch.manual_seed(0)
    return build(*args, **kwargs).eval()


# Tokenizers from explicit tables: those that `train_new_from_iterator` makes differ from process to process.

_TEXTS = (
    f"{PROMPT} {OTHER_PROMPT} {NEGATIVE} A painting dance monkey system user assistant think Describe the image by "
    "detailing color shape size texture quantity text spatial relationships objects and background"
)
_WORDS = sorted(set(_TEXTS.replace(",", "").split()))
_PRINTABLE = [chr(code) for code in range(33, 127)]
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_USER_TEXT_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def _merges(words: list[list[str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """BPE merges by which each word, given as its symbols, becomes one token; and the tokens on the way."""
    pairs: dict[tuple[str, str], None] = {}
    tokens: dict[str, None] = {}
    for symbols in words:
        made = symbols[0]
        for symbol in symbols[1:]:
            pairs[made, symbol] = None
            made += symbol
            tokens[made] = None
    return list(pairs), list(tokens)


def _numbered(*groups: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(token for group in groups for token in group))}


def tokenizer(kind: str, length: int = 77) -> Any:
    """One of clip, t5, qwen, llama, gemma, bert; every word of the prompts here is one token."""
    made = copy.deepcopy(_tokenizer(kind))
    made.model_max_length = length
    return made


@functools.cache
def _tokenizer(kind: str) -> Any:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    lower = sorted({word.lower() for word in _WORDS})
    if kind == "clip":
        merges, tokens = _merges([[*word[:-1], word[-1] + "</w>"] for word in lower])
        ends = [symbol + "</w>" for symbol in symbols]
        return T.CLIPTokenizer(
            vocab=_numbered(["<|startoftext|>", "<|endoftext|>"], symbols, ends, tokens), merges=merges
        )
    if kind == "t5":
        scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -3.0)]
        scores += [("▁" + word, -1.0) for word in _WORDS]
        scores += [(char, -5.0) for char in _PRINTABLE if char not in _WORDS]
        return T.T5TokenizerFast(vocab=scores, extra_ids=0)
    if kind == "qwen":
        space = "Ġ"
        merges, tokens = _merges([list(word) for word in _WORDS])
        merges += [(space, word) for word in _WORDS]
        spaced = [space + word for word in _WORDS]
        made = T.Qwen2Tokenizer(vocab=_numbered(["<|endoftext|>"], symbols, tokens, spaced), merges=merges)
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template = _CHATML
        return made
    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        return T.BertTokenizer(vocab=_numbered(special, lower, _PRINTABLE, ["##" + char for char in _PRINTABLE]))
    merges, tokens = _merges([["▁", *word] for word in _WORDS])
    raw = [f"<0x{code:02X}>" for code in range(256)]
    if kind == "gemma":
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
        return T.GemmaTokenizer(vocab=_numbered(special, raw, ["▁"], _PRINTABLE, tokens), merges=merges)
    made = T.LlamaTokenizer(vocab=_numbered(["<unk>", "<s>", "</s>"], raw, ["▁"], _PRINTABLE, tokens), merges=merges)
    made.pad_token = made.eos_token
    return made


# Text encoders and autoencoders that several families share.


def t5(kind: Any = T.T5EncoderModel, width: int = 32) -> Any:
    config = kind.config_class(
        d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=VOCABULARY, dropout_rate=0.0,
        relative_attention_num_buckets=8, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return seeded(kind, config)


def umt5() -> Any:
    return t5(T.UMT5EncoderModel)


def clip(kind: Any = T.CLIPTextModel, positions: int = 77) -> Any:
    config = T.CLIPTextConfig(  # eos_token_id=2 would mean another way of pooling
        bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=32, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=2, vocab_size=VOCABULARY, projection_dim=32, max_position_embeddings=positions,
    )  # fmt: skip
    return seeded(kind, config)


def projecting_clip(positions: int = 77) -> Any:
    return clip(T.CLIPTextModelWithProjection, positions)


def gemma2() -> Any:
    config = T.Gemma2Config(
        head_dim=4, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2,
        num_key_value_heads=2, vocab_size=VOCABULARY, sliding_window=64,
    )  # fmt: skip
    return seeded(T.Gemma2Model, config)


def llama(kind: Any = T.LlamaModel, layers: int = 2) -> Any:
    config = T.LlamaConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=2, hidden_size=16, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=layers, vocab_size=VOCABULARY,
    )  # fmt: skip
    return seeded(kind, config)


def qwen3(kind: Any) -> Any:
    config = T.Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=512,
    )  # fmt: skip
    return seeded(kind, config)


def autoencoder(channels: int = 4, blocks: tuple[int, ...] = (4, 4), norm_groups: int = 2, **more: Any) -> Any:
    """Each block beyond the first halves height and width."""
    return seeded(
        D.AutoencoderKL, in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks), up_block_types=("UpDecoderBlock2D",) * len(blocks),
        layers_per_block=1, norm_num_groups=norm_groups, sample_size=32, **more,
    )  # fmt: skip


def flux_autoencoder(channels: int = 1) -> Any:
    return autoencoder(
        channels, (4,), 1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035
    )


def flow_euler(**settings: Any) -> Any:
    return D.FlowMatchEulerDiscreteScheduler(**settings)


# The families.


@family(conditions=(1, 0), guidance_scale=4.0)
def dit() -> Any:
    transformer = seeded(
        D.DiTTransformer2DModel, sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8,
        num_attention_heads=2, in_channels=4, out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return D.DiTPipeline(transformer=transformer, vae=autoencoder(), scheduler=D.DDIMScheduler())


PIXART_CALL = {
    "negative_prompt": NEGATIVE, "guidance_scale": 4.5, "use_resolution_binning": False, "max_sequence_length": 32,
    "clean_caption": False, "height": 16, "width": 16,
}  # fmt: skip


def _pixart(kind: Any) -> Any:
    transformer = seeded(
        D.PixArtTransformer2DModel, sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8,
        num_attention_heads=3, caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8,
        attention_bias=True, num_embeds_ada_norm=1000, norm_type="ada_norm_single",
    )  # fmt: skip
    return kind(
        transformer=transformer, vae=autoencoder(), scheduler=D.DPMSolverMultistepScheduler(), text_encoder=t5(),
        tokenizer=tokenizer("t5", 32),
    )  # fmt: skip


@family(**PIXART_CALL)
def pixart_alpha() -> Any:
    return _pixart(D.PixArtAlphaPipeline)


@family(**PIXART_CALL)
def pixart_sigma() -> Any:
    return _pixart(D.PixArtSigmaPipeline)


def flux_transformer(guidance: bool = True, **more: Any) -> Any:
    settings = {
        "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
    }  # fmt: skip
    return seeded(D.FluxTransformer2DModel, guidance_embeds=guidance, **settings | more)


def flux_parts(transformer: Any, scheduler: Any = None) -> dict[str, Any]:
    return {
        "scheduler": scheduler or flow_euler(shift=3.0), "transformer": transformer, "vae": flux_autoencoder(),
        "text_encoder": clip(), "tokenizer": tokenizer("clip"),
        "text_encoder_2": t5(), "tokenizer_2": tokenizer("t5", 32),
    }  # fmt: skip


FLUX_CALL = {"height": 16, "width": 16, "max_sequence_length": 32}


@family(guidance_scale=3.5, **FLUX_CALL)
def flux() -> Any:
    """Guidance-distilled, one call a step."""
    return D.FluxPipeline(**flux_parts(flux_transformer(), flow_euler(shift=3.0, use_dynamic_shifting=True)))


@family(negative_prompt=NEGATIVE, true_cfg_scale=2.0, **FLUX_CALL)
def flux_true_cfg() -> Any:
    """Two calls a step, in the contexts cond and uncond."""
    return flux()


@family(image=picture(), strength=0.7, guidance_scale=3.5, **FLUX_CALL)
def flux_img2img() -> Any:
    return D.FluxImg2ImgPipeline(**flux_parts(flux_transformer()))


@family(image=picture(), guidance_scale=3.5, max_area=256, _auto_resize=False, **FLUX_CALL)
def flux_kontext() -> Any:
    return D.FluxKontextPipeline(**flux_parts(flux_transformer()))


@family(control_image=picture(), controlnet_conditioning_scale=0.8, guidance_scale=3.5, **FLUX_CALL)
def flux_controlnet() -> Any:
    torch.manual_seed(1)
    controlnet = D.FluxControlNetModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    _randomize(controlnet)
    return D.FluxControlNetPipeline(**flux_parts(flux_transformer()), controlnet=controlnet)


def _randomize(controlnet: Any) -> None:
    """Its last layers are zero in a new ControlNet, so that it would change nothing."""
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)


SD3_CALL = {
    "negative_prompt": NEGATIVE, "guidance_scale": 5.0, "height": 8, "width": 8, "max_sequence_length": 32,
}  # fmt: skip
SD3_TRANSFORMER = {
    "sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 64,
    "out_channels": 4, "pos_embed_max_size": 16,
}  # fmt: skip


def sd3_parts() -> dict[str, Any]:
    return {
        "scheduler": flow_euler(shift=3.0), "transformer": seeded(D.SD3Transformer2DModel, **SD3_TRANSFORMER),
        "vae": flux_autoencoder(4),
        "text_encoder": projecting_clip(), "tokenizer": tokenizer("clip"),
        "text_encoder_2": projecting_clip(), "tokenizer_2": tokenizer("clip"),
        "text_encoder_3": t5(), "tokenizer_3": tokenizer("t5", 32),
    }  # fmt: skip


@family(**SD3_CALL)
def sd3() -> Any:
    return D.StableDiffusion3Pipeline(**sd3_parts())


@family(control_image=picture(8), controlnet_conditioning_scale=0.8, **SD3_CALL)
def sd3_controlnet() -> Any:
    torch.manual_seed(1)
    controlnet = D.SD3ControlNetModel(**SD3_TRANSFORMER | {"num_layers": 1})
    _randomize(controlnet)
    return D.StableDiffusion3ControlNetPipeline(**sd3_parts(), controlnet=controlnet)


@family(negative_prompt=NEGATIVE, guidance_scale=7.5, height=32, width=32)
def sd15() -> Any:
    unet = seeded(
        D.UNet2DConditionModel, block_out_channels=(4, 8), layers_per_block=1, sample_size=16, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, norm_num_groups=2,
        attention_head_dim=4,
    )  # fmt: skip
    scheduler = D.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return D.StableDiffusionPipeline(
        unet=unet, vae=autoencoder(), text_encoder=clip(), tokenizer=tokenizer("clip"), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@family(negative_prompt=NEGATIVE, guidance_scale=5.0, height=32, width=32)
def sdxl() -> Any:
    unet = seeded(
        D.UNet2DConditionModel, block_out_channels=(4, 8), layers_per_block=1, sample_size=16, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64, norm_num_groups=2,
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    return D.StableDiffusionXLPipeline(
        unet=unet, vae=autoencoder(), scheduler=D.EulerDiscreteScheduler(), text_encoder=clip(),
        tokenizer=tokenizer("clip"), text_encoder_2=projecting_clip(), tokenizer_2=tokenizer("clip"),
        add_watermarker=False,
    )  # fmt: skip


def _wan_transformer(seed: int) -> Any:
    torch.manual_seed(seed)
    return D.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=64, ffn_dim=32, num_layers=3, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip


def _wan(**more: Any) -> Any:
    vae = seeded(
        D.AutoencoderKLWan, base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    scheduler = D.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return D.WanPipeline(
        tokenizer=tokenizer("t5", 32), text_encoder=umt5(), vae=vae, transformer=_wan_transformer(0),
        scheduler=scheduler, **more,
    )  # fmt: skip


WAN_CALL = {
    "negative_prompt": NEGATIVE, "guidance_scale": 5.0, "height": 16, "width": 16, "num_frames": 5,
    "max_sequence_length": 16,
}  # fmt: skip


@family(kind="video", **WAN_CALL)
def wan() -> Any:
    return _wan()


@family(kind="video", guidance_scale_2=4.0, **WAN_CALL)
def wan22() -> Any:
    """Two denoisers: one for the noisy steps, one for the rest."""
    return _wan(transformer_2=_wan_transformer(1), boundary_ratio=0.8)


@family(
    kind="video", guidance_scale=6.0, height=16, width=16, num_frames=5, max_sequence_length=16,
    prompt_template={"template": "{}", "crop_start": 0},
)  # fmt: skip
def hunyuan_video() -> Any:
    transformer = seeded(
        D.HunyuanVideoTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
        num_layers=2, num_single_layers=2, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=32, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = seeded(
        D.AutoencoderKLHunyuanVideo, in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.476986,
    )  # fmt: skip
    return D.HunyuanVideoPipeline(
        text_encoder=llama(layers=3), tokenizer=tokenizer("llama", 64), transformer=transformer, vae=vae,
        scheduler=flow_euler(shift=7.0), text_encoder_2=clip(), tokenizer_2=tokenizer("clip"),
    )  # fmt: skip


@family(negative_prompt=NEGATIVE, guidance_scale=5.0, use_resolution_binning=False, height=16, width=16)
def hunyuan_dit() -> Any:
    transformer = seeded(  # which fixes both text lengths, 77 and 256
        D.HunyuanDiT2DModel, sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        in_channels=4, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        learn_sigma=True, activation_fn="gelu-approximate", text_len=77, text_len_t5=256,
    )  # fmt: skip
    bert = T.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, vocab_size=VOCABULARY,
        max_position_embeddings=128,
    )  # fmt: skip
    return D.HunyuanDiTPipeline(
        vae=autoencoder(), text_encoder=seeded(T.BertModel, bert), tokenizer=tokenizer("bert"),
        transformer=transformer, scheduler=D.DDPMScheduler(prediction_type="v_prediction"), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, text_encoder_2=t5(), tokenizer_2=tokenizer("t5", 256),
    )  # fmt: skip


@family(
    kind="video", negative_prompt=NEGATIVE, guidance_scale=7.5, height=16, width=16, video_length=2,
    clean_caption=False,
)  # fmt: skip
def latte() -> Any:
    transformer = seeded(
        D.LatteTransformer3DModel, sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8,
        num_attention_heads=3, caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        video_length=2,
    )  # fmt: skip
    return D.LattePipeline(
        tokenizer=tokenizer("t5", 120), text_encoder=t5(), vae=autoencoder(), transformer=transformer,
        scheduler=D.DDIMScheduler(),
    )  # fmt: skip


@family(
    kind="video", negative_prompt=NEGATIVE, guidance_scale=6.0, height=16, width=16, num_frames=9,
    max_sequence_length=16,
)  # fmt: skip
def cogvideox() -> Any:
    transformer = seeded(
        D.CogVideoXTransformer3DModel, num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=2, text_embed_dim=32, num_layers=3, sample_width=2, sample_height=2, sample_frames=9,
        patch_size=2, temporal_compression_ratio=4, max_text_seq_length=16,
    )  # fmt: skip
    vae = seeded(
        D.AutoencoderKLCogVideoX, in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = D.CogVideoXDPMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    return D.CogVideoXPipeline(
        tokenizer=tokenizer("t5", 32), text_encoder=t5(), vae=vae, transformer=transformer, scheduler=scheduler
    )


@family(
    kind="video", negative_prompt=NEGATIVE, guidance_scale=3.0, height=32, width=32, num_frames=9,
    max_sequence_length=16,
)  # fmt: skip
def ltx() -> Any:
    transformer = seeded(
        D.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, patch_size=1, patch_size_t=1,
        num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, num_layers=3, caption_channels=32,
    )  # fmt: skip
    vae = seeded(
        D.AutoencoderKLLTXVideo, in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1, 1, 1, 1), timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return D.LTXPipeline(
        scheduler=flow_euler(), vae=vae, text_encoder=t5(), tokenizer=tokenizer("t5", 32), transformer=transformer
    )


@family(negative_prompt=NEGATIVE, true_cfg_scale=4.0, height=32, width=32, max_sequence_length=64)
def qwenimage() -> Any:
    transformer = seeded(
        D.QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=3,
        attention_head_dim=16, num_attention_heads=3, joint_attention_dim=16, guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = seeded(
        D.AutoencoderKLQwenImage, base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    config = T.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rope_theta": 1000000.0,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        },
        vision_start_token_id=990, vision_end_token_id=991, vision_token_id=992, image_token_id=993,
        video_token_id=994,
    )  # fmt: skip
    return D.QwenImagePipeline(
        scheduler=flow_euler(), vae=vae, text_encoder=seeded(T.Qwen2_5_VLForConditionalGeneration, config),
        tokenizer=tokenizer("qwen", 1024), transformer=transformer,
    )  # fmt: skip


@family(negative_prompt=NEGATIVE, guidance_scale=3.0, height=32, width=32, max_sequence_length=32)
def z_image() -> Any:
    transformer = seeded(
        D.ZImageTransformer2DModel, all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=3,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=16, rope_theta=256.0,
        t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # zero or uninitialised, by version
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    return D.ZImagePipeline(
        scheduler=flow_euler(shift=3.0), vae=autoencoder(16, (8, 8), 4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=qwen3(T.Qwen3Model), tokenizer=tokenizer("qwen", 64), transformer=transformer,
    )  # fmt: skip


def flux2_parts(guidance: bool) -> dict[str, Any]:
    transformer = seeded(
        D.Flux2Transformer2DModel, patch_size=1, in_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4], guidance_embeds=guidance,
    )  # fmt: skip
    vae = seeded(
        D.AutoencoderKLFlux2, sample_size=32, in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,), layers_per_block=1, latent_channels=1,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return {"scheduler": flow_euler(shift=3.0), "vae": vae, "transformer": transformer}


FLUX2_CALL = {
    "guidance_scale": 4.0, "height": 16, "width": 16, "max_sequence_length": 32, "text_encoder_out_layers": [1],
}  # fmt: skip


@family(**FLUX2_CALL)
def flux2() -> Any:
    config = T.Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 37,
            "max_position_embeddings": 1024, "num_attention_heads": 4, "num_hidden_layers": 1,
            "num_key_value_heads": 2, "sliding_window": None, "head_dim": 4,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 37, "image_size": 30, "patch_size": 6, "num_channels": 3,
        },
        image_token_index=990, vision_feature_layer=-1,
    )  # fmt: skip
    # published with a PixtralProcessor, which needs torchvision; the pipeline only applies its chat template
    processor = tokenizer("llama", 512)
    processor.chat_template = _USER_TEXT_ONLY
    return D.Flux2Pipeline(
        **flux2_parts(True), text_encoder=seeded(T.Mistral3ForConditionalGeneration, config), tokenizer=processor
    )


@family(**FLUX2_CALL)
def flux2_klein() -> Any:
    return D.Flux2KleinPipeline(
        **flux2_parts(False), text_encoder=qwen3(T.Qwen3ForCausalLM), tokenizer=tokenizer("qwen", 64)
    )


@family(
    negative_prompt=NEGATIVE, guidance_scale=4.5, height=32, width=32, max_sequence_length=32,
    complex_human_instruction=None, use_resolution_binning=False,
)  # fmt: skip
def sana() -> Any:
    transformer = seeded(
        D.SanaTransformer2DModel, patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8, sample_size=32,
    )  # fmt: skip
    vae = seeded(
        D.AutoencoderDC, in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = D.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return D.SanaPipeline(
        tokenizer=tokenizer("gemma", 64), text_encoder=gemma2(), vae=vae, transformer=transformer, scheduler=scheduler
    )


@family(  # its default system prompt would fill the sequence and push the prompt out
    negative_prompt=NEGATIVE, guidance_scale=4.0, height=64, width=64, max_sequence_length=48, system_prompt="a"
)
def lumina2() -> Any:
    transformer = seeded(
        D.Lumina2Transformer2DModel, sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=3,
        num_refiner_layers=1, num_attention_heads=1, num_kv_heads=1, multiple_of=16, norm_eps=1e-5,
        scaling_factor=1.0, axes_dim_rope=[4, 2, 2], axes_lens=[300, 64, 64], cap_feat_dim=8,
    )  # fmt: skip
    return D.Lumina2Pipeline(
        transformer=transformer, scheduler=flow_euler(shift=6.0), vae=flux_autoencoder(4), text_encoder=gemma2(),
        tokenizer=tokenizer("gemma", 256),
    )  # fmt: skip


@family(
    kind="video", negative_prompt=NEGATIVE, guidance_scale=4.5, height=16, width=16, num_frames=7,
    max_sequence_length=16,
)  # fmt: skip
def mochi() -> Any:
    transformer = seeded(
        D.MochiTransformer3DModel, patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=3,
        pooled_projection_dim=16, in_channels=12, out_channels=None, qk_norm="rms_norm", text_embed_dim=32,
        time_embed_dim=4, activation_fn="swiglu", max_sequence_length=16,
    )  # fmt: skip
    vae = seeded(
        D.AutoencoderKLMochi, latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    return D.MochiPipeline(
        scheduler=flow_euler(invert_sigmas=True), vae=vae, text_encoder=t5(), tokenizer=tokenizer("t5", 32),
        transformer=transformer,
    )  # fmt: skip


@family(negative_prompt=NEGATIVE, guidance_scale=5.0, height=16, width=16, max_sequence_length=32)
def hidream() -> Any:
    transformer = seeded(
        D.HiDreamImageTransformer2DModel, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        num_single_layers=2, attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64,
        num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32),
        llama_layers=(0, 1, 1, 1),
    )  # fmt: skip
    fourth = llama(T.LlamaForCausalLM)
    fourth.generation_config.pad_token_id = 2
    with small_hidream():
        return D.HiDreamImagePipeline(
            scheduler=flow_euler(shift=3.0), vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=projecting_clip(128), tokenizer=tokenizer("clip"),
            text_encoder_2=projecting_clip(128), tokenizer_2=tokenizer("clip"),
            text_encoder_3=t5(), tokenizer_3=tokenizer("t5", 128),
            text_encoder_4=fourth, tokenizer_4=tokenizer("llama", 64), transformer=transformer,
        )  # fmt: skip


@family(negative_prompt=NEGATIVE, guidance_scale=5.0, height=16, width=16, max_sequence_length=32)
def chroma() -> Any:
    transformer = seeded(
        D.ChromaTransformer2DModel, patch_size=1, in_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16,
    )  # fmt: skip
    return D.ChromaPipeline(
        scheduler=flow_euler(), vae=flux_autoencoder(), text_encoder=t5(), tokenizer=tokenizer("t5", 32),
        transformer=transformer,
    )  # fmt: skip


@family(negative_prompt=NEGATIVE, guidance_scale=3.5, height=16, width=16, max_sequence_length=32)
def auraflow() -> Any:
    transformer = seeded(
        D.AuraFlowTransformer2DModel, sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2,
        num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=32, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    return D.AuraFlowPipeline(
        tokenizer=tokenizer("t5", 32), text_encoder=umt5(), vae=autoencoder(), transformer=transformer,
        scheduler=flow_euler(shift=1.73),
    )  # fmt: skip


@family(kind="audio", negative_prompt=NEGATIVE, guidance_scale=7.0, audio_end_in_s=1.5)
def stable_audio() -> Any:
    transformer = seeded(
        D.StableAudioDiTModel, sample_size=4, in_channels=3, num_layers=3, attention_head_dim=4,
        num_attention_heads=4, num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=4,
        time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=4,
    )  # fmt: skip
    vae = seeded(
        D.AutoencoderOobleck, encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3,
        decoder_input_channels=3, audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    projection = seeded(StableAudioProjectionModel, text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32)
    # published with CosineDPMSolverMultistep, which needs torchsde; this is its deterministic cousin
    scheduler = D.EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    return D.StableAudioPipeline(
        vae=vae, text_encoder=t5(), projection_model=projection, tokenizer=tokenizer("t5", 25),
        transformer=transformer, scheduler=scheduler,
    )  # fmt: skip
