"""What mkdocs.yml cannot say: equations become MathML while the site is built, so that readers need no script."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Fences named ``math``, as GitHub has them, are equations."""
    fence = {"name": "math", "class": "math", "format": _equation}
    config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", []).append(fence)
    return config


def _equation(source: str, *_: Any, **__: Any) -> str:
    return convert(source.strip(), display="block")
