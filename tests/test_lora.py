"""LoRAs at build time: full precision is then the fused model, and the bundle says which LoRAs those are."""

import hashlib
import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.comparing import identical
from support.families import sd3 as make_sd3
from support.pipelines import FLUX_CALL, ONE, make_dit, make_flux

pytest.importorskip("peft")

# isort: split
import huggingface_hub
from support.loras import ALPHA, RANK, save_lora
from typer.testing import CliRunner

import cemq
from cemq.bundle.manifest import read_bundle
from cemq.cli import app
from cemq.errors import InputError, ModelError
from cemq.evaluation.report import describe
from cemq.pipelines.batches import run
from cemq.pipelines.lora import fuse_loras, locate_lora, read_lora
from cemq.pipelines.opening import open_pipeline

STEPS = 4
BUILD = {
    "steps": STEPS, "budget": STEPS, "effort": "instant", "solver": "uniform", "rounding": "nearest", "device": "cpu",
}  # fmt: skip
MADE = {"flux": (make_flux, FLUX_CALL), "sd3": (make_sd3, {"height": 16, "width": 16, "max_sequence_length": 16})}
QUERY = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def flux_folder(tmp_path):
    make_flux().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def opened(folder):
    pipe = open_pipeline(folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, call):
    return run(pipe, ONE, steps=STEPS, call=call)


def fused_by_hand(folder, *loras):
    """As diffusers' documentation has it, which cemq goes by too."""
    pipe = opened(folder)
    for file, scale in loras:
        with warnings.catch_warnings():  # of a component that a file has nothing for
            warnings.simplefilter("ignore")
            pipe.load_lora_weights(str(file))
        adapted = [
            name for name in ("transformer", "text_encoder") if getattr(getattr(pipe, name), "peft_config", None)
        ]
        pipe.fuse_lora(components=adapted, lora_scale=scale)
        pipe.unload_lora_weights()
    return pipe


def read_config(folder):
    return cemq.CemqConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def change_of(file, layer=f"transformer.{QUERY}"):
    """What a file of scale 1 adds to a weight."""
    weights = load_file(file)
    return ALPHA / RANK * weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize(
    ("text", "name", "scale"),
    [
        ("ink.safetensors", "ink.safetensors", 1.0),
        ("ink.safetensors:0.8", "ink.safetensors", 0.8),
        ("ink.safetensors:-1", "ink.safetensors", -1.0),
        ("owner/name", "owner/name", 1.0),
        ("owner/name:1e-1", "owner/name", 0.1),
        ("owner/name/a/ink.safetensors:2", "owner/name/a/ink.safetensors", 2.0),
        (r"C:\loras\ink.safetensors", r"C:\loras\ink.safetensors", 1.0),
        (r"C:\loras\ink.safetensors:0.5", r"C:\loras\ink.safetensors", 0.5),
        ("C:/loras/ink.safetensors", "C:/loras/ink.safetensors", 1.0),
    ],
)
def test_a_scale_is_told_from_the_rest_of_a_name(text, name, scale):
    assert read_lora(text) == (name, scale)


def test_a_file_that_is_there_is_meant_whatever_it_is_called(tmp_path):
    (tmp_path / "ink:0.5").touch()
    assert read_lora(str(tmp_path / "ink:0.5")) == (str(tmp_path / "ink:0.5"), 1.0)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("the scale 'strong' is no finite number", "ink.safetensors:strong"),
        ("the scale 'nan' is no finite number", "owner/name:nan"),
        ("the scale 'inf' is no finite number", "owner/name:inf"),
        ("the scale '' is no finite number", "ink.safetensors:"),
        ("write FILE_OR_ID, or FILE_OR_ID:SCALE", ""),
        ("write FILE_OR_ID, or FILE_OR_ID:SCALE", ":0.5"),
    ],
)
def test_what_is_no_name_and_scale_is_refused(flux_folder, tmp_path, message, text):
    with pytest.raises(InputError, match=message):
        cemq.quantize_and_schedule(str(flux_folder), tmp_path / "bundle", lora=[text])


