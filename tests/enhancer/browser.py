"""A headless Chromium to click through a page, driven by its DevTools protocol over two pipes: no package, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
WHY_NOT = "needs Debian's chromium"
NATIVE = {"Escape": 27}  # keys that the browser itself answers, by their number


class Browser:
    """One page at a time. `problems`: what the page's console complained of, and every request that left the page."""

    def __init__(self) -> None:
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
        fixed = _above(theirs_in), _above(theirs_out)  # descriptors that moving to 3 and 4 cannot close
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--hide-scrollbars",
            f"--user-data-dir={self._profile}",
            "--no-first-run",
            "--disable-extensions",
            "about:blank",
        ]
        shell = f'exec 3<&{fixed[0]} 4>&{fixed[1]}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command],
            pass_fds=fixed,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for end in {theirs_in, theirs_out, *fixed}:
            os.close(end)
        self._in, self._out, self._buffer, self._count = ours_in, ours_out, b"", 0
        self.problems: list[str] = []
        self.loaded = False
        targets = self._send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._send("Browser.close")
        except (OSError, TimeoutError):
            pass
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for end in (self._in, self._out):
            os.close(end)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, page: Path, width: int, height: int = 900, phone: bool = False) -> float:
        """Shows a file; seconds until it has drawn its first picture on a canvas."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.problems, self.loaded = [], False
        began = time.monotonic()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self.run("document.readyState === 'complete' && document.querySelector('#maps canvas') !== null"):
            if time.monotonic() - began > 60:
                raise TimeoutError("the page did not draw")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return time.monotonic() - began

    def run(self, script: str) -> Any:
        """The value of an expression in the page (a promise's result). Raises RuntimeError for its exception."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", {}).get("description")))
        return answer["result"].get("value")

    def press(self, key: str, code: str = "", text: str = "") -> None:
        """One key down and up."""
        native = {"windowsVirtualKeyCode": NATIVE[key]} if key in NATIVE else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=code or key,
                **native,
                **({"text": text} if text and kind == "keyDown" else {}),
            )
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def call(self, method: str, **parameters: Any) -> dict:
        """One command of the protocol to the page."""
        return self._send(method, self._session, **parameters)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _receive(self, patience: float = 120) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], patience)[0]:
                raise TimeoutError("chromium says nothing")
            part = os.read(self._in, 1 << 16)
            if not part:
                raise OSError("chromium has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict) -> None:
        name, said = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.problems.append(str(said["exceptionDetails"].get("exception", {}).get("description")))
        elif name == "Runtime.consoleAPICalled":
            self.problems.append(f"console.{said['type']}: {[arg.get('value') for arg in said['args']]}")
        elif name == "Log.entryAdded":
            self.problems.append(f"{said['entry']['level']}: {said['entry']['text']}")
        elif name == "Network.requestWillBeSent" and not said["request"]["url"].startswith(
            ("file:", "data:", "about:")
        ):
            self.problems.append(f"request: {said['request']['url']}")


def _above(descriptor: int) -> int:
    """A copy of a descriptor beyond 9, which bash can redirect from."""
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
