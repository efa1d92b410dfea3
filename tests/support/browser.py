"""A headless Chromium, driven through chromedriver by the WebDriver protocol; nothing but the standard library."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromedriver")
IS_THERE = all(map(shutil.which, PROGRAMS))
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
_SECONDS = 180


class Browser:
    """One page in one window."""

    def __init__(self, driver: str, session: str) -> None:
        self._session_address = f"{driver}/session/{session}"

    def open(self, address: str) -> None:
        _ask(f"{self._session_address}/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function's body returns in the page."""
        return _ask(f"{self._session_address}/execute/sync", {"script": script, "args": arguments})

    def wait(self, script: str, *arguments: Any) -> Any:
        """The first value that counts as true; raises AssertionError if none comes."""
        return waited(lambda: self.run(script, *arguments), script)

    def size(self, width: int, height: int) -> None:
        _ask(f"{self._session_address}/window/rect", {"width": width, "height": height})

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(_ask(f"{self._session_address}/screenshot")))

    def errors(self) -> list[str]:
        """What the console says, since it was last asked."""
        return [each["message"] for each in _ask(f"{self._session_address}/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses of everything that was asked for, since it was last asked."""
        found = _ask(f"{self._session_address}/se/log", {"type": "performance"})
        said = [json.loads(each["message"])["message"] for each in found]
        return [each["params"]["request"]["url"] for each in said if each["method"] == "Network.requestWillBeSent"]


def waited(found: Callable[[], Any], what: str) -> Any:
    """The first value of ``found`` that counts as true; raises AssertionError if none comes."""
    for _ in range(_SECONDS * 20):
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {_SECONDS} s in vain: {what}")


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A fresh one, that keeps what it keeps in ``folder``."""
    log = folder / "chromedriver.log"
    driver = subprocess.Popen(["chromedriver", "--port=0", f"--log-path={log}"], stdout=subprocess.PIPE, text=True)
    address, session = None, None
    try:
        for line in driver.stdout:
            if found := re.search(r"on port (\d+)", line):
                address = f"http://127.0.0.1:{found[1]}"
                if "successfully" in line:
                    break
        options = {"args": [*_FLAGS, f"--user-data-dir={folder / 'profile'}"]}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = _ask(f"{address}/session", {"capabilities": {"alwaysMatch": asked}})["sessionId"]
        page = Browser(address, session)
        page.open("about:blank")
        page.requests(), page.errors()  # of the page that it begins with
        yield page
    finally:
        if session:
            _ask(f"{address}/session/{session}", method="DELETE")
        driver.terminate()
        driver.wait()
        driver.stdout.close()


def _ask(address: str, content: Any = None, method: str | None = None) -> Any:
    data = None if content is None else json.dumps(content).encode()
    asked = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(asked, timeout=_SECONDS) as answer:
        return json.load(answer)["value"]