@pytest.mark.parametrize("family", MADE)
def test_the_full_precision_of_a_build_is_the_fused_model(tmp_path, family):
    make, call = MADE[family]
    pipe = make()
    pipe.save_pretrained(tmp_path / "pipeline")
    file = save_lora(pipe, tmp_path / "ink", "transformer", "text_encoder")
    arguments = BUILD | {"scheme": "none", "call": call}
    cemq.quantize_and_schedule(str(tmp_path / "pipeline"), tmp_path / "bundle", lora=[f"{file}:0.7"], **arguments)
    bundle, fused = (
        cemq.from_pretrained(tmp_path / "bundle", device="cpu"),
        fused_by_hand(tmp_path / "pipeline", (file, 0.7)),
    )
    bundle.set_progress_bar_config(disable=True)
    for name in ("transformer", "text_encoder"):
        assert identical(getattr(bundle, name), getattr(fused, name))
    assert np.array_equal(drawn(bundle, call), drawn(fused, call))
    assert not np.array_equal(drawn(bundle, call), drawn(opened(tmp_path / "pipeline"), call))
    found = cemq.evaluate(tmp_path / "bundle", samples=1, device="cpu")
    assert found.relative_l2 == 0.0  # against the model that is fused again


def test_what_is_quantized_is_the_fused_model(flux_folder, tmp_path):
    file = save_lora(make_flux(), tmp_path / "ink")
    cemq.quantize_and_schedule(
        str(flux_folder), tmp_path / "bundle", lora=[f"{file}:0.5"], scheme="w8a8", call=FLUX_CALL, **BUILD
    )
    files = [tmp_path / "bundle" / "transformer"]
    for name, pipe in (("fused", fused_by_hand(flux_folder, (file, 0.5))), ("plain", opened(flux_folder))):
        cemq.quantize_in_place(pipe.transformer, read_config(files[0]))
        pipe.transformer.save_pretrained(tmp_path / name)
        files.append(tmp_path / name)
    found, fused, plain = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in files)
    assert found[f"{QUERY}.weight"].dtype == torch.int8
    assert found.keys() == fused.keys()
    assert all(torch.equal(found[name], fused[name]) for name in found)
    assert not torch.equal(found[f"{QUERY}.weight"], plain[f"{QUERY}.weight"])


def test_the_scale_multiplies_what_is_added_and_several_add_up(tmp_path):
    pipe = make_flux()
    before = pipe.transformer.get_parameter(f"{QUERY}.weight").detach().clone()
    files = [save_lora(pipe, tmp_path, seed=seed, name=f"{seed}.safetensors") for seed in (1, 2)]
    fuse_loras(pipe, [locate_lora(str(file), scale) for file, scale in zip(files, (0.5, -2.0), strict=True)])
    expected = before + 0.5 * change_of(files[0]) - 2.0 * change_of(files[1])
    torch.testing.assert_close(pipe.transformer.get_parameter(f"{QUERY}.weight").detach(), expected)
    assert (expected - before).abs().max() > 0.1
    assert not any("lora" in name or "base_layer" in name for name in pipe.transformer.state_dict())


