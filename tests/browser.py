"""A headless Chromium for tests of pages, by the WebDriver protocol: it needs no package but Debian's chromium-driver.

`opened` yields a Tab, which opens a page at a width and under a colour scheme, runs JavaScript, takes screenshots, and
says what the page logged and which requests it sent.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Child, wait_until

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
)  # fmt: skip
PHONE, DESKTOP = 390, 1280


def browser_missing() -> str:
    """Return why there is no browser to test with; nothing where there is one."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not installed (apt install chromium chromium-driver)" if missing else ""


needs_browser = pytest.mark.skipif(bool(browser_missing()), reason=browser_missing() or "a browser is there")


@dataclass
class Tab:
    """A page in the browser."""

    session: str
    """Address of the WebDriver session."""

    def run(self, script: str) -> Any:
        """Run JavaScript; returns what it returns."""
        return _request(f"{self.session}/execute/sync", {"script": script, "args": []})

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a command of the Chrome DevTools protocol."""
        return _request(f"{self.session}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def open(self, path: Path, scheme: str = "light", width: int = DESKTOP, height: int = 900) -> None:
        """Open a page under a colour scheme, at a width, and wait until its figures are drawn."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width == PHONE
        )
        _request(f"{self.session}/url", {"url": path.resolve().as_uri()})
        wait_until(lambda: self.run("return document.documentElement.dataset.drawn === 'yes'"), 30, self.errors_text)

    def errors(self) -> list[str]:
        """Return what the page logged since the last call, warnings included."""
        return [entry["message"] for entry in _request(f"{self.session}/se/log", {"type": "browser"})]

    def errors_text(self) -> str:
        """Return what the page logged as one text."""
        return "; ".join(self.errors())

    def requests(self) -> list[str]:
        """Return the addresses that pages asked for since the last call, but for data within them."""
        messages = [
            json.loads(e["message"])["message"] for e in _request(f"{self.session}/se/log", {"type": "performance"})
        ]
        sent = [
            m["params"]["request"]["url"]
            for m in messages
            # The browser's own start page sends some, too.
            if m["method"] == "Network.requestWillBeSent" and not m["params"]["documentURL"].startswith("chrome:")
        ]
        return [url for url in sent if not url.startswith(("data:", "blob:"))]

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(picture["data"]))


@contextmanager
def opened(folder: Path) -> Iterator[Tab]:
    """Start a browser with an empty profile in the folder; yields its tab."""
    log = (folder / "driver.log").open("w+")
    child = Child(["chromedriver", "--port=0"], stdout=log, stderr=log, env={**os.environ, "HOME": str(folder)})
    try:
        text = folder / "driver.log"
        wait_until(lambda: "was started successfully on port" in text.read_text(), 30, text.read_text)
        port = re.search(r"successfully on port (\d+)", text.read_text())
        assert port is not None
        options = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"],
        }
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        address = f"http://127.0.0.1:{port[1]}/session"
        session = _request(address, {"capabilities": {"alwaysMatch": capabilities}})
        tab = Tab(f"{address}/{session['sessionId']}")
        yield tab
        _request(tab.session, None, "DELETE")
    finally:
        child.end_family()
        log.close()


def _request(url: str, body: Any, method: str = "POST") -> Any:
    """Send a request to the driver, which no proxy may take; returns its value."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=60) as reply:
            return json.load(reply)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.read().decode()}") from None
