"""A plain TCP transfer, to measure what a lab's link carries.

python -m tests.network.transfer receive 5000             # prints bytes and seconds, first byte to last
python -m tests.network.transfer send 10.77.0.2 5000 BYTES
"""

from __future__ import annotations

import socket
import sys
import time

CHUNK_BYTES = 1 << 16
CONNECT_WAIT_S = 10.0


def receive(port: int) -> tuple[int, float]:
    """Take one connection; return how many bytes it brought, and the seconds from the first to the last."""
    with socket.create_server(("", port)) as server:
        server.settimeout(CONNECT_WAIT_S)
        connection, _ = server.accept()
    with connection:
        total_bytes = len(connection.recv(CHUNK_BYTES))
        start_s = last_s = time.perf_counter()
        while chunk := connection.recv(CHUNK_BYTES):
            total_bytes += len(chunk)
            last_s = time.perf_counter()
    return total_bytes, last_s - start_s


def send(address: str, port: int, num_bytes: int) -> None:
    """Send zeros; tries until somebody listens."""
    give_up_s = time.monotonic() + CONNECT_WAIT_S
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_WAIT_S)
            break
        except ConnectionRefusedError:
            if time.monotonic() > give_up_s:
                raise
            time.sleep(0.02)
    with connection:
        connection.sendall(bytes(num_bytes))


def main(words: list[str]) -> None:
    """Do what the command line says."""
    if words[0] == "receive":
        print(*receive(int(words[1])))
    else:
        send(words[1], int(words[2]), int(words[3]))


if __name__ == "__main__":
    main(sys.argv[1:])
