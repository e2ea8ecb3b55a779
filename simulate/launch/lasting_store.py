"""The run's key-value store on a machine of its own: found by whoever has the secret, and found again once it restarts.

`lte store` serves torch's TCPStore at one address, on a port that the system picks, and tells the port over the
preflight's encrypted connection to callers that prove the run's secret. Agents ask for it; workers, which have no
secret, read it from a file of their run folder that the agent writes. LastingStore is either's client: when the store
is gone it waits, asks again and connects to the new one, whose keys the living then write again.
"""

from __future__ import annotations

import ipaddress
import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulate.common.errors import InputError, LostPeerError, RunFailedError, first_line
from simulate.common.toml_io import write_atomically
from simulate.launch.preflight.address import (
    BindAddress,
    Endpoint,
    address_text,
    choose_bind_address,
    parse_endpoint,
)
from simulate.launch.preflight.channel import PeerError, reason
from simulate.launch.preflight.deadline import Deadline
from simulate.launch.preflight.handshake import Identity, Purpose, call, dial
from simulate.launch.preflight.listener import AcceptedPeer, HandshakeListener, listen
from simulate.launch.preflight.secret import VARIABLE, Secret
from simulate.launch.preflight.settings import Log

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

SERVER, CALLER = 0, 1
HANDSHAKE_S, POLL_S, RETRY_S = 10.0, 1.0, 0.3
OPERATION_S = 60.0
"""Seconds that one operation of the store may take."""
IDENTITY = "store/identity"
"""Key that a store has once it is in use; a restarted one lacks it."""
STORE_FILE = "store.json"
"""File in a run's logs with the store's host and port, for the workers."""

Address = tuple[str, int]


def serve_store(where: str, secret: Secret | None, trust_network: bool, log: Log, callers: int | None = None) -> None:
    """Serve a store at HOST:PORT, where its port is asked for; returns after `callers`, or never. Raises InputError."""
    from torch.distributed import TCPStore

    endpoint = _endpoint(where, "--listen")
    bind = _bound(endpoint, True, trust_network, "--listen").address
    # Before a port is open, so that nobody can call without a secret being there.
    key = _key(secret, f"--listen {endpoint}", bind)
    door = listen(bind, endpoint.port, f"--listen {endpoint}")
    # TCPStore by itself listens at every address, so it gets a socket that is bound to one.
    inner = listen(bind, 0, "the store")
    port = inner.getsockname()[1]
    store = TCPStore(bind, port, is_master=True, wait_for_workers=False, master_listen_fd=inner.detach())
    here = address_text(bind, endpoint.port)
    log(f"the store is at {here}; on every node: lte train ... --launch --store {here}")
    handshakes, answered = HandshakeListener(door, Identity(SERVER, Purpose.STORE, key), HANDSHAKE_S), 0
    try:
        while callers is None or answered < callers:
            event = handshakes.next(Deadline(POLL_S))
            if isinstance(event, AcceptedPeer):
                with closing(event.channel) as channel:
                    log(f"{channel.peer_address} asked for the store's port")
                    channel.send({"kind": "store", "port": store.port}, Deadline(HANDSHAKE_S))
            elif event is not None:
                log(f"refused {event.host}: it {event.why}")
            answered += event is not None
    finally:
        handshakes.close()


def ask_store(where: str, secret: Secret | None, trust_network: bool = False) -> Address:
    """Return host and port of the store that is served at HOST:PORT. Raises InputError, and OSError if it is away."""
    endpoint = _endpoint(where, "--store")
    bind = _bound(endpoint, False, trust_network, "--store")
    me = Identity(CALLER, Purpose.STORE, _key(secret, f"--store {endpoint}", bind.coordinator_address))
    sock = dial(bind.address, bind.coordinator_address, endpoint.port, Deadline(HANDSHAKE_S))
    try:
        with closing(call(sock, me, SERVER, Deadline(HANDSHAKE_S))) as channel:
            answer = channel.receive(Deadline(HANDSHAKE_S))
    except PeerError as error:
        raise InputError(f"--store {endpoint}: it {error}; is lte store there, with the same secret?") from None
    port = answer.get("port")
    if not isinstance(port, int) or not 0 < port < 2**16:
        raise InputError(f"--store {endpoint}: it sent no port; is lte store of this version there?")
    return bind.coordinator_address, port


def _endpoint(where: str, option: str) -> Endpoint:
    try:
        return parse_endpoint(where)
    except InputError as error:  # its message names the option of a launched run
        raise InputError(str(error).replace("--join", option).replace("node 0", "the store")) from None


