"""A headless Chromium, driven over a pipe by the DevTools protocol: no driver program and no package is needed."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
#: Environment variable that names the program where it is not on PATH.
VARIABLE = "HAL_CHROMIUM"
#: Seconds without an answer after which the browser is given up.
TIMEOUT = 90


def program() -> str | None:
    """The browser's path; None where there is none."""
    named = os.environ.get(VARIABLE)
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """One page of a browser. A context manager; messages go over the file descriptors 3 and 4 of the browser."""

    def __init__(self) -> None:
        found = program()
        assert found is not None
        self._profile = tempfile.TemporaryDirectory(prefix="hal-chromium-", ignore_cleanup_errors=True)
        command_out, command_in = os.pipe()
        reply_out, reply_in = os.pipe()
        command = [
            found,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]
        shell = f'exec "$@" 3<&{command_out} 4>&{reply_in}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command],
            pass_fds=(command_out, reply_in),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_out)
        os.close(reply_in)
        self._in, self._out = os.fdopen(command_in, "wb", buffering=0), os.fdopen(reply_out, "rb", buffering=0)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        self.messages: list[str] = []
        self.send("Runtime.enable")
        self.send("Log.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._in.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return dict(reply["result"])
            if reply.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.messages.append(json.dumps(reply["params"])[:500])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], TIMEOUT)
            read = self._out.read(1 << 16) if ready else b""
            if not read:
                self._process.kill()
                raise RuntimeError("the browser went away" if ready else f"the browser was silent for {TIMEOUT} s")
            self._rest += read
        first, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(first))

    def open(self, page: Path, width: int, *, dark: bool = False, height: int = 900) -> None:
        """Show a file in a window of a width, in pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send("Page.navigate", url=page.resolve().as_uri())
        while self.run("document.readyState") != "complete" or "about:" in self.run("location.href"):
            time.sleep(0.02)

    def run(self, code: str) -> Any:
        """The value of an expression of JavaScript; promises are awaited."""
        done = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(str(done["exceptionDetails"])[:1000])
        return done["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key, with its name and its Windows key code."""
        options: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **options)
        self.send("Input.dispatchKeyEvent", type="keyUp", **options)

    def screenshot(self, path: Path) -> None:
        """Save a picture of what the window shows."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()
        self._profile.cleanup()
