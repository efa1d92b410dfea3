"""ImageReward of a small model with random weights, named as in the file of its release."""

import math

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from cemq.errors import InputError
from cemq.evaluation.compare import measure_fidelity
from cemq.evaluation.image_reward import FILE, FOLDER
from cemq.evaluation.scores import score
from cemq.pipelines.batches import Batch
from cemq.runtime.runner import Outcome

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "cat", "dog"]
WORDS += [f"##{word}" for word in WORDS[5:]]
WIDTH, TEXT_WIDTH, LAYERS, PATCH, SIDE = 128, 64, 2, 8, 32
PROMPTS = ("a cat", "Zebra dog, no cat", "word " * 40)  # the last one is longer than what is read of it
# of `pictures()` and PROMPTS, by the release's own VisionTransformer, BertModel, MLP and transform at these sizes
# (image-reward 1.5 with timm 0.6.13, transformers 4.44.2 and torch 2.13.0), with `weights_of_the_release()` in them
RELEASED = (0.0970759, -0.2200165, 0.7479525)


def shapes():
    """Of every weight that counts, by its name in the release."""

    def layer(name, made, given):
        return {f"{name}.weight": (made, given), f"{name}.bias": (made,)}

    def norm(name, width=TEXT_WIDTH):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    eye, text = "blip.visual_encoder.", "blip.text_encoder."
    found = {f"{eye}cls_token": (1, 1, WIDTH), f"{eye}pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH)}
    found |= {f"{eye}patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), f"{eye}patch_embed.proj.bias": (WIDTH,)}
    for place in (f"{eye}blocks.{number}" for number in range(LAYERS)):
        found |= norm(f"{place}.norm1", WIDTH) | norm(f"{place}.norm2", WIDTH)
        found |= layer(f"{place}.attn.qkv", 3 * WIDTH, WIDTH) | layer(f"{place}.attn.proj", WIDTH, WIDTH)
        found |= layer(f"{place}.mlp.fc1", 4 * WIDTH, WIDTH) | layer(f"{place}.mlp.fc2", WIDTH, 4 * WIDTH)
    found |= norm(f"{eye}norm", WIDTH)
    found[f"{text}embeddings.word_embeddings.weight"] = (len(WORDS) + 2, TEXT_WIDTH)
    found[f"{text}embeddings.position_embeddings.weight"] = (40, TEXT_WIDTH)
    found |= norm(f"{text}embeddings.LayerNorm")
    for place in (f"{text}encoder.layer.{number}" for number in range(LAYERS)):
        for attention, seen in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            found |= layer(f"{place}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            found |= layer(f"{place}.{attention}.self.key", TEXT_WIDTH, seen)
            found |= layer(f"{place}.{attention}.self.value", TEXT_WIDTH, seen)
            found |= layer(f"{place}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            found |= norm(f"{place}.{attention}.output.LayerNorm")
        found |= layer(f"{place}.intermediate.dense", 96, TEXT_WIDTH) | layer(f"{place}.output.dense", TEXT_WIDTH, 96)
        found |= norm(f"{place}.output.LayerNorm")
    sizes = (TEXT_WIDTH, 1024, 128, 64, 16, 1)
    for place, given, made in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        found |= layer(f"mlp.layers.{place}", made, given)
    return found


def weights_of_the_release():
    """Seeds decide; what is multiplied by something has its size, so that everything matters."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, shape in shapes().items():
        drawn = torch.randn(shape, generator=generator)
        found[name] = drawn / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1 * drawn
        if "norm" in name.lower() and name.endswith("weight"):
            found[name] += 1
    return found


def pictures():
    """Of two shapes: reduced and enlarged, with something to cut off."""
    draw = np.random.default_rng(0)
    return draw.random((3, 40, 90, 3)).astype(np.float32), draw.random((3, 30, 24, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def weights():
    return weights_of_the_release()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder and a cache of the Hub with nothing in them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def put_in_cache(home, repository, name):
    """Where a file belongs that the Hub's cache is to have."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40) / name


def put_words(home):
    put_in_cache(home, "bert-base-uncased", "vocab.txt").write_text("\n".join(WORDS))


def put_weights(home, weights):
    path = home / FOLDER.removeprefix("~/") / FILE
    path.parent.mkdir(parents=True)
    torch.save(weights, path)


def attend(queries, keys, values, heads, mask=None):
    def split(tokens):
        return tokens.unflatten(-1, (heads, -1)).transpose(0, 1)

    chances = split(queries) @ split(keys).transpose(1, 2) / math.sqrt(queries.shape[-1] // heads)
    if mask is not None:
        chances = chances.masked_fill(~mask, -torch.inf)
    return (chances.softmax(-1) @ split(values)).transpose(0, 1).flatten(1)


def reward_by_hand(weights, image, ids):
    """Of one picture and the tokens of its prompt, padding left out: nothing looks at it."""

    def linear(name, x):
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x, eps):
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    middle = Image.fromarray((image * 255).round().astype(np.uint8))
    ratio = SIDE / min(middle.size)
    middle = middle.resize(tuple(int(ratio * each + 1e-9) for each in middle.size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(middle)).float() / 255
    top, left = (round((each - SIDE) / 2) for each in pixels.shape[:2])
    pixels = pixels[top : top + SIDE, left : left + SIDE]
    pixels = (pixels - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    eye, text = "blip.visual_encoder", "blip.text_encoder"
    kernel, bias = (weights[f"{eye}.patch_embed.proj.{name}"] for name in ("weight", "bias"))
    patches = pixels.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(0, 1).flatten(1)  # colour, row, column
    seen = torch.cat([weights[f"{eye}.cls_token"][0], patches @ kernel.flatten(1).T + bias])
    seen = seen + weights[f"{eye}.pos_embed"][0]
    for place in (f"{eye}.blocks.{number}" for number in range(LAYERS)):
        queries, keys, values = linear(f"{place}.attn.qkv", norm(f"{place}.norm1", seen, 1e-6)).chunk(3, -1)
        seen = seen + linear(f"{place}.attn.proj", attend(queries, keys, values, WIDTH // 64))
        seen = seen + linear(
            f"{place}.mlp.fc2", functional.gelu(linear(f"{place}.mlp.fc1", norm(f"{place}.norm2", seen, 1e-6)))
        )
    seen = norm(f"{eye}.norm", seen, 1e-6)
    read = weights[f"{text}.embeddings.word_embeddings.weight"][ids]
    read = read + weights[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    read = norm(f"{text}.embeddings.LayerNorm", read, 1e-12)
    for place in (f"{text}.encoder.layer.{number}" for number in range(LAYERS)):
        for name, other in (("attention", None), ("crossattention", seen)):
            given = read if other is None else other
            parts = (linear(f"{place}.{name}.self.{part}", x) for part, x in
                     (("query", read), ("key", given), ("value", given)))  # fmt: skip
            more = linear(f"{place}.{name}.output.dense", attend(*parts, TEXT_WIDTH // 64))
            read = norm(f"{place}.{name}.output.LayerNorm", read + more, 1e-12)
        more = linear(f"{place}.output.dense", functional.gelu(linear(f"{place}.intermediate.dense", read)))
        read = norm(f"{place}.output.LayerNorm", read + more, 1e-12)
    worth = read[0]
    for place in (0, 2, 4, 6, 7):
        worth = linear(f"mlp.layers.{place}", worth)
    return (worth.item() - 0.16717362830052426) / 1.0333394966054072


def ids_of(prompt):
    """By hand: greedy WordPiece of the few words there are, at most 35 tokens with the first and the last."""
    pieces = []
    for word in prompt.lower().replace(",", " , ").split():
        if word == ",":
            pieces.append("[UNK]")
        else:
            pieces += [word] if word in WORDS else [word[0], *(f"##{each}" for each in word[1:])]
    return [WORDS.index(piece) for piece in ("[CLS]", *pieces[:33], "[SEP]")]


def by_hand(weights, images, prompts=PROMPTS):
    return [reward_by_hand(weights, image, ids_of(prompt)) for image, prompt in zip(images, prompts, strict=True)]


def test_a_reward_is_as_worked_out_by_hand_and_by_the_release(home, weights):
    wide, tall = pictures()
    put_words(home)
    put_weights(home, weights)
    found = score(wide[::-1], wide, PROMPTS)["image_reward"]  # of what is second
    np.testing.assert_allclose(found, by_hand(weights, wide), atol=1e-4)
    np.testing.assert_allclose(found, RELEASED, atol=1e-4)
    assert np.ptp(found) > 0.1
    np.testing.assert_allclose(score(tall, tall, PROMPTS)["image_reward"], by_hand(weights, tall), atol=1e-4)
    many = np.repeat(tall, 4, 0)  # more than are looked at together
    found = score(many, many, [prompt for prompt in PROMPTS for _ in range(4)])["image_reward"]
    np.testing.assert_allclose(found, np.repeat(by_hand(weights, tall), 4), atol=1e-4)


def test_a_reward_is_told_of_prompts_alone_and_more_is_better(home, weights):
    _, tall = pictures()
    put_words(home)
    assert "image_reward" not in score(tall, tall, PROMPTS)
    put_weights(home, weights)
    for conditions in ((), (1, 2, 3)):  # class labels
        assert "image_reward" not in score(tall, tall, conditions)
    video = score(tall[None], tall[None], PROMPTS[:1])["image_reward"]
    assert video == pytest.approx([np.mean(by_hand(weights, tall, PROMPTS[:1] * 3))], abs=1e-4)
    outcome = Outcome(images=tall, latents=torch.ones(3, 1, dtype=torch.float32, device="cpu"), seconds=1.0)
    batches = [Batch(conditions=PROMPTS, seeds=(1, 2, 3))]
    told = measure_fidelity([outcome], [outcome], batches=batches).scores["image_reward"]
    expected = by_hand(weights, tall)
    assert told["worst"] == pytest.approx(min(expected), abs=1e-4)
    assert told["condition"] == PROMPTS[np.argmin(expected)]


def test_weights_are_found_in_the_cache_of_the_hub_too_and_a_vocabulary_is_needed(home, weights):
    _, tall = pictures()
    extra = {
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.vision_proj.weight": torch.ones(2, 2),
    }
    torch.save(weights | extra, put_in_cache(home, "THUDM/ImageReward", FILE))
    assert "image_reward" not in score(tall, tall, PROMPTS)
    put_words(home)
    np.testing.assert_allclose(score(tall, tall, PROMPTS)["image_reward"], by_hand(weights, tall), atol=1e-4)


def test_a_file_of_something_else_is_one_line(home, weights):
    _, tall = pictures()
    put_words(home)
    put_weights(home, {"weights": torch.ones(2)})
    path = home / FOLDER.removeprefix("~/") / FILE
    without = {name: each for name, each in weights.items() if name != "blip.visual_encoder.norm.bias"}
    for content in ({"weights": torch.ones(2)}, [1, 2], without):
        torch.save(content, path)
        with pytest.raises(InputError, match=f"image_reward: '.*{FILE}' holds no weights of ImageReward .*") as caught:
            score(tall, tall, PROMPTS)
        assert len(str(caught.value).splitlines()) == 1
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=f"image_reward: '.*{FILE}' cannot be read .*: remove it"):
        score(tall, tall, PROMPTS)
