"""Where a pipeline's weights lie while it runs, chosen by arithmetic: bytes in, a plan out, no torch and no files.

Device memory is counted as weights that lie there plus what one forward allocates beside them. `footprint` finds these
numbers in a bundle, `runtime.place` carries a plan out with diffusers' and accelerate's own offloading.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from cemq.errors import InputError, PlacementError

Role = Literal["denoiser", "vae", "other"]
Vae = Literal["whole", "sliced", "tiled"]
VAE_MODES: tuple[Vae, ...] = ("whole", "sliced", "tiled")
GIB = 1 << 30
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": GIB}


@dataclass(frozen=True, kw_only=True)
class ComponentMemory:
    """Bytes of one model of a pipeline.

    Args:
        weight_bytes: Parameters and buffers.
        activation_bytes: What one forward allocates beside the weights at most; of a VAE, one decode of all samples.
        cached_bytes: Of a denoiser, what its step cache holds beside that at most, until the last step.
        calls: Forwards a run; of a denoiser, its full-compute evaluations.
        blocks: Weights of each block that is moved as one by block-level group offloading, in the order of execution.
        largest_leaves: The largest and second largest weights that belong to a single layer.
        in_sequence: Whether the pipeline's model offloading takes turns with it; if not it stays until the run ends.
        groups: Whether diffusers allows group offloading of its class.
        vae_activation_bytes: Of a VAE, activation bytes when it is ``sliced`` and ``tiled``.
    """

    name: str
    role: Role
    weight_bytes: int
    activation_bytes: int
    cached_bytes: int = 0
    calls: int = 1
    blocks: tuple[int, ...] = ()
    largest_leaves: tuple[int, int] = (0, 0)
    in_sequence: bool = True
    groups: bool = True
    vae_activation_bytes: tuple[int, int] | None = None

    def activations(self, vae: Vae) -> int:
        if self.vae_activation_bytes is None or vae == "whole":
            return self.activation_bytes + self.cached_bytes
        return self.vae_activation_bytes[VAE_MODES.index(vae) - 1]

    def resident(self, unit: str, streams: bool) -> int:
        """Weights on the device while it runs, if they come and go by ``unit``; streams load one ahead."""
        if unit == "block" and self.role == "denoiser":
            pairs = [sum(pair) for pair in zip(self.blocks, self.blocks[1:], strict=False)]
            most = max(pairs if streams and pairs else self.blocks, default=0)
            return self.weight_bytes - sum(self.blocks) + most
        return min(self.weight_bytes, sum(self.largest_leaves) if streams else self.largest_leaves[0])


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One way to place weights.

    Args:
        unit: What is moved at a time: nothing, a whole ``component``, a ``block`` or a ``leaf`` (single layer).
        streams: Whether the next block or layer is loaded while this one runs; denoiser only.
        disk: Whether weights rest on disk instead of in host memory.
        hooks: Whose offloading it is: of diffusers in ``groups``, or of ``accelerate``.
    """

    name: str
    unit: Literal["nothing", "component", "block", "leaf"]
    streams: bool = False
    disk: bool = False
    hooks: Literal["", "groups", "accelerate"] = ""


