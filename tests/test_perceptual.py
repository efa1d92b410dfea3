"""Metrics by networks whose weights are found on the machine, here tiny or random ones, and never downloaded."""

import json

import numpy as np
import pytest
import torch
import torchmetrics
from support.pipelines import CALL, save_dit
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

import cemq
from cemq.errors import InputError
from cemq.evaluation.compare import measure_fidelity
from cemq.evaluation.perceptual import ALEXNET, CLIP
from cemq.evaluation.scores import score
from cemq.pipelines.batches import Batch
from cemq.runtime.runner import Outcome

CHANNELS = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
PLACES = (0, 3, 6, 8, 10)  # in torchvision's AlexNet


@pytest.fixture(scope="module")
def weights():
    generator, found = torch.Generator().manual_seed(0), {}
    for place, (given, made, kernel) in zip(PLACES, CHANNELS, strict=True):
        bound = (given * kernel**2) ** -0.5
        found[f"features.{place}.weight"] = bound * torch.randn(made, given, kernel, kernel, generator=generator)
        found[f"features.{place}.bias"] = bound * torch.randn(made, generator=generator)
    return found


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder in the place of torch's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def pictures(count, size, seed=0):
    return np.random.default_rng(seed).random((count, size, size, 3)).astype(np.float32)


def lpips_by_hand(weights, left, right):
    """Zhang et al. 2018, equation 1, over AlexNet's five activations."""
    heads = torch.load(
        f"{torchmetrics.__path__[0]}/functional/image/lpips_models/alex.pth", map_location="cpu", weights_only=True
    )
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    found = [((2 * torch.from_numpy(x) - 1 - shift) / scale).permute(0, 3, 1, 2) for x in (left, right)]
    total = torch.zeros(len(left))
    for number, (place, stride, padding) in enumerate(zip(PLACES, (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), strict=True)):
        if place in (3, 6):
            found = [functional.max_pool2d(x, 3, 2) for x in found]
        kernel, bias = (weights[f"features.{place}.{name}"] for name in ("weight", "bias"))
        found = [functional.conv2d(x, kernel, bias, stride, padding).relu() for x in found]
        one, other = (functional.normalize(x, dim=1) for x in found)
        total += functional.conv2d((one - other) ** 2, heads[f"lin{number}.model.1.weight"]).mean((1, 2, 3))
    return total.numpy()


def test_lpips_is_told_where_its_weights_are_and_as_worked_out_by_hand(hub, weights):
    left, right = pictures(3, 64), pictures(3, 64, seed=1)
    assert "lpips" not in score(left, right)
    torch.save(weights, hub / ALEXNET)
    found = score(left, right)["lpips"]
    np.testing.assert_allclose(found, lpips_by_hand(weights, left, right), rtol=1e-4)
    assert (found > 0).all()
    assert score(left, left)["lpips"].tolist() == [0, 0, 0]
    small, other = left[:, :16, :16], right[:, :16, :16]
    large = (each.repeat(4, 1).repeat(4, 2) for each in (small, other))
    np.testing.assert_allclose(score(small, other)["lpips"], lpips_by_hand(weights, *large), rtol=1e-4)
    told = measure_fidelity([outcome(left)], [outcome(right)]).scores["lpips"]
    assert told["worst"] == max(found)  # more is worse
    videos = score(left[None], right[None])["lpips"]
    assert videos == pytest.approx([found.mean()])


def test_a_file_that_is_no_alexnet_is_one_line(hub):
    (hub / ALEXNET).write_bytes(b"nothing")
    with pytest.raises(InputError, match=f"metric lpips: '.*{ALEXNET}' cannot be read .*: remove it") as caught:
        score(pictures(1, 64), pictures(1, 64, seed=1))
    assert len(str(caught.value).splitlines()) == 1


def outcome(images):
    return Outcome(images=images, latents=torch.ones(len(images), 1), seconds=1.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of random weights that knows letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{each}</w>" for each in letters)]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": len(names), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
                             "max_position_embeddings": 77},
        vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    prepare = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(prepare, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder


def clip_by_hand(folder, images, prompts):
    model, prepare = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        given = prepare(text=[prompt], images=[(image * 255).round().astype(np.uint8)], return_tensors="pt")
        with torch.inference_mode():
            answer = model(**given)
        one, other = answer.text_embeds[0], answer.image_embeds[0]
        found.append(100 * (one @ other / one.norm() / other.norm()).item())
    return np.maximum(found, 0)


def test_clip_scores_are_told_of_prompts_and_as_worked_out_by_hand(clip, monkeypatch):
    left, right, prompts = pictures(3, 32), pictures(3, 32, seed=1), ("a cat", "zebra", "no dog at all")
    assert "clip_score" not in score(left, right, prompts)
    monkeypatch.setenv(CLIP, str(clip))
    found = score(left, right, prompts)
    expected = clip_by_hand(clip, right, prompts)
    np.testing.assert_allclose(found["clip_score"], expected, atol=1e-3)
    np.testing.assert_allclose(found["clip_change"], expected - clip_by_hand(clip, left, prompts), atol=1e-3)
    assert found["clip_score"].any()
    assert not {"clip_score", "clip_change"} & score(left, right).keys()
    assert not {"clip_score", "clip_change"} & score(left, right, (1, 2, 3)).keys()  # class labels
    batches = [Batch(conditions=prompts[:1], seeds=(1,)), Batch(conditions=prompts[1:], seeds=(2, 3))]
    halves = ([outcome(each[:1]), outcome(each[1:])] for each in (left, right))
    told = measure_fidelity(*halves, batches=batches).scores["clip_score"]
    assert told["mean"] == pytest.approx(expected.mean(), abs=1e-3)
    video = score(left[None], right[None], ("a cat",))["clip_score"]
    assert video == pytest.approx([clip_by_hand(clip, right, ["a cat"] * 3).mean()], abs=1e-3)


def test_a_model_that_is_not_here_is_refused_before_anything_is_run(tmp_path, monkeypatch):
    folder = save_dit(tmp_path, labels=4)
    monkeypatch.setenv(CLIP, "nobody/no-such-clip")
    monkeypatch.setattr(cemq.Runner, "run", lambda *_: pytest.fail("something was run"))
    settings = {"calib": str(folder / "labels.txt"), "call": CALL, "steps": 4}
    for use in (
        lambda: cemq.compare(folder / "pipeline", methods=["uniform"], **settings),
        lambda: cemq.quantize_and_schedule(str(folder / "pipeline"), tmp_path / "bundle", **settings),
    ):
        with pytest.raises(InputError, match="MODEL=nobody/no-such-clip: no CLIP model of that name") as caught:
            use()
        assert len(str(caught.value).splitlines()) == 1