def test_a_bundle_says_which_loras_are_in_it(flux_folder, tmp_path, monkeypatch):
    pipe = make_flux()
    files = [save_lora(pipe, tmp_path / "ink"), save_lora(pipe, tmp_path, seed=1, name="grain.safetensors")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    arguments = [
        "quantize-and-schedule", str(flux_folder), "-o", "bundle", "--scheme", "none", "--steps", "4", "--budget", "2",
        "--effort", "instant", "--solver", "uniform", "--device", "cpu", "--lora", "ink", "--lora",
        "grain.safetensors:0.25", *(f"--call={name}={value}" for name, value in FLUX_CALL.items()),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    manifest = read_bundle(tmp_path / "bundle", verify="always")
    assert manifest.recipe["lora"] == ["ink", "grain.safetensors:0.25"]
    expected = [
        {"name": str(file), "scale": scale, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "revision": None}
        for file, scale in zip(files, (1.0, 0.25), strict=True)
    ]
    assert json.loads(Path("bundle/cemq.json").read_text())["lora"] == expected
    assert describe(tmp_path / "bundle")["lora"] == expected
    said = f"{files[0]} (1), {files[1]} (0.25)"
    assert f"| LoRA, fused | {said} |" in Path("bundle/README.md").read_text()
    shown = CliRunner().invoke(app, ["inspect", "bundle"]).stdout
    assert said in shown


def test_an_original_is_fused_with_the_lora_of_then_or_refused(flux_folder, tmp_path):
    pipe = make_flux()
    file = save_lora(pipe, tmp_path / "ink")
    cemq.quantize_and_schedule(
        str(flux_folder), tmp_path / "bundle", lora=[str(file)], scheme="none", call=FLUX_CALL, **BUILD
    )
    save_lora(pipe, tmp_path / "ink", seed=1)
    with pytest.raises(ModelError, match=r"LoRA '.*ink.*' is another file than the bundle was made with \(SHA-256"):
        cemq.evaluate(tmp_path / "bundle", samples=1, device="cpu")
    file.unlink()
    with pytest.raises(ModelError, match=r"no such LoRA '.*ink"):
        cemq.evaluate(tmp_path / "bundle", samples=1, device="cpu")


# --- what cannot be fused


def refused(model, output, lora):
    """The one line that a build ends with, before it loads the model or writes anything."""
    done = CliRunner().invoke(app, ["quantize-and-schedule", str(model), "-o", str(output), "--lora", str(lora)])
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert not output.exists()
    return done.stderr


def test_a_pipeline_that_takes_no_lora_is_refused(tmp_path):
    make_dit().save_pretrained(tmp_path / "pipeline")
    file = save_lora(make_flux(), tmp_path / "ink")
    assert "DiTPipeline loads no LoRAs: leave lora" in refused(tmp_path / "pipeline", tmp_path / "bundle", file)


def test_what_is_no_file_of_weights_is_refused(flux_folder, tmp_path):
    output = tmp_path / "bundle"
    assert "no such LoRA 'ink.safetensors'" in refused(flux_folder, output, "ink.safetensors")
    assert "no such LoRA 'loras/ink.safetensors'" in refused(flux_folder, output, "loras/ink.safetensors:0.5")
    assert "'owner/name' is no file here and cannot be fetched" in refused(flux_folder, output, "owner/name")
    (tmp_path / "ink.bin").touch()
    assert "is no safetensors file: other formats can hold a program" in refused(
        flux_folder, output, tmp_path / "ink.bin"
    )
    (tmp_path / "loras").mkdir()
    assert "and it holds none" in refused(flux_folder, output, tmp_path / "loras")
    for name in ("ink", "grain"):
        (tmp_path / "loras" / f"{name}.safetensors").write_text("no weights")
    several = refused(flux_folder, output, tmp_path / "loras")
    assert "holds several: grain.safetensors, ink.safetensors; name one" in several
    assert "cannot be read: Error while deserializing header" in refused(
        flux_folder, output, tmp_path / "loras" / "ink.safetensors"
    )


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("none of its 1 layers is one of the pipeline's", {"prefix": "unet"}),
        ("Target modules .* not found", {"layer": "transformer_blocks.9.attn.to_q"}),
        (r"FluxTransformer2DModel: size mismatch for .*to_q", {"rows": 16}),
        ("NaNs detected in the merged weights", {"value": float("nan")}),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, message, change, capsys):
    asked = {"prefix": "transformer", "layer": QUERY, "rows": 32, "value": 1.0} | change
    layer = f"{asked['prefix']}.{asked['layer']}"
    weights = {
        f"{layer}.lora_A.weight": torch.ones(2, 32),
        f"{layer}.lora_B.weight": torch.full((asked["rows"], 2), asked["value"]),
    }
    save_file(weights, tmp_path / "ink.safetensors")
    with pytest.raises(
        ModelError, match=rf"^LoRA '.*ink.safetensors' does not fit FluxPipeline: .*{message}"
    ) as raised:
        fuse_loras(make_flux(), [locate_lora(str(tmp_path / "ink.safetensors"), 1.0)])
    assert "\n" not in str(raised.value)
    assert capsys.readouterr().err == ""


def test_no_lora_is_left_out_in_part_without_a_word(tmp_path, caplog):
    file = save_lora(make_flux(), tmp_path)
    weights = load_file(file)
    weights |= {f"text_encoder_2.{name}": torch.ones(2, 2) for name in ("q.lora_A.weight", "q.lora_B.weight")}
    save_file(weights, tmp_path / "more.safetensors")
    with caplog.at_level(logging.WARNING, "cemq.build"):
        fuse_loras(make_flux(), [locate_lora(str(file), 1.0)])
        assert not caplog.messages
        fuse_loras(make_flux(), [locate_lora(str(tmp_path / "more.safetensors"), 1.0)])
    (said,) = caplog.messages
    assert "more.safetensors': 4 of its 5 layers are fused" in said
    weights[f"transformer.{QUERY}.dora_scale"] = torch.ones(32, 1)
    save_file(weights, tmp_path / "dora.safetensors")
    with pytest.raises(ModelError, match="is a DoRA, and diffusers leaves its dora_scale out"):
        locate_lora(str(tmp_path / "dora.safetensors"), 1.0)


def test_without_peft_the_line_says_how_to_install_it(flux_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("cemq.pipelines.lora.find_spec", lambda name: None)
    said = refused(flux_folder, tmp_path / "bundle", "owner/name:0.5")
    assert "lora 'owner/name': diffusers fuses it with peft, which is not installed: pip install 'cemq[lora]'" in said


# --- from the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository that holds files, of which those asked for are noted with their revision."""
    root, asked = tmp_path / "hub" / "snapshots" / "c0ffee", []
    files = {"a/ink.safetensors": root / "a" / "ink.safetensors"}
    save_lora(make_flux(), root / "a", name="ink.safetensors")

    class Api:
        def model_info(self, repo_id, revision=None):
            assert repo_id == "owner/name"
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in ("README.md", *files)])

    def download(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        return str(files[filename])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(files=files, asked=asked)


@pytest.mark.parametrize("name", ["owner/name", "owner/name/a/ink.safetensors"])
def test_a_lora_of_the_hub_is_pinned_to_its_commit(hub, name):
    found = locate_lora(name, 1.0)
    assert (found.fused.name, found.fused.revision) == (name, "c0ffee")
    assert found.file == hub.files["a/ink.safetensors"]
    assert locate_lora(name, 1.0, revision="c0ffee") == found
    assert hub.asked == [("owner/name", "a/ink.safetensors", revision) for revision in (None, "c0ffee")]


def test_several_files_of_a_repository_are_for_the_user_to_choose_from(hub):
    hub.files["grain.safetensors"] = hub.files["a/ink.safetensors"]
    with pytest.raises(ModelError, match=r"'owner/name' .* holds several: a/ink.safetensors, grain.safetensors; name"):
        locate_lora("owner/name", 1.0)
    hub.files["pytorch_lora_weights.safetensors"] = hub.files["a/ink.safetensors"]
    assert locate_lora("owner/name", 1.0).file == hub.files["a/ink.safetensors"]
    assert hub.asked[-1][1] == "pytorch_lora_weights.safetensors"
