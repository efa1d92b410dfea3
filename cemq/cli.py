"""Parse, call, print. Results go to stdout, progress and complaints to stderr."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import inspect as introspection
import io
import json
import logging
import os
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cemq import __version__
from cemq.errors import CemqError, InputError, in_one_line
from cemq.extensions import load_extensions
from cemq.files import check_writable, written_whole
from cemq.recipe import OF_WEIGHTS, RENAMED, Recipe

if TYPE_CHECKING:
    from cemq.bundle.manifest import Manifest
    from cemq.evaluation.rivals.comparison import Comparison
    from cemq.pipelines.batches import Progress

app: typer.Typer = typer.Typer(
    help="Quantize a diffusion transformer, plan which steps it may skip, and ship both as one folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Call = Annotated[
    list[str] | None,
    typer.Option("--call", metavar="KEY=VALUE", help="Argument of the pipeline, e.g. guidance_scale=2.0; repeatable."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA where there is one.")]
Budget = Annotated[str | None, typer.Option(metavar="N|Rx", help="Full-compute steps (15), or a compute ratio (3x).")]
_VERIFY = typer.Option(metavar="WHEN", help="Compare checksums first: always, once on this machine, or never.")
Verify = Annotated[str, _VERIFY]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show nothing but errors on stderr.")]
Vram = Annotated[str | None, typer.Option(help="Device memory to stay within, e.g. 8GiB.")]
HostMemory = Annotated[
    str | None, typer.Option(help="With --vram: host memory that weights may rest in; default: what is free.")
]
OffloadFolder = Annotated[
    Path | None, typer.Option(help="For weights that --vram keeps on disk; default: ~/.cache/cemq/offload.")
]
Kernel = Annotated[
    str, typer.Option(metavar="NAME", help="What multiplies integers: auto, fastest, or one that doctor shows.")
]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder written by quantize-and-schedule.")]


def main() -> None:
    """Entry point of the ``cemq`` command; it prints to streams of any encoding."""
    make_printable(sys.stdout, sys.stderr)
    app()


def make_printable(*streams: Any) -> None:
    """What a stream's encoding does not have is printed in ASCII, and no error."""
    codecs.register_error("cemq", _in_ascii)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            stream.reconfigure(errors="cemq")


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A CemqError ends the command as one line and exit code 1, Ctrl-C as one line and 130.

    So does what the system refuses, wherever it does. ``CEMQ_TRACEBACK=1`` shows where an error comes from.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            for name, value in kwargs.items():
                if value == "":  # an unset variable of a script, more likely than a wish for the default
                    raise InputError(f"{name.replace('_', ' ')}: found an empty text; give a value, or leave it out")
            command(*args, **kwargs)
        except BrokenPipeError:  # whoever reads the output has seen enough
            raise
        except (CemqError, OSError) as error:
            if os.environ.get("CEMQ_TRACEBACK"):
                traceback.print_exception(error)
            said = str(error)
            if isinstance(error, OSError) and error.strerror:
                said = error.strerror + (f": '{error.filename}'" if error.filename else "")
            print(f"cemq: {in_one_line(said)}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            print(f"cemq: interrupted; {str(error) or 'nothing was written'}", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


# What cemq draws, for terminals and files that hold ASCII alone.
_DRAWN = str.maketrans("█▌·▁▂▃▄▅▆▇━╸╺", "#+.1234567---")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end].translate(_DRAWN)
    return found.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _hush_libraries(quiet: bool = False) -> None:
    """Keep the libraries' log lines and progress bars off stderr; cemq's own warnings stay.

    Args:
        quiet: Not even how far a download is, which is shown on a terminal.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    if quiet or not (sys.stderr and sys.stderr.isatty()):
        huggingface_hub.utils.disable_progress_bars()
    warnings.filterwarnings("always", message="cemq:")
    warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)


@contextmanager
def _at_work(quiet: bool) -> Iterator[Progress]:
    """What a command that takes its time tells its progress, which is shown unless it is to be quiet."""
    from cemq.pipelines.progress import shown_progress

    _hush_libraries(quiet)
    with shown_progress(quiet=quiet) as progress:
        yield progress


def _call_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; what kind of value the text stands for, the pipeline's signature says later."""
    arguments = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--call {pair!r}: write KEY=VALUE, e.g. guidance_scale=2.0")
        arguments[key] = value
    return arguments


