"""A headless Chromium that tests speak to through its DevTools protocol, over pipes: no driver, no port, no package."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

#: What a page does that a page without script and without anything from elsewhere must not do.
_FAULTS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
_TIMEOUT_S = 60.0


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One process with one tab. `profile_dir`: an empty folder of its own."""

    def __init__(self, path: str, profile_dir: Path) -> None:
        to_browser, from_browser = os.pipe(), os.pipe()
        # above 9, so that they do not meet 3 and 4, where Chromium reads and writes
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_browser[0], from_browser[1])]
        os.close(to_browser[0])
        os.close(from_browser[1])
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe"]
        self._pid = os.posix_spawn(
            path,
            [path, *options, f"--user-data-dir={profile_dir}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs[0], 3),
                (os.POSIX_SPAWN_DUP2, theirs[1], 4),
                (os.POSIX_SPAWN_OPEN, 2, str(profile_dir / "stderr.txt"), os.O_WRONLY | os.O_CREAT, 0o600),
            ],
            setpgroup=0,
        )
        for fd in theirs:
            os.close(fd)
        self._write_fd, self._read_fd = to_browser[1], from_browser[0]
        self._waiting, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            self._session = ""
            self.call("Browser.close")
        deadline = time.monotonic() + 5
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        os.close(self._write_fd)
        os.close(self._read_fd)

    def open(self, page: Path, width_px: int, scheme: str = "light") -> None:
        """Show a file on a screen of this width, in this colour scheme, and wait until it is there."""
        self._events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width_px, height=800, deviceScaleFactor=1, mobile=width_px < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(next(self._messages()))

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, as JSON."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise AssertionError(result["exceptionDetails"])
        return result["result"].get("value")

    def faults(self) -> list[dict[str, Any]]:
        """Errors, console messages and dialogs since `open`."""
        return [event for event in self._events if event["method"] in _FAULTS]

    def requests(self) -> list[str]:
        """Addresses that were asked for since `open`, data URIs aside."""
        sent = [event["params"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return [url for params in sent if not (url := params["request"]["url"]).startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """The whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol. Raises AssertionError for one that fails; events that come before are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if "method" in answer:
                self._events.append(answer)
        raise AssertionError("unreachable")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._waiting:
                if not select.select([self._read_fd], [], [], _TIMEOUT_S)[0]:
                    raise TimeoutError(f"Chromium says nothing for {_TIMEOUT_S:g} s")
                received = os.read(self._read_fd, 1 << 20)
                if not received:
                    raise OSError("Chromium has ended")
                self._waiting += received
            message, _, self._waiting = self._waiting.partition(b"\0")
            yield json.loads(message)
