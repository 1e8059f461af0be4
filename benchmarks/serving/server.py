"""A server in a process of its own, and a watch of its precision."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# seconds that a server may take to start
PATIENCE = 600.0
PRECISION = "/v1/mobiquant/precision"
FLOAT_SERVER = "vllm.entrypoints.openai.api_server"


class Server:
    """A server at work; `url` is where."""

    def __init__(self, words: Sequence[str], log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            command = [sys.executable, "-m", *words, "--port", str(self.port)]
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def call(self, path: str, body: Any = None, method: str = "GET") -> Any:
        """The answer to a request, from JSON where it is."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def wait(self) -> None:
        """Until it answers; raises RuntimeError where it does not start."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            try:
                self.call("/health")
                return
            except OSError:
                time.sleep(1)
        self.stop()
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-1500:]}")

    def stop(self) -> None:
        """End the process and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 15)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, 9)
                self.process.wait()


@contextmanager
def serving(words: Sequence[str], log: Path) -> Iterator[Server]:
    """A server that answers, stopped afterwards."""
    server = Server(words, log)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


class Watch(threading.Thread):
    """Notes the server's budget twice a second: `(seconds of the monotonic clock, bits)`."""

    def __init__(self, server: Server, every: float = 0.5):
        super().__init__(daemon=True)
        self.server, self.every, self.noted, self.ended = server, every, [], threading.Event()  # type: ignore[var-annotated]

    def run(self) -> None:
        """Until `finish`."""
        while not self.ended.wait(self.every):
            try:
                self.noted.append((time.monotonic(), float(self.server.call(PRECISION)["bits"])))
            except OSError:
                # a busy server may let one look time out
                continue

    def finish(self) -> list[tuple[float, float]]:
        """Stop and return what was noted."""
        self.ended.set()
        self.join()
        return self.noted
