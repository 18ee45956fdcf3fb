"""A TCP proxy on the loopback that cuts, slows, refuses and counts connections.

It is independent of the protocol, so it works with any server.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Literal

Direction = Literal["up", "down"]
_BLOCK = 1 << 16
_LEAVE_SECONDS = 5.0


class _Line:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self._lock = threading.Lock()
        self._closed = False

    def close(self, *, reset: bool = False) -> None:
        """Close both halves; with a reset, as when a remote cable is pulled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for end in (self.client, self.server):
                try:
                    if reset:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the other side was quicker


class FaultProxy:
    """A proxy in front of one server; a context manager.

    Attributes:
        sent: Bytes passed from clients to the server.
        received: Bytes passed from the server to clients.
        connections: Connections accepted.
        cuts: Cuts made.
        refusing: While true, new connections are closed at once.
        delay_s: Delay of each block, seconds.
        bytes_per_s: Upload limit of all clients together; None: none.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        cut_up: Iterable[int] = (),
        cut_down: Iterable[int] = (),
        everyone: bool = False,
        delay_s: float = 0.0,
        bytes_per_s: float | None = None,
    ) -> None:
        """Configure the line; it is up within the context.

        Args:
            host: Of the server.
            port: Of the server.
            cut_up: Cut when all connections together have uploaded this many bytes.
            cut_down: The same for downloaded bytes.
            everyone: Cut all connections, not only the one that reached the limit.
            delay_s: As the attribute.
            bytes_per_s: As the attribute.
        """
        self._server = (host, port)
        self._cut_points: dict[Direction, list[int]] = {"up": sorted(cut_up), "down": sorted(cut_down)}
        self._passed: dict[Direction, int] = {"up": 0, "down": 0}
        self._everyone = everyone
        self.delay_s, self.bytes_per_s = delay_s, bytes_per_s
        self.connections = self.cuts = 0
        self.refusing = False
        self._lock = threading.Lock()
        self._lines: set[_Line] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closing = False
        self._ready_at = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def sent(self) -> int:
        return self._passed["up"]

    @property
    def received(self) -> int:
        return self._passed["down"]

    def cut_now(self) -> None:
        with self._lock:
            lines = list(self._lines)
            self.cuts += 1
        for line in lines:
            line.close(reset=True)

    def __enter__(self) -> FaultProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in list(self._lines):
            line.close()
        for thread in self._threads:
            thread.join(_LEAVE_SECONDS)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                if self.refusing:
                    raise ConnectionRefusedError
                server = socket.create_connection(self._server, timeout=_LEAVE_SECONDS)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            line = _Line(client, server)
            with self._lock:
                self._lines.add(line)
            self._start(self._carry, line)

    def _carry(self, line: _Line) -> None:
        """Forward both directions until one of them ends."""
        down = threading.Thread(target=self._pump, args=(line, "down"), daemon=True)
        down.start()
        self._pump(line, "up")
        down.join(_LEAVE_SECONDS)
        with self._lock:
            self._lines.discard(line)
        line.client.close()
        line.server.close()

    def _pump(self, line: _Line, direction: Direction) -> None:
        source, sink = (line.client, line.server) if direction == "up" else (line.server, line.client)
        try:
            while data := source.recv(_BLOCK):
                self._dawdle(len(data), direction)
                allowed, cut = self._allow(len(data), direction)
                sink.sendall(data[:allowed])
                if cut:
                    self.cut_now() if self._everyone else line.close(reset=True)
                    return
        except OSError:
            pass  # a dead line is this proxy's purpose
        finally:
            line.close()

    def _allow(self, size: int, direction: Direction) -> tuple[int, bool]:
        """Count bytes and return how many still pass, and whether the line is cut then."""
        with self._lock:
            points, before = self._cut_points[direction], self._passed[direction]
            cut = bool(points) and points[0] <= before + size
            if cut:
                size = max(points[0] - before, 0)
                while points and points[0] <= before + size:
                    points.pop(0)
                self.cuts += 0 if self._everyone else 1
            self._passed[direction] = before + size
            return size, cut

    def _dawdle(self, size: int, direction: Direction) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.bytes_per_s and direction == "up":
            with self._lock:
                now = time.monotonic()
                self._ready_at = max(self._ready_at, now) + size / self.bytes_per_s
                wait = self._ready_at - now
            time.sleep(wait)