def _names(text: str) -> list[str]:
    """Of a list separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _counts(option: str, text: str | None) -> list[int] | None:
    """Of whole numbers separated by commas; ``none`` is none of them."""
    names = _names(text) if text else None
    if not names:
        return None
    if not all(name.isdecimal() for name in names) and names != ["none"]:
        raise InputError(f"{option} {text!r}: write whole numbers separated by commas, e.g. 20,28, or none")
    return [int(name) for name in names if name != "none"]


def _print_json(result: Any) -> None:
    print(json.dumps(result, indent=2))


def _build_options(command: Callable[..., None], without: Set[str] = frozenset()) -> Callable[..., None]:
    """``command`` with an option more for every field of `Recipe` that is described, given to it by name.

    Args:
        without: Fields that another recipe settles, and with them the defaults of all.
    """
    own = introspection.signature(command, eval_str=True)
    shown = [each for each in own.parameters.values() if each.kind is not introspection.Parameter.VAR_KEYWORD]
    first = [each for each in shown if each.name in ("bundle", "model", "output", "recipe")]
    options = [
        introspection.Parameter(name, introspection.Parameter.KEYWORD_ONLY, default=False if kind is bool else None,
                          annotation=Annotated[kind if kind is bool else kind | None, option])
        for name, (kind, option) in _recipe_options(defaults=not without).items()
        if name not in without
    ]  # fmt: skip
    later = [each.replace(kind=introspection.Parameter.KEYWORD_ONLY) for each in shown if each not in first]
    command.__signature__ = introspection.Signature([*first, *options, *later])
    command.__annotations__ = {each.name: each.annotation for each in command.__signature__.parameters.values()}
    return command


def _recipe_options(*, defaults: bool) -> dict[str, tuple[type, Any]]:
    """Type and option of each described field; lists are texts with commas, or options that are given repeatedly.

    Args:
        defaults: Tell those of a build in brackets.
    """
    found = {}
    for name, field in Recipe.model_fields.items():
        if field.description is None:
            continue
        kinds = {typing.get_origin(kind) or kind for kind in typing.get_args(field.annotation) or (field.annotation,)}
        kind = next((each for each in (bool, float, int) if {each} == kinds - {type(None)}), str)
        shown = cast("dict[str, Any]", field.json_schema_extra or {})  # ours are no functions
        if shown.get("repeated"):
            kind = list[str]
        least = next((each.ge for each in field.metadata if hasattr(each, "ge")), None)
        told = field.description
        if field.default is not None and kind is not bool:
            told += f" [{field.default}]." if defaults else "."
        flag = f"--{name.replace('_', '-')}"
        found[name] = kind, typer.Option(flag, help=told, min=least, metavar=shown.get("metavar"))
    return found | {name: (str, typer.Option(f"--{name}", hidden=True)) for name in RENAMED}


def _recipe_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say, as fields of `Recipe`; those that were not given are None."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in RENAMED:
            if value is not None:
                raise InputError(f"--{name} is called --{RENAMED[name]} by now")
            continue
        kinds = typing.get_args(Recipe.model_fields[name].annotation)
        if value is False or value == []:
            value = None  # a flag that is not given leaves the recipe's
        elif isinstance(value, str) and list[str] in kinds:
            value = _names(value)
        elif isinstance(value, str) and any(typing.get_origin(kind) is list for kind in kinds):
            value = _counts(f"--{name.replace('_', '-')}", value)
        elif isinstance(value, str) and int in kinds and value.isdecimal():
            value = int(value)
        found[name] = value
    return found


@app.command("quantize-and-schedule")
@_one_line_errors
@_build_options
def quantize_and_schedule(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="builtin:NAME, a pipeline folder, or a Hub id.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write the bundle to.")] = Path("bundle"),
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe by name, or a YAML file.")] = None,
    call: Call = None,
    device: Device = None,
    vram: Vram = None,
    host_memory: HostMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle of that name.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew, and remove what unfinished builds have kept beside the output.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Quantize MODEL, plan its schedule for its own noise, write a bundle.

    Options are keys of recipes, too, but for those of this machine: -o, --recipe, --device, --vram, --host-memory,
    --overwrite, --fresh, --dry-run, --quiet and --json. The same command goes on with a build that was ended.

    Example: cemq quantize-and-schedule builtin:dit-digits --scheme w8a8 --budget 15 -o digits
    """
    from cemq.build import quantize_and_schedule as build
    from cemq.build.estimate import estimate
    from cemq.build.settings import resolve
    from cemq.parallel import launched

    with launched() as processes:
        settings = _recipe_settings(options) | {"call": _call_arguments(call), "vram": vram, "host_memory": host_memory}
        if dry_run:
            _hush_libraries()
            told = estimate(resolve(model, recipe, device, settings))
            _print_json(told.to_dict()) if as_json else print(told.summary())
            return
        with _at_work(quiet) as progress:
            manifest = build(
                model, output, recipe=recipe, device=device, overwrite=overwrite, fresh=fresh, progress=progress,
                processes=processes, **settings,
            )  # fmt: skip
        _print_built(manifest, output, as_json)


