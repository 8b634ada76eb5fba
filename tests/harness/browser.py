"""A browser without a window, told over a pipe what to do (the DevTools protocol).

with Browser(folder) as browser:
    browser.open(uri, width=400)
    browser.show(media="screen", scheme="dark")
    browser.ask("document.title")
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .procs import wait_until

CHROMIUM = shutil.which("chromium")

_OFFLINE = ("--disable-sync", "--disable-background-networking", "--disable-component-update")


class Browser:
    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def place() -> None:
            """It reads 3 and writes 4, which our own ends may be."""
            for number, end in enumerate(
                [fcntl.fcntl(one, fcntl.F_DUPFD, 50) for one in (theirs_in, theirs_out)]
            ):
                os.dup2(end, 3 + number)

        words = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
        self._process = subprocess.Popen(
            [CHROMIUM, *words, *_OFFLINE, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=place,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest = 0, b""
        self._events: list[dict[str, Any]] = []
        self._session = ""
        page = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Network", "Page"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, uri: str, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url=uri)
        wait_until(lambda: self.ask("document.readyState") == "complete", 60, "the page")

    def show(self, media: str, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", media=media, features=features)

    def ask(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get(
            "value"
        )

    def requests(self) -> list[str]:
        """All that it asked for so far."""
        sent = [
            event["params"] for event in self._events if event.get("method") == "Network.requestWillBeSent"
        ]
        return [params["request"]["url"] for params in sent]

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self._number:
            self._events.append(found)
        result: dict[str, Any] = found["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 65536)
            assert more, "the browser is gone"
            self._rest += more
        one, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(one)
        return found
