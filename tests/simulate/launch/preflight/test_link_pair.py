"""The link between two machines, on loopback: both directions, and peers that are not there or not ours."""

from __future__ import annotations

import threading

import pytest

from simulate.common.errors import InputError
from simulate.launch.preflight import link_pair as pair
from simulate.launch.preflight.address import Endpoint, loopback_interface
from simulate.launch.preflight.link_probe import Limits
from simulate.launch.preflight.secret import Secret
from tests.simulate.launch.preflight.nodes import OTHER, SECRET, free_port


def serving(monkeypatch: pytest.MonkeyPatch, secret: Secret | None) -> tuple[threading.Thread, Endpoint, list[str]]:
    """Serve one caller on loopback, with measurements that end at once."""
    monkeypatch.setattr(pair, "Limits", lambda: Limits(aim_s=0.05, budget_bytes=4 << 20))
    told: list[str] = []
    ready = threading.Event()

    def log(line: str) -> None:
        told.append(line)
        ready.set()

    endpoint = Endpoint("127.0.0.1", free_port())
    arguments = (loopback_interface(), endpoint.port, secret, log, 1)
    thread = threading.Thread(target=pair.serve_pairs, args=arguments, daemon=True)
    thread.start()
    assert ready.wait(10)
    return thread, endpoint, told


def test_both_directions_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    thread, endpoint, told = serving(monkeypatch, SECRET)
    link = pair.measure_pair(str(endpoint), SECRET)
    thread.join(10)
    assert not thread.is_alive()
    assert link.source == "measured"
    assert min(link.up_bytes_per_s, link.down_bytes_per_s) > 1e6
    assert 0 < link.latency_s < 0.1
    assert "127.0.0.1 receives" in told[-1]


def test_another_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    thread, endpoint, told = serving(monkeypatch, SECRET)
    with pytest.raises(InputError, match="secret is another one"):
        pair.measure_pair(str(endpoint), OTHER)
    thread.join(10)
    assert "has the wrong secret" in told[-1]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("127.0.0.1:9", "cannot be reached .*refused.*lte profile serve"),
        ("127.0.0.1", "--link '127.0.0.1'"),
        ("8.8.8.8:29511", "--link 8.8.8.8:29511"),
    ],
)
def test_an_unreachable_peer_is_one_line(where: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        pair.measure_pair(where, None)
    assert "\n" not in str(caught.value)
    assert "--join" not in str(caught.value)


def test_an_unknown_interface_is_refused() -> None:
    with pytest.raises(InputError, match=r"--interface nowhere0: no such interface is up.*there are"):
        pair.serve_pairs("nowhere0", 29511, None, lambda line: None)
