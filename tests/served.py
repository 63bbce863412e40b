"""`fireflyer serve` as a process of its own, and its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import httpx


class Served:
    """While entered, a server runs on a free port. `log` is what it wrote to stderr so far."""

    def __init__(self, checkpoint: Path | str, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "fireflyer", "serve", str(checkpoint), "--port", "0", *arguments]
        self.log = ""
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Served:
        self.wait_for(r"http://[^ ]+/v1")
        match = re.search(r"http://\S+?:\d+", self.log)
        assert match, self.log
        self.url = match.group()
        until = time.monotonic() + 120
        while httpx.get(f"{self.url}/ready").status_code != 200:
            assert time.monotonic() < until, self.log
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def wait_for(self, pattern: str, seconds: float = 240) -> None:
        until = time.monotonic() + seconds
        while not re.search(pattern, self.log):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
