"""`cemq play`: a page on this machine alone, from the standard library's server; it asks nothing of anybody else.

The page sends what is to be drawn as JSON, and what happens comes back as a line of JSON for each event, as it happens.
That takes no package; gradio, which would do as well, asks for older releases of Pillow and tomlkit than cemq is tested
with, and its pages load fonts and report usage elsewhere unless told not to.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Unpack

from cemq.bundle.load import Loading
from cemq.errors import CemqError, InputError, first_line
from cemq.evaluation.play import Asked, Event, Player, StoppedError, open_player, to_dict
from cemq.evaluation.templates import digest, rendered

HOST, PORT = "127.0.0.1", 7900
_TEMPLATE = "play.html.jinja"
_MOST = 1 << 16  # bytes of a request
_SHOWN_LABELS = 2000


class Server(ThreadingTCPServer):
    """Listens on this machine's own address; ``player`` must be set before anything is asked.

    Args:
        port: 0 takes any that is free; ``address`` tells which.

    Raises:
        InputError: The port is taken, or may not be had.
    """

    allow_reuse_address = True
    daemon_threads = True
    player: Player

    def __init__(self, port: int = PORT) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise InputError(f"port {port} cannot be had ({reason}): name another with --port, 0 for any") from None

    @property
    def names(self) -> tuple[str, ...]:
        """What a browser on this machine calls it."""
        return tuple(f"{name}:{self.server_address[1]}" for name in (HOST, "localhost"))

    @property
    def address(self) -> str:
        return f"http://{self.names[0]}/"


def play(
    bundle: str | Path,
    *,
    port: int = PORT,
    reference: str | None = None,
    on_ready: Callable[[str], None] = print,
    **loading: Unpack[Loading],
) -> None:
    """Serve a page that draws with a bundle, until Ctrl-C.

    Args:
        port: Of the address 127.0.0.1; 0 takes any that is free.
        reference: As of `open_player`, and ``loading`` too.
        on_ready: Told the address, once the page can be opened.

    Raises:
        CemqError: The port is taken, or the bundle cannot be loaded.
    """
    with Server(port) as server:  # before seconds or minutes of loading
        server.player = open_player(bundle, reference=reference, **loading)
        on_ready(server.address)
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            server.player.stop()


def page_of(player: Player) -> str:
    """The page as HTML."""
    manifest, first = player.manifest, player.first
    shares = manifest.model_bytes, manifest.reference_bytes
    return rendered(
        _TEMPLATE, name=player.name, manifest=manifest, first=first, marks=player.marks(first), shares=shares,
        takes_labels=player.takes_labels, labels=list(player.labels)[:_SHOWN_LABELS],
        has_reference=player.original is not None, absent=player.absent, most=manifest.schedule.num_steps,
    )  # fmt: skip


class _GoneError(Exception):
    """Whoever asked has closed the page, or asked to stop."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60  # seconds for a request to arrive

    def do_GET(self) -> None:
        if not self._is_from_here():
            return
        if self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        page = page_of(self.server.player)
        script = page.partition("<script>")[2].partition("</script>")[0]
        policy = (
            "default-src 'none'; connect-src 'self'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
            f"script-src '{digest(script)}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._begin("text/html; charset=utf-8", {"Content-Security-Policy": policy})
        self.wfile.write(page.encode())

    def do_POST(self) -> None:
        if not self._is_from_here():
            return
        if self.path not in ("/plan", "/draw"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content = self._content()
        self._begin("application/x-ndjson")
        with contextlib.suppress(_GoneError, StoppedError):
            try:
                asked = Asked.from_dict(content)
                if self.path == "/plan":
                    self._tell({"event": "planned", "marks": self.server.player.marks(asked)})
                else:
                    self.server.player.turn(asked, self._tell_event)
                    self._tell({"event": "ended"})
            except CemqError as error:
                self._tell({"event": "failed", "reason": str(error)})

    def _is_from_here(self) -> bool:
        """Whether this page asks: no other that a browser has open may, nor a name that leads here by trickery."""
        origin = self.headers.get("Origin")
        is_ours = self.headers.get("Host") in self.server.names and origin in (
            None, *(f"http://{name}" for name in self.server.names),
        )  # fmt: skip
        if self.command == "POST" and self.headers.get("Content-Type") != "application/json":
            is_ours = False  # a form of another page cannot send this
        if not is_ours:
            self.send_error(HTTPStatus.FORBIDDEN)
        return is_ours

    def _content(self) -> Any:
        """What was sent, or None where that is no JSON."""
        try:
            length = min(int(self.headers.get("Content-Length") or 0), _MOST)
            return json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            return None

    def _begin(self, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(HTTPStatus.OK)
        shared = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        for name, value in ({"Content-Type": kind} | shared | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def _tell_event(self, event: Event) -> None:
        self._tell(to_dict(event))

    def _tell(self, event: dict[str, Any]) -> None:
        try:
            self.wfile.write(json.dumps(event).encode() + b"\n")
            self.wfile.flush()
        except OSError:
            raise _GoneError from None

    def log_message(self, *_: Any) -> None:
        """Requests of one's own page are no news."""