def _print_built(manifest: Manifest, output: Path, as_json: bool) -> None:
    """What a bundle is by now, and what making it took."""
    if as_json:
        _print_json(dataclasses.asdict(manifest) | {"bundle": str(output)})
        return
    schedule, took = manifest.schedule, manifest.generations
    assert took is not None  # only older bundles do not say
    replayed = f", {took['replayed']:.4g} replayed to quantize" if took["replayed"] else ""
    print(schedule.strip())
    print(
        f"{output}: {manifest.scheme}, {manifest.full_steps:g} of {schedule.num_steps} steps in full, "
        f"{manifest.fidelity_text}, "
        f"denoiser {manifest.model_bytes / 1e6:.1f} MB (was {manifest.reference_bytes / 1e6:.1f}); "
        f"took {took['total']:.4g} generations: {took['full_precision']:.4g} in full precision, "
        f"{took['quantized']:.4g} quantized{replayed}"
    )


@app.command()
@_one_line_errors
@functools.partial(_build_options, without=OF_WEIGHTS)
def replan(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write the new bundle to.")],
    model: Annotated[
        str | None, typer.Option(help="Where the full-precision model lies by now; default: where it lay.")
    ] = None,
    call: Call = None,
    device: Device = None,
    vram: Vram = None,
    host_memory: HostMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle of that name.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Plan BUNDLE again without quantizing again, and write a new bundle with the same weights.

    What is not given is as the recipe of BUNDLE says, which the new bundle's goes on with.

    Example: cemq replan digits --effort thorough --steps 20 -o digits-20
    """
    from cemq.build.replan import replan as plan_again
    from cemq.parallel import launched

    with launched() as processes:
        settings = _recipe_settings(options) | {"call": _call_arguments(call), "vram": vram, "host_memory": host_memory}
        with _at_work(quiet) as progress:
            manifest = plan_again(
                bundle, output, model=model, device=device, overwrite=overwrite, progress=progress,
                processes=processes, **settings,
            )  # fmt: skip
        _print_built(manifest, output, as_json)


@app.command()
@_one_line_errors
def generate(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write: .png, .gif, .mp4, .wav, ...")],
    prompt: Annotated[str | None, typer.Option(help="What to draw, for text-to-image models.")] = None,
    label: Annotated[str | None, typer.Option(help="Class name or number, for class-conditional models.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the bundle's.")] = None,
    budget: Budget = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial noise.")] = 0,
    call: Call = None,
    device: Device = None,
    vram: Vram = None,
    offload_folder: OffloadFolder = None,
    kernel: Kernel = "auto",
    verify: Verify = "once",
    quiet: Quiet = False,
) -> None:
    """Make one picture, video or piece of audio with a bundle.

    Example: cemq generate digits --label seven -o seven.png
    """
    condition = label if prompt is None else prompt
    if condition is None or (prompt is not None and label is not None):
        raise InputError("give either --prompt or --label")
    arguments = _call_arguments(call)
    from cemq.bundle.checksums import check_verify
    from cemq.bundle.generate import generate_sample
    from cemq.pipelines.outputs import check_path

    check_path(output)
    with _at_work(quiet) as progress:
        sample = generate_sample(
            bundle, condition, seed=seed, steps=steps, budget=budget, call=arguments, device=device, vram=vram,
            offload_folder=offload_folder, kernel=kernel, verify=check_verify(verify), output=output, progress=progress,
        )  # fmt: skip
    sample.save(output)
    print(output)


@app.command()
@_one_line_errors
def evaluate(
    bundle: Bundle,
    reference: Annotated[str | None, typer.Option(help="Full-precision original; default: the bundle's model.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Shifts the evaluation seeds.")] = 0,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps; default: the bundle's.")] = None,
    budget: Budget = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write a PNG: samples in full precision and from the bundle, and its schedule.")
    ] = None,
    device: Device = None,
    vram: Vram = None,
    verify: Verify = "once",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare a bundle with its full-precision, uncached original on fresh seeds.

    Example: cemq evaluate digits --samples 16 --picture side-by-side.png
    """
    from cemq import evaluate as run_evaluation
    from cemq.bundle.checksums import check_verify
    from cemq.bundle.manifest import quality_text
    from cemq.parallel import launched

    with launched() as processes:
        with _at_work(quiet) as progress:
            found = run_evaluation(
                bundle, reference=reference, samples=samples, seed=seed, steps=steps, budget=budget, picture=picture,
                device=device, vram=vram, verify=check_verify(verify), progress=progress, processes=processes,
            )  # fmt: skip
        if as_json:
            _print_json(found.to_dict())
            return
        print(
            f"PSNR {quality_text(found.to_dict())}, SSIM {found.ssim:.4f}, relative L2 {found.relative_l2:.4f} "
            f"over {found.samples} samples; {found.full_steps} of {found.num_steps} steps in full, "
            f"compute ratio {found.compute_ratio:.2f}, wall ratio {found.wall_ratio:.2f} ({found.device}, "
            f"{found.dtype}); denoiser {found.model_bytes:,} bytes, reference {found.reference_bytes:,}"
        )
        if picture:
            print(picture)


@app.command()
@_one_line_errors
def report(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write; its name ends in .html.")],
    samples: Annotated[int, typer.Option(min=1, help="Samples to show.")] = 8,
    reference: Annotated[str | None, typer.Option(help="Full-precision original; default: the bundle's model.")] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Other methods beside it: what compare --json printed.")
    ] = None,
    device: Device = None,
    vram: Vram = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write one page of HTML to look at: pictures side by side, schedule, error prior, and what was measured.

    Its samples are those of evaluate. The page needs no other file and no network.

    Example: cemq report digits -o report.html
    """
    from cemq import report as write_report
    from cemq.bundle.manifest import quality_text

    with _at_work(quiet) as progress:
        found = write_report(
            bundle, output, samples=samples, reference=reference, compare=compare, device=device, vram=vram,
            progress=progress,
        )  # fmt: skip
    if as_json:
        _print_json(found.to_dict() | {"report": str(output)})
        return
    print(f"{output}: {found.samples} sample{'s'[: found.samples != 1]}, PSNR {quality_text(found.to_dict())}")


@app.command()
@_one_line_errors
def play(
    bundle: Bundle,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page's address; 0: any that is free.")] = 7900,
    reference: Annotated[
        str | None,
        typer.Option(help="Full-precision original, or none; default: the bundle's model where it is on this machine."),
    ] = None,
    device: Device = None,
    vram: Vram = None,
    offload_folder: OffloadFolder = None,
    verify: Verify = "once",
) -> None:
    """Open a page to play with a bundle: prompt, seed, budget, with and without quantization and cache.

    It draws the bundle and its original side by side, with seconds and PSNR, and shows each step as it runs. The page
    is for this machine alone and asks nothing of any other. Ctrl-C ends it.

    Example: cemq play digits
    """
    from cemq.bundle.checksums import check_verify
    from cemq.evaluation.play_server import play as serve

    _hush_libraries()
    serve(
        bundle, port=port, reference=reference, device=device, vram=vram, offload_folder=offload_folder,
        verify=check_verify(verify),
        on_ready=lambda address: print(f"{address} (Ctrl-C ends it)", flush=True),
    )  # fmt: skip


@app.command()
@_one_line_errors
def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_BUNDLE", help="Folder, Hub id, builtin:NAME, or a bundle.")],
    budgets: Annotated[str, typer.Option(metavar="Rx,...", help="Compute ratios to compare at.")] = "2x,3.3x,5x",
    methods: Annotated[str | None, typer.Option(metavar="NAME,...", help="Of docs/methods.md; default: all.")] = None,
    schemes: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="none, w8a8, quanto:w4a8, ...; default: none. Not of a bundle."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to judge by.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Shifts their seeds.")] = 0,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps; default: the model's.")] = None,
    calib: Annotated[str | None, typer.Option(help="Text file, one prompt or class label a line.")] = None,
    call: Call = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples drawn at once; default: 4, with --vram 1.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: PSNR over compute ratio.")] = None,
    device: Device = None,
    vram: Vram = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: by device.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Put every caching method on one model, at equal compute and on the same seeds.

    Example: cemq compare builtin:dit-digits --schemes none,w8a8 --plot methods.png
    """
    from cemq import compare as run_comparison
    from cemq.evaluation.compare import check_picture_path
    from cemq.evaluation.rivals.plot import draw
    from cemq.parallel import launched

    with launched() as processes:
        if plot is not None:
            check_picture_path(plot, "plot")
        with _at_work(quiet) as progress:
            found = run_comparison(
                model, ratios=_names(budgets), methods=None if methods is None else _names(methods),
                schemes=None if schemes is None else _names(schemes), samples=samples, seed=seed, steps=steps,
                calib=calib, call=_call_arguments(call), batch_size=batch_size, device=device, vram=vram, dtype=dtype,
                progress=progress, processes=processes,
            )  # fmt: skip
        if plot is not None and processes.is_main:
            draw(found.rows, plot)
        if as_json:
            _print_json(found.to_dict())
            return
        _print_comparison(found)
        if plot is not None:
            print(plot)


def _print_comparison(found: Comparison) -> None:
    """A table for each scheme and compute ratio, the nearest to full precision first; then what computes more than was
    asked for, and what failed, and why."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False)
    for scheme, target in dict.fromkeys((row.scheme, row.target) for row in found.rows):
        rows = [row for row in found.rows if (row.scheme, row.target) == (scheme, target)]
        names = Column("method", min_width=max(len(row.method) for row in rows), no_wrap=True)
        table = Table(names, "compute", "wall", "PSNR dB", "p5", "worst", "SSIM", box=None)
        done = (row for row in rows if row.status == "ok")
        for row in sorted(done, key=lambda row: (not row.is_near, -(row.psnr_db or 0))):
            ratios = f"{row.compute_ratio:.2f}x{'' if row.is_near else '*'}", f"{row.wall_ratio:.2f}x"
            levels = f"{row.psnr_db:.1f}", f"{row.p5_db:.1f}", f"{row.worst_db:.1f}", f"{row.ssim:.4f}"
            table.add_row(row.method, *ratios, *levels)
        console.print(f"\n{found.model}, {scheme}, {target:g}x of {found.num_steps} steps, {found.samples} samples")
        console.print(table)
        if not all(row.is_near for row in rows if row.status == "ok"):
            console.print("* computes more than was asked for: it cannot do with less, or no setting comes nearer")
        for row in rows:
            if row.status != "ok":
                console.print(f"{row.method}: {row.status}", markup=False)


@app.command()
@_one_line_errors
def inspect(bundle: Bundle, as_json: Json = False) -> None:
    """Show what is in a bundle: scheme, sizes, schedule, per-step errors, fidelity at build time.

    Example: cemq inspect digits
    """
    from cemq.evaluation.report import describe, print_description

    description = describe(bundle)
    if as_json:
        _print_json(description)
    else:
        print_description(description)


@app.command()
@_one_line_errors
def verify(bundle: Bundle, as_json: Json = False) -> None:
    """Read every file of a bundle and compare it with its checksum, whatever was verified before.

    Each file that is damaged, missing or not the bundle's own is named on stderr, and the exit code is 1 then.

    Example: cemq verify digits
    """
    from cemq.bundle.verify import verify as run_verification

    found = run_verification(bundle)
    if as_json:
        _print_json(found.to_dict())
    else:
        for name, fault in found.faults.items():
            print(in_one_line(f"{name}: {fault}"), file=sys.stderr)
    found.check()
    if not as_json:
        print(f"{bundle}: {found.files} files, {found.bytes / 1e6:.1f} MB, all as they were written")


@app.command()
@_one_line_errors
def analyze(
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle's folder, or a model to make one of and not keep.")
    ],
    scheme: Annotated[str | None, typer.Option(help="To quantize a MODEL with [w8a8].")] = None,
    recipe: Annotated[str | None, typer.Option(help="Of a MODEL: a shipped recipe by name, or a YAML file.")] = None,
    schedules: Annotated[int, typer.Option(min=5, help="Schedules to run for each predictor.")] = 60,
    predictors: Annotated[str, typer.Option(help="Predictors, separated by commas.")] = "taylor1,reuse",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each run.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Shifts the evaluation seeds.")] = 0,
    budget: Annotated[
        int | None, typer.Option(min=2, help="Full-compute steps of the schedules; default: three in ten.")
    ] = None,
    corrector: Annotated[
        str | None,
        typer.Option(help="Of the schedules: none, linear or quadratic; default: that of a plan of this budget."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: predicted against measured error.")] = None,
    device: Device = None,
    vram: Vram = None,
    verify: Verify = "once",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run many schedules of a bundle, or of a model quantized, and show how well each predicted cost ranks them.

    Example: cemq analyze digits --schedules 60
    """
    from cemq.build import bundle_of
    from cemq.bundle.checksums import check_verify
    from cemq.evaluation.analysis import analyze as run_analysis
    from cemq.evaluation.analysis import check_analysis, draw
    from cemq.evaluation.compare import check_picture_path
    from cemq.parallel import launched

    with launched() as processes:
        if plot:
            check_picture_path(plot, "plot")
        checked = check_verify(verify)  # where a MODEL is quantized first, that is hours later
        with _at_work(quiet) as progress:
            asked = {
                "schedules": schedules, "predictors": _names(predictors), "budget": budget, "corrector": corrector,
            }  # fmt: skip
            shared = {"device": device, "vram": vram, "progress": progress, "processes": processes}
            check = functools.partial(check_analysis, **asked)
            with bundle_of(bundle, check=check, scheme=scheme, recipe=recipe, **shared) as folder:
                found = run_analysis(folder, samples=samples, seed=seed, verify=checked, **asked, **shared)
        if plot and processes.is_main:
            draw(found, plot)
        if as_json:
            _print_json(found)
            return
        for name, costs in found["spearman"].items():
            print(f"{name}: Spearman of predicted cost and measured error over {schedules} schedules")
            for cost, value in sorted(costs.items(), key=lambda item: -item[1]):
                print(f"  {cost:<22}{value:6.3f}")
        if plot:
            print(plot)


@app.command()
@_one_line_errors
def bench(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Time a bundle and its original, not an architecture.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(help="dit-small, dit-xl-2, pixart-sigma, sd3-medium, flux-dev or wan-1.3b; default: dit-small."),
    ] = None,
    schemes: Annotated[str | None, typer.Option(help="Of --arch, e.g. w8a16,quanto:w8a8; default: w8a8,w4a8.")] = None,
    no_full_precision: Annotated[bool, typer.Option("--no-full-precision", help="Leave full precision out.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: bfloat16, or the bundle's.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Inputs of a forward, samples of a run.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often each variant is timed; default: 15, runs 5.")
    ] = None,
    device: Device = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile every variant of --arch.")] = False,
    kernel: Kernel = "auto",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file to write as well.")] = None,
    verify: Annotated[str | None, _VERIFY] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time full precision against quantized, taking turns in one run, and weigh both.

    Weights of --arch are random, and nothing is downloaded. Ratios are those of medians.

    Example: cemq bench --arch dit-small --schemes w8a8,w4a8,torchao:w8a8
    """
    if bundle and (arch or schemes or compiled):
        raise InputError("--arch, --schemes and --compile do not go with a bundle: leave out one or the other")
    if verify and not bundle:
        raise InputError("--verify is of a bundle, and none is named")
    if output:
        check_writable(output)
    from cemq.bench import bench_architecture, bench_bundle
    from cemq.bench.table import print_benchmark

    given = {
        "dtype": dtype,
        "batch": batch,
        "rounds": rounds,
        "device": device,
        "full_precision": not no_full_precision,
        "verify": verify,
        "kernel": kernel,
    }
    if not bundle:
        names = _names(schemes) if schemes is not None else None
        given |= {"schemes": names, "compiled": compiled}
    settings = {name: value for name, value in given.items() if value is not None}
    with _at_work(quiet) as progress:
        if bundle:
            result = bench_bundle(bundle, progress=progress, **settings)
        else:
            result = bench_architecture(arch or "dit-small", progress=progress, **settings)
    if output:
        with written_whole(output) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        _print_json(result)
    else:
        print_benchmark(result)


@app.command()
@_one_line_errors
def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave torch.compile out, which takes most of the time.")
    ] = False,
    kernel: Kernel = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what this machine can do: every backend and scheme, tried on a tiny model, and every kernel on a layer.

    Example: cemq doctor --quick
    """
    from cemq.bench import examine
    from cemq.bench.table import print_doctor

    with _at_work(quiet) as progress:
        found = examine(quick=quick, kernel=kernel, progress=progress)
    if as_json:
        _print_json(found)
    else:
        print_doctor(found)


@app.command()
@_one_line_errors
def plan_memory(
    bundle: Bundle,
    vram: Annotated[str, typer.Option(help="Device memory to stay within, e.g. 8GiB.")],
    device: Annotated[str, typer.Option(help="Kind of device: cuda or cpu; it need not be here.")] = "cuda",
    budget: Budget = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 1,
    call: Call = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Host memory that weights may rest in, e.g. 16GiB; default: enough.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where a bundle's weights would lie on a device, and what every other placement would cost.

    Bytes of weights are read from the files, those of activations are estimated; nothing is loaded.

    Example: cemq plan-memory digits --vram 8GiB --call height=1024
    """
    from cemq.bundle.plan_memory import plan_memory as run_plan
    from cemq.memory.placement import format_bytes

    _hush_libraries()
    plan = run_plan(
        bundle, vram, device=device, budget=budget, samples=samples, call=_call_arguments(call),
        host_memory=host_memory,
    )  # fmt: skip
    if as_json:
        _print_json(plan.to_dict())
        return
    print(plan.summary())
    print(f"\n{'component':<16}{'weights':>12}{'activations':>14}{'cached':>12}")
    for component in plan.components:
        sizes = [
            format_bytes(size) if size else "-"
            for size in (component.weight_bytes, component.activation_bytes, component.cached_bytes)
        ]
        print(f"{component.name:<16}{sizes[0]:>12}{sizes[1]:>14}{sizes[2]:>12}")
    width = max(len(candidate.name) for candidate in plan.estimates) + 2
    print(f"\n{'placement':<{width}}{'on device':>12}{'in host':>12}{'moved a run':>14}")
    for candidate in plan.estimates:
        sizes = [
            format_bytes(size) if size else "-"
            for size in (candidate.device_bytes + plan.reserve_bytes, candidate.host_bytes, candidate.moved_bytes)
        ]
        verdict = "chosen" if candidate is plan.chosen else "fits" if plan.fits(candidate) else candidate.obstacle
        row = f"{candidate.name:<{width}}{sizes[0]:>12}{sizes[1]:>12}{sizes[2]:>14}  {verdict or 'too large'}"
        print(row)
    if plan.reserve_bytes:
        print(f"\non device: with {format_bytes(plan.reserve_bytes)} for the device's libraries")


@app.command()
@_one_line_errors
def export(
    bundle: Bundle,
    format: Annotated[
        str,
        typer.Option("--format", help="json, for cemq.apply_schedule, or cache-dit, sglang, sglang-dpcache or sd.cpp."),
    ] = "json",
    request: Annotated[
        Path | None, typer.Option(help="For sglang-dpcache: a schedule that the server's dpcache_calibrate wrote.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; default: stdout.")] = None,
) -> None:
    """Write a bundle's schedule for another program, or for a pipeline that someone else quantized.

    Example: cemq export digits --format cache-dit -o digits.yaml
    """
    from cemq.bundle.schedule_file import export as run_export

    text = run_export(bundle, format, request=request)
    if output is None:
        print(text, end="")
        return
    check_writable(output)
    with written_whole(output) as partial:
        partial.write_text(text, encoding="utf-8")
    print(output)


@app.command()
@_one_line_errors
def push(
    bundle: Bundle,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; created if need be.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default: the owner's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Commit message.")] = None,
) -> None:
    """Upload a bundle to the Hugging Face Hub, with its model card; from_pretrained("owner/name") loads it there.

    Example: cemq push digits someone/digits-w8a8
    """
    from cemq.bundle.hub import push_to_hub

    print(
        push_to_hub(bundle, repository, private=private, revision=revision, create_pr=create_pr, commit_message=message)
    )


def _version(value: bool) -> None:
    if value:
        print(f"cemq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize a diffusion transformer, plan which steps it may skip, and ship both as one folder.

    Errors are one line; CEMQ_TRACEBACK=1 in the environment shows where they come from.
    """
    load_extensions()