ON_DEVICE = Placement(name="on device", unit="nothing")
MODEL = Placement(name="model offload", unit="component", hooks="accelerate")
# What computes on a CPU can read weights off the files that they came in, which the kernel maps. They lie there as they
# were written, and other alignments run other kernels: what is computed differs in its last bits.
MAPPED = Placement(name="in the model's files", unit="leaf", disk=True)
# From the one that costs least time to the one that costs most.
PLACEMENTS = (
    ON_DEVICE,
    MODEL,
    Placement(name="group offload, block level, streams", unit="block", streams=True, hooks="groups"),
    Placement(name="group offload, block level", unit="block", hooks="groups"),
    Placement(name="group offload, leaf level, streams", unit="leaf", streams=True, hooks="groups"),
    Placement(name="group offload, leaf level", unit="leaf", hooks="groups"),
    Placement(name="sequential offload", unit="leaf", hooks="accelerate"),
    Placement(name="group offload to disk, block level", unit="block", disk=True, hooks="groups"),
    Placement(name="group offload to disk, leaf level", unit="leaf", disk=True, hooks="groups"),
    Placement(name="sequential offload to disk", unit="leaf", disk=True, hooks="accelerate"),
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one placement needs.

    Args:
        device_bytes: The most that lies on the device at a time, ``reserve`` of the plan left out.
        host_bytes: Weights that rest in host memory.
        moved_bytes: Weights moved to the device in one run; steps that are skipped move none.
        obstacle: Why it cannot be had here whatever the memory; empty where it can.
        largest: The component that needs most, and its weights and activations there, bytes.
    """

    placement: Placement
    vae: Vae
    device_bytes: int
    host_bytes: int
    moved_bytes: int
    obstacle: str
    largest: tuple[str, int, int]

    @property
    def name(self) -> str:
        return self.placement.name + {"whole": "", "sliced": ", VAE sliced", "tiled": ", VAE tiled"}[self.vae]

    def to_dict(self) -> dict[str, Any]:
        name, weights, activations = self.largest
        return {
            "name": self.name,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "moved_bytes": self.moved_bytes,
            "obstacle": self.obstacle,
            "largest": {"component": name, "weight_bytes": weights, "activation_bytes": activations},
        }


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The placement that was chosen, and all that were weighed, from the cheapest to run to the dearest.

    Args:
        limit_bytes: Device memory that may be used.
        reserve_bytes: Of it, what the device's own libraries take and no plan counts.
    """

    limit_bytes: int
    reserve_bytes: int
    device: str
    components: tuple[ComponentMemory, ...]
    chosen: Estimate
    estimates: tuple[Estimate, ...]

    def fits(self, estimate: Estimate) -> bool:
        return not estimate.obstacle and estimate.device_bytes + self.reserve_bytes <= self.limit_bytes

    def with_cached(self, name: str, cached_bytes: int) -> Estimate:
        """What the chosen placement needs where a denoiser's step cache holds so much."""
        components = [
            dataclasses.replace(each, cached_bytes=cached_bytes) if each.name == name else each
            for each in self.components
        ]
        chosen = self.chosen
        return estimate(components, chosen.placement, chosen.vae, device=self.device, host_limit=None)

    def summary(self) -> str:
        """One line: what was chosen and what it needs."""
        chosen = self.chosen
        moved = f", {format_bytes(chosen.moved_bytes)} moved to it a run" if chosen.moved_bytes else ""
        return (
            f"{chosen.name}: {format_bytes(chosen.device_bytes + self.reserve_bytes)} of "
            f"{format_bytes(self.limit_bytes)} on {self.device}{moved}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "limit_bytes": self.limit_bytes,
            "reserve_bytes": self.reserve_bytes,
            "device": self.device,
            "chosen": self.chosen.name,
            "components": [dataclasses.asdict(component) for component in self.components],
            "placements": [e.to_dict() | {"fits": self.fits(e)} for e in self.estimates],
        }


def estimate(
    components: Sequence[ComponentMemory], placement: Placement, vae: Vae, *, device: str, host_limit: int | None
) -> Estimate:
    """What a placement needs on a kind of device (``cpu``, ``cuda``, ...).

    Args:
        host_limit: Host memory that weights may rest in; None leaves it out of account.
    """
    stays = [c for c in components if _stays(c, placement)]
    moves = [c for c in components if c not in stays]
    base = sum(c.weight_bytes for c in stays)

    def resident(component: ComponentMemory) -> int:
        if component in stays:
            return 0
        if placement.unit == "component":
            return component.weight_bytes
        return component.resident(placement.unit, placement.streams and component.role == "denoiser")

    needs = [(resident(c) + c.activations(vae), c) for c in components]
    most, largest = max(needs, key=lambda need: need[0])
    moved = sum(c.weight_bytes * (1 if placement.unit == "component" else c.calls) for c in moves)
    host = 0 if placement.disk else sum(c.weight_bytes for c in moves)
    return Estimate(
        placement=placement,
        vae=vae,
        device_bytes=base + most,
        host_bytes=host,
        moved_bytes=moved,
        obstacle=_obstacle(components, placement, host, device=device, host_limit=host_limit),
        largest=(
            largest.name,
            resident(largest) if largest in moves else largest.weight_bytes,
            largest.activations(vae),
        ),
    )


def _stays(component: ComponentMemory, placement: Placement) -> bool:
    if placement.unit == "nothing":
        return True
    if placement.unit == "component":
        return not component.in_sequence
    return placement.hooks == "groups" and not component.groups


def _obstacle(
    components: Sequence[ComponentMemory], placement: Placement, host: int, *, device: str, host_limit: int | None
) -> str:
    if device == "cpu" and placement.unit != "nothing" and not placement.disk:
        return "on a CPU, weights in host memory are weights on the device"
    denoisers = [c for c in components if c.role == "denoiser"]
    if placement.hooks == "groups" and any(not c.groups for c in denoisers):
        return "diffusers excludes the denoiser's class from group offloading"
    if placement.unit == "block" and any(not c.blocks for c in denoisers):
        return "the denoiser has no list of blocks"
    if placement.unit == "component" and not any(c.in_sequence for c in components):
        return "the pipeline has no order for model offloading"
    if host_limit is not None and host > host_limit:
        return f"{format_bytes(host)} of weights do not fit in {format_bytes(host_limit)} of free host memory"
    return ""


def plan_placement(
    components: Iterable[ComponentMemory],
    limit_bytes: int,
    *,
    device: str,
    reserve_bytes: int = 0,
    host_limit: int | None = None,
    samples: int = 1,
    placements: Sequence[Placement] = PLACEMENTS,
    reserved_for: str = "the device's libraries",
) -> MemoryPlan:
    """The cheapest placement that fits, with what every other one would cost.

    A VAE that decodes sample by sample costs nothing, so it comes first where there are several samples; one that
    decodes in tiles blends their seams, but comes before weights that move.

    Args:
        limit_bytes: Device memory that may be used.
        reserve_bytes: Of it, what the device's own libraries take.
        samples: Pictures drawn at once.
        placements: Those to choose from, from the one that costs least time to the one that costs most.
        reserved_for: What ``reserve_bytes`` are for, in words.

    Raises:
        PlacementError: Nothing fits; says how much the least one needs, and for what.

    >>> model = ComponentMemory(name="transformer", role="denoiser", weight_bytes=800, activation_bytes=100, calls=10,
    ...                         blocks=(200, 200, 200), largest_leaves=(50, 40))
    >>> vae = ComponentMemory(name="vae", role="vae", weight_bytes=50, activation_bytes=300, largest_leaves=(20, 10))
    >>> [plan_placement([model, vae], limit, device="cuda").chosen.name for limit in (1150, 900, 700, 500)]
    ['on device', 'model offload', 'group offload, block level, streams', 'group offload, block level']
    """
    components = tuple(components)
    modes: list[Vae] = [vae for vae in VAE_MODES if vae == "whole" or _vae_mode_helps(components, vae, samples)]
    estimates = tuple(
        estimate(components, placement, vae, device=device, host_limit=host_limit)
        for placement in placements
        for vae in modes
    )
    plan = MemoryPlan(
        limit_bytes=limit_bytes,
        reserve_bytes=reserve_bytes,
        device=device,
        components=components,
        chosen=estimates[0],
        estimates=estimates,
    )
    for candidate in estimates:
        if plan.fits(candidate):
            return dataclasses.replace(plan, chosen=candidate)
    least = min((e for e in estimates if not e.obstacle), key=lambda e: e.device_bytes)
    name, weights, activations = least.largest
    reserve = f" and {format_bytes(reserve_bytes)} for {reserved_for}" if reserve_bytes else ""
    raise PlacementError(
        f"vram={format_bytes(limit_bytes)}: nothing fits. The least is {least.name}, "
        f"{format_bytes(least.device_bytes + reserve_bytes)} ({name}: {format_bytes(weights)} of weights, "
        f"{format_bytes(activations)} of activations{reserve}): allow that much, or draw smaller or fewer pictures"
    )


def _vae_mode_helps(components: Sequence[ComponentMemory], vae: Vae, samples: int) -> bool:
    if vae == "sliced" and samples == 1:
        return False
    before: Vae = "sliced" if vae == "tiled" and samples > 1 else "whole"
    return any(c.activations(vae) < c.activations(before) for c in components if c.role == "vae")


def parse_bytes(text: str | int) -> int:
    """Bytes from ``8GiB``, ``8 GB``, ``500MB`` or a number of bytes.

    Raises:
        InputError: Anything else.

    >>> parse_bytes("1.5GiB"), parse_bytes("2 GB"), parse_bytes(4096)
    (1610612736, 2000000000, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B)?", str(text).strip(), re.IGNORECASE)
    size = int(Decimal(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if size < 1:
        raise InputError(f"memory {str(text)!r}: write a size such as 8GiB, 500MB or a number of bytes")
    return size


def format_bytes(size: int) -> str:
    """
    >>> format_bytes(3 << 29), format_bytes(20_000_000), format_bytes(900)
    ('1.50 GiB', '19.1 MiB', '900 B')
    """  # fmt: skip
    for unit, name, digits in ((GIB, "GiB", 2), (1 << 20, "MiB", 1), (1 << 10, "KiB", 1)):
        if size >= unit:
            return f"{size / unit:.{digits}f} {name}"
    return f"{size} B"


def transformer_activation_bytes(
    *, rows: int, hidden: int, widest: int, itemsize: int, integer_activations: bool = False
) -> int:
    """What a forward of a transformer allocates beside weights and inputs, with attention that keeps no scores.

    Fitted to live bytes of DiT, PixArt, SD3, FLUX and Wan at their native sizes: never less, at most a third more
    (`tests/test_placement.py` measures them again).

    Args:
        rows: Tokens of picture and text, times samples, times guidance branches that run together.
        hidden: Width of a token between blocks.
        widest: The most features a token has inside a block: inputs or outputs of the widest layer.
        itemsize: Bytes of an activation.
        integer_activations: Whether layers multiply in int8: the sums are int32 first.
    """
    return rows * (itemsize * (6 * hidden + (9 * widest) // 4) + (5 * widest if integer_activations else 0))


def vae_activation_bytes(
    *, samples: int, height: int, width: int, channels: Sequence[int], itemsize: int, frames: int = 1
) -> int:
    """What a convolutional decoder allocates: three times what enters its finest level, or 5.5 times what leaves it.

    Fitted to live bytes of AutoencoderKL, as `transformer_activation_bytes` is.

    Args:
        height: Pixels of what is decoded at once: the picture, or one tile.
        channels: ``block_out_channels``, from the finest level to the coarsest.
    """
    pixels = samples * frames * height * width
    inputs = (*channels[1:], channels[-1])
    widest = max(max(3 * inputs[level], 5.5 * wide) / 4**level for level, wide in enumerate(channels))
    return int(pixels * itemsize * (widest + 6))
