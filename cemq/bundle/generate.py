"""One sample from a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from cemq.bundle.load import Loading, from_pretrained
from cemq.bundle.manifest import read_bundle
from cemq.errors import check_keywords
from cemq.pipelines.batches import Batch, Progress, check_call, check_conditions, iterate, read_call, run
from cemq.pipelines.opening import pipeline_class
from cemq.pipelines.outputs import Sample, as_array, check_path, kind_of, output_kind, rate_of


def generate(
    bundle: str | Path,
    condition: str | int,
    *,
    seed: int = 0,
    steps: int | None = None,
    budget: int | str | None = None,
    call: dict[str, Any] | None = None,
    **loading: Unpack[Loading],
) -> Any:
    """One sample from a bundle, for a prompt or a class label: a PIL image, a list of them for a video, or audio.

    Audio, which PIL cannot hold, comes as a `cemq.pipelines.outputs.Sample`.

    Args:
        steps: Denoising steps; None takes the bundle's.
        budget: Full-compute steps or a ratio such as ``"3x"``; None takes the bundle's.
        call: Arguments of the pipeline, over the bundle's.
        device: Where it runs; None takes CUDA where there is one.
        verify: When checksums are compared: ``always``, ``once`` on this machine, which is the default, or ``never``.
        vram: Device memory to stay within, such as ``"8GiB"`` or a number of bytes, for this very call; see
            `cemq.from_pretrained`.
        kernel: What multiplies integers; see there, too.
        offload_folder: For placements that keep weights on disk; None takes ``~/.cache/cemq/offload``.

    Raises:
        CemqError: The bundle, the condition or an argument cannot be used, or no placement fits in ``vram``.
    """
    check_keywords("generate", loading, Loading)
    sample = generate_sample(bundle, condition, seed=seed, steps=steps, budget=budget, call=call, **loading)
    return sample if sample.kind == "audio" else sample.to_pil()


def generate_sample(
    bundle: str | Path,
    condition: str | int,
    *,
    seed: int = 0,
    steps: int | None = None,
    budget: int | str | None = None,
    call: dict[str, Any] | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
    **loading: Unpack[Loading],
) -> Sample:
    """`generate` as a `Sample`, which knows how to save itself; ``output`` is checked beforehand.

    With ``progress``, it is told the share of all steps done, and diffusers shows no bar of its own.
    """
    manifest = read_bundle(Path(bundle))
    kind = pipeline_class(manifest.pipeline_class)
    check_call(kind, call or {})
    arguments = manifest.call | read_call(kind, call or {})
    pipe = from_pretrained(bundle, budget=budget, call=arguments, **loading)
    if output is not None:
        check_path(output, output_kind(pipe))
    batch = Batch(conditions=check_conditions(pipe, [condition]), seeds=(seed,))
    steps = steps or manifest.num_inference_steps
    ((_, on_step),) = iterate([batch], "drawing", progress, steps)
    if progress is not None:
        pipe.set_progress_bar_config(disable=True)
    values = as_array(run(pipe, batch, steps=steps, call=arguments, on_step=on_step if progress else None))
    return Sample(kind=kind_of(values), values=values[0], rate=rate_of(pipe, arguments))
