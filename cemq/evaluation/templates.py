"""Pages of HTML from the templates that lie here; whatever is put into them is escaped."""

from __future__ import annotations

import base64
import hashlib
from typing import Any


def rendered(template: str, **values: Any) -> str:
    """A template with its values; a name in it that none of them has is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    around = Environment(
        loader=PackageLoader("cemq.evaluation", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    around.filters |= {"bytes": bytes_text, "digest": digest}
    return around.get_template(template).render(**values)


def bytes_text(count: int) -> str:
    """A size for people.

    >>> bytes_text(3_400_000)
    '3.4 MB'
    """
    value, unit = next((count / size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
                       if count >= size or size == 1)  # fmt: skip
    return f"{value:.1f} {unit}" if unit != "bytes" else f"{count} bytes"


def digest(text: str) -> str:
    """As a Content-Security-Policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
