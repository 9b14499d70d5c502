"""A headless Chromium, driven over its debugging pipe: opens a page, hears its console, asks it, photographs it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
INSTALL = "apt-get install -y --no-install-recommends chromium"
DEADLINE_S = 60.0


def find() -> str | None:
    """Path of the browser; None where there is none."""
    return next((path for program in PROGRAMS if (path := shutil.which(program))), None)


class Chromium:
    """One browser with one page. `complaints`: what the console, a script or a refused piece of the page said."""

    def __init__(self, folder: Path) -> None:
        program = find()
        assert program is not None, f"no Chromium found: {INSTALL}"
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()

        def hand_over() -> None:
            """The browser reads commands from descriptor 3 and answers on 4."""
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (theirs_in, theirs_out)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        options = ["--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += ["--disable-dev-shm-usage", f"--user-data-dir={folder}"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []
        self.complaints: list[str] = []
        self._log = (folder.parent / "chromium.log").open("wb")
        self._process = subprocess.Popen(
            [program, *options, "about:blank"],
            pass_fds=(3, 4),
            preexec_fn=hand_over,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "HOME": str(folder)},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out, self._rest, self._number, self._session = ours_in, ours_out, b"", 0, ""
        page = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, *, is_phone: bool = False) -> None:
        """Load a page into a window of that width, and wait until it is loaded."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def photograph(self, file: Path) -> None:
        """The whole page as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for descriptor in (self._in, self._out):
            os.close(descriptor)
        self._log.close()

    def _next(self) -> dict[str, Any]:
        end_s = time.monotonic() + DEADLINE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end_s - time.monotonic()))
            assert ready, f"no word from the browser in {DEADLINE_S:.0f} s"
            piece = os.read(self._in, 1 << 20)
            assert piece, f"the browser ended: {self._process.poll()}"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(message["params"]))
        return message
