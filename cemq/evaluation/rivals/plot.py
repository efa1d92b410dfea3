"""The plot of a comparison: fidelity over compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cemq.evaluation.compare import check_picture_path
from cemq.evaluation.rivals.contest import FULL, Row
from cemq.files import written_whole

_COLUMNS = 3  # panels side by side


def draw(rows: Sequence[Row], path: Path) -> None:
    """A PNG: PSNR over compute ratio, a panel for each scheme; methods of cemq are drawn thick.

    Raises:
        InputError: It cannot be written.
    """
    from matplotlib.figure import Figure

    check_picture_path(path, "plot")
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    columns = min(len(schemes), _COLUMNS)
    lines = -(-len(schemes) // columns)
    figure = Figure(figsize=(5.5 * columns + 3.5, max(5 * lines, 6.5)), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in panels[len(schemes) :]:
        unused.set_axis_off()
    ours = {"linewidth": 3, "zorder": 3, "color": "black"}
    for axes, scheme in zip(panels, schemes, strict=False):
        for number, name in enumerate(_best_first(rows)):
            points = sorted(
                (row.compute_ratio, row.psnr_db)
                for row in rows
                if (row.scheme, row.method, row.status) == (scheme, name, "ok")
            )
            style = ours if name.startswith("cemq") else {"linewidth": 1, "color": f"C{number % 10}"}
            marker, dashes = "osv^Dx+"[number // 10 % 7], "--" if name == "cemq-predicted" else "-"
            where = zip(*points, strict=True) if points else ([], [])
            axes.plot(*where, marker=marker, linestyle=dashes, label=name, **style)
        axes.set(title=scheme, xlabel="compute ratio", ylabel="PSNR to full precision, dB")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small", ncols=2)
    with written_whole(path, "plot") as partial:
        figure.savefig(partial, format="png", dpi=80)


def _best_first(rows: Sequence[Row]) -> list[str]:
    """Names of methods, by their mean PSNR in all rows that came to something."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.method != FULL:
            found.setdefault(row.method, []).extend([row.psnr_db] if row.psnr_db is not None else [])
    return sorted(found, key=lambda name: -sum(found[name]) / max(len(found[name]), 1))