def _bound(endpoint: Endpoint, is_server: bool, trust_network: bool, option: str) -> BindAddress:
    try:
        return choose_bind_address(endpoint, is_coordinator=is_server, interface=None, trust_network=trust_network)
    except InputError as error:
        raise InputError(str(error).replace("--join", option).replace("node 0", "the store")) from None


def _key(secret: Secret | None, title: str, address: str) -> Secret:
    """Return the secret, on loopback without one its public key; raises InputError on a network."""
    if secret is not None:
        return secret
    if ipaddress.ip_address(address).is_loopback:
        return Secret.for_loopback()
    raise InputError(f"{title}: a store on a network needs the run's secret; give --secret-file PATH or {VARIABLE}")


def write_address(logs: Path, address: Address) -> None:
    """Tell this node's workers where the store is."""
    logs.mkdir(parents=True, exist_ok=True)
    write_atomically(logs / STORE_FILE, json.dumps(address).encode())


def read_address(logs: Path) -> Address:
    """Return where the store is, as this node's agent has written it."""
    host, port = json.loads((logs / STORE_FILE).read_text())
    return str(host), int(port)


class LastingStore:
    """A client of the store that outlives it; `find` returns where it is, and is asked again when it is gone.

    Every operation waits until a store answers, at most `patience_s`. `generation` counts the stores so far: a new one
    is empty.
    """

    def __init__(self, find: Callable[[], Address], patience_s: float, prefix: str) -> None:
        """Connect; all keys are below `prefix`."""
        self._find, self._patience_s, self._prefix = find, patience_s, prefix
        self._lock = threading.Lock()
        self.generation = 0
        self._identity = b""
        self._tcp = self._connect()

    @property
    def raw(self) -> Store:
        """torch's store of the launch's keys, as long as it is there."""
        from torch.distributed import PrefixStore

        return PrefixStore(self._prefix, self._tcp) if self._prefix else self._tcp

    def _connect(self) -> TCPStore:
        """Return a connection to the store that is there now. Raises RunFailedError once patience is over."""
        from torch.distributed import TCPStore

        deadline = Deadline(self._patience_s)
        while True:
            try:
                host, port = self._find()
                # The time-out is for connecting, too; a store that is only starting has it again.
                store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=OPERATION_S))
                identity = store.compare_set(IDENTITY, "", uuid.uuid4().hex)
            except (OSError, RuntimeError, ValueError) as error:
                if deadline.left_s <= RETRY_S:
                    why = reason(error) if isinstance(error, OSError) else first_line(error)
                    waited = f"{self._patience_s:g} s (cluster.join_timeout_s)"
                    raise RunFailedError(f"the store has not answered for {waited}: {why}") from error
                time.sleep(RETRY_S)
                continue
            if identity != self._identity:
                self._identity, self.generation = identity, self.generation + 1
            return store

    def _do(self, operation: str, *arguments: Any) -> Any:
        while True:
            tcp = self._tcp
            try:
                return getattr(self.raw, operation)(*arguments)
            except RuntimeError:  # what torch raises for everything
                with self._lock:
                    if self._tcp is tcp:  # no other thread has connected again meanwhile
                        self._tcp = self._connect()

    @property
    def port(self) -> int:
        """Port of the store that is there now."""
        return int(self._tcp.port)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._do("check", list(keys)))

    def get(self, key: str) -> bytes:
        """Return the value of a key that is there. Raises LostPeerError where it went with an earlier store."""
        if not self.check([key]):
            raise LostPeerError("the store was restarted")
        return bytes(self._do("get", key))

    def set(self, key: str, value: str) -> None:
        """Set a key, which all others find from now on."""
        self._do("set", key, value)
        self._do("check", [key])  # torch does not wait for the store to have it, which answers in order

    def set_for_all(self, key: str, value: str) -> None:
        """Set a key that is not below the launch's prefix."""
        self._do("check", [])  # finds the store again where it was restarted
        self._tcp.set(key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, and return it."""
        return int(self._do("add", key, amount))

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        """Set a key that has the expected value, "" for none; return what it has then."""
        return bytes(self._do("compare_set", key, expected, value))

    def delete_key(self, key: str) -> bool:
        """Remove a key; returns whether it was there."""
        return bool(self._do("delete_key", key))


def raw_store(store: Store | LastingStore) -> Store:
    """Return torch's own store, which process groups need."""
    return store.raw if isinstance(store, LastingStore) else store
