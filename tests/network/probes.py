"""What a lab's links do: the rate of TCP transfers and the round trips of datagrams.

python -m tests.network.probes receive 5000               # prints bytes, and when the last one came
python -m tests.network.probes send 10.77.0.2 5000 BYTES  # prints when it began to send
python -m tests.network.probes echo 6000                  # until it is killed
python -m tests.network.probes ask 10.77.0.2 6000 COUNT   # prints COUNT round trips in seconds
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.harness import ROOT, Child
from tests.network.lab import Node

CHUNK_BYTES = 1 << 16
WAIT_S = 10.0
ECHO_WAIT_S = 0.5
PORT = 5000


def start(node: Node, *words: object) -> Child:
    """Run one end of a probe in a node."""
    argv = [sys.executable, "-m", __name__, *map(str, words)]
    return node.popen(argv, cwd=ROOT, stdout=subprocess.PIPE)


def transfer(source: Node, target: Node, num_bytes: int, timeout_s: float = 60.0) -> float:
    """Send bytes over TCP; return how many a second arrived."""
    return transfers([(source, target)], num_bytes, timeout_s)[0]


def transfers(pairs: Sequence[tuple[Node, Node]], num_bytes: int, timeout_s: float = 60.0) -> list[float]:
    """Send bytes between several pairs at once; return each one's bytes a second, sending's begin to the last one.

    Not from the first byte that the receiver sees: one that gets no core at that moment finds many, and the link too
    fast. Both ends read one clock, since they are on one machine.
    """
    receivers = [start(target, "receive", PORT + i) for i, (_, target) in enumerate(pairs)]
    senders = [start(source, "send", target.address, PORT + i, num_bytes) for i, (source, target) in enumerate(pairs)]
    outcomes = [process.outcome(timeout_s) for process in receivers + senders]
    if any(outcome.code for outcome in outcomes):
        raise RuntimeError("a transfer failed")
    printed = [[float(word) for word in outcome.stdout.split()] for outcome in outcomes]
    ends, begins = printed[: len(pairs)], printed[len(pairs) :]
    assert all(arrived == num_bytes for arrived, _ in ends)
    return [num_bytes / (end_s - begin_s) for (_, end_s), (begin_s,) in zip(ends, begins, strict=True)]


def round_trips_s(source: Node, target: Node, count: int = 20) -> list[float]:
    """Return the seconds of `count` round trips of a datagram."""
    with start(target, "echo", PORT) as echo:
        try:
            asker = start(source, "ask", target.address, PORT, count)
            return [float(word) for word in asker.outcome(60).stdout.split()]
        finally:
            echo.kill()


def receive(port: int) -> tuple[int, float]:
    """Take one connection; return how many bytes it brought, and when it brought the last."""
    with socket.create_server(("", port)) as server:
        server.settimeout(WAIT_S)
        connection, _ = server.accept()
    with connection:
        total_bytes, last_s = 0, 0.0
        while chunk := connection.recv(CHUNK_BYTES):
            total_bytes, last_s = total_bytes + len(chunk), time.monotonic()
    return total_bytes, last_s


def send(address: str, port: int, num_bytes: int) -> float:
    """Send zeros, once somebody listens; return when that began."""
    give_up_s = time.monotonic() + WAIT_S
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=WAIT_S)
            break
        except ConnectionRefusedError:
            if time.monotonic() > give_up_s:
                raise
            time.sleep(0.02)
    with connection:
        connection.settimeout(None)
        zeros, begin_s = bytes(num_bytes), time.monotonic()
        connection.sendall(zeros)
    return begin_s


def echo(port: int) -> None:
    """Send every datagram back."""
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("", port))
        while True:
            server.sendto(*server.recvfrom(CHUNK_BYTES))


def ask(address: str, port: int, count: int) -> list[float]:
    """Return round trips in seconds, one after the other; what is lost, or sent too early, is asked again."""
    taken: list[float] = []
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(ECHO_WAIT_S)
        client.connect((address, port))
        while len(taken) < count:
            start_s = time.perf_counter()
            try:
                client.send(b"?")
                client.recv(CHUNK_BYTES)
                taken.append(time.perf_counter() - start_s)
            except (TimeoutError, ConnectionRefusedError):
                time.sleep(0.02)
    return taken


def main(words: list[str]) -> None:
    """Do what the command line says."""
    what, *rest = words
    if what == "receive":
        print(*receive(int(rest[0])))
    elif what == "send":
        print(send(rest[0], int(rest[1]), int(rest[2])))
    elif what == "echo":
        echo(int(rest[0]))
    else:
        print(*ask(rest[0], int(rest[1]), int(rest[2])))


if __name__ == "__main__":
    main(sys.argv[1:])
