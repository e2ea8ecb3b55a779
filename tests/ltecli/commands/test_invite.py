"""Invitations: one private file, refused where anything differs, and a node that trains as any other."""

from __future__ import annotations

import base64
import json
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from simulate.common.events import read_events
from simulate.common.user_code import code_digest
from simulate.launch.preflight import wireguard
from simulate.launch.preflight.secret import make_secret, read_secret
from tests.harness import environment
from tests.ltecli.command import Lte, Refused, assert_one_line, write_run

ADDRESS = "192.168.1.5:29400"


def invited(lte: Lte, here: Path, *options: str, node: str = "node1", **tables: dict[str, Any]) -> Path:
    """Write a run and an invitation to it."""
    run = write_run(here / "tiny.toml", **tables)
    outcome = lte("invite", run, "--for", node, "--address", ADDRESS, *options)
    assert outcome.code == 0, outcome.stderr
    return here / f"node{node.removeprefix('node')}.invite.json"


def changed(file: Path, **values: Any) -> None:
    table = json.loads(file.read_text())
    file.write_text(json.dumps(table | values))


def test_it_holds_what_a_node_needs_and_is_its_owners_alone(lte: Lte, here: Path) -> None:
    run = write_run(here / "tiny.toml", cluster={"devices": 4})
    outcome = lte("invite", run, "--for", "node3", "--address", ADDRESS)
    assert outcome.code == 0
    assert outcome.stdout == "lte join node3.invite.json\n"
    table = json.loads((here / "node3.invite.json").read_text())
    assert (table["node"], table["nodes"], table["join"], table["name"]) == (3, 4, ADDRESS, "tiny")
    assert table["data_bytes"] == (here / "prose.txt").stat().st_size
    secret = read_secret(here / "lte.secret")
    assert secret is not None
    assert table["secret"] == (here / "lte.secret").read_text()
    for name in ("node3.invite.json", "lte.secret"):
        assert stat.S_IMODE((here / name).stat().st_mode) == 0o600
    assert table["secret"].splitlines()[1] not in outcome.stdout + outcome.stderr
    assert f"--nodes 4 --node 0 --join {ADDRESS} --secret-file lte.secret" in outcome.stderr.replace(f"{here}/", "")


def test_a_second_node_gets_the_same_secret(lte: Lte, here: Path) -> None:
    first = json.loads(invited(lte, here, cluster={"devices": 3}).read_text())
    second = json.loads(invited(lte, here, node="2", cluster={"devices": 3}).read_text())
    assert first["secret"] == second["secret"]


def test_the_secret_may_come_from_the_environment(lte: Lte, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_secret()
    monkeypatch.setenv("LTE_SECRET", base64.b64encode(text.encode()).decode())
    assert json.loads(invited(lte, here).read_text())["secret"] == text
    assert not (here / "lte.secret").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--for", "node0"], ("--for node0", "this machine")),
        (["--for", "node2"], ("--for node2", "2 nodes", "--nodes")),
        (["--for", "third"], ("--for third", "node1")),
        (["--for", "1", "--nodes", "3"], ("--nodes 3", "cluster.devices = 2")),
        (["--for", "1", "--nodes", "1"], ("--nodes 1", "2 or more")),
        (["--for", "1", "--address", "here"], ("here",)),
        (["--for", "1", "--secret-file", "none"], ("--secret-file none", "no such file")),
        (["--for", "1", "--wireguard", "a:b:c"], ("a:b:c",)),
    ],
)
def test_an_invitation_that_cannot_be(refused: Refused, here: Path, options: list[str], words: tuple[str, ...]) -> None:
    run = write_run(here / "tiny.toml")
    address = [] if "--address" in options else ["--address", ADDRESS]
    refused("invite", run, *options, *address, words=words)


def test_nothing_is_overwritten(lte: Lte, refused: Refused, here: Path) -> None:
    invited(lte, here)
    refused("invite", here / "tiny.toml", "--for", "1", "--address", ADDRESS, words=("node1.invite.json exists",))


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660])
def test_a_file_that_others_can_read_is_refused(lte: Lte, refused: Refused, here: Path, mode: int) -> None:
    file = invited(lte, here)
    file.chmod(mode)
    said = refused("join", file, "--check", words=(f"mode {mode:o}", "chmod 600"))
    assert json.loads(file.read_text())["secret"].splitlines()[1] not in said


def test_a_machine_that_fits_is_told_so_and_nothing_is_trained(lte: Lte, here: Path) -> None:
    file = invited(lte, here)
    for option in ("--check", "--dry-run"):
        outcome = lte("join", file, option, "--device", "cpu")
        assert (outcome.code, outcome.stdout) == (0, "all well: this machine can be node 1 of 2\n"), outcome.stderr
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lte": "0.0.1"}, ("lte is", "0.0.1 on node 0")),
        ({"torch": "1.0"}, ("torch is", "1.0 on node 0")),
        ({"data_sha256": "0" * 64}, ("other content", "00000000", "--data PATH")),
        ({"data_bytes": 1}, ("other content",)),
        ({"version": 2}, ("another version of lte",)),
        ({"node": "one"}, ("no invitation", "node")),
        ({"secret": None}, ("no invitation", "secret")),
        ({"name": "../../etc"}, ("no invitation", "name")),
        ({"name": ".."}, ("no invitation", "name")),
        ({"extra": 1}, ("no invitation", "extra")),
        ({"code": [{"key": "model.name", "name": "not_there:Net", "sha256": "0"}]}, ("not_there", "copy it here")),
    ],
)
def test_what_differs_from_node_0_is_refused(
    lte: Lte, refused: Refused, here: Path, values: dict[str, Any], words: tuple[str, ...]
) -> None:
    file = invited(lte, here)
    changed(file, **values)
    refused("join", file, "--device", "cpu", words=words)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "{}", "\x00\xff"])
def test_what_is_no_invitation_is_refused(refused: Refused, here: Path, text: str) -> None:
    file = here / "node1.invite.json"
    file.write_text(text)
    file.chmod(0o600)
    refused("join", file, words=("node1.invite.json is no invitation",))


def test_a_file_that_is_not_there(refused: Refused, here: Path) -> None:
    refused("join", here / "none.json", words=("no such file", "lte invite"))


def test_data_may_lie_elsewhere(lte: Lte, refused: Refused, here: Path) -> None:
    file = invited(lte, here)
    (here / "prose.txt").rename(here / "elsewhere.txt")
    refused("join", file, "--device", "cpu", words=("prose.txt", "is not here", "--data PATH"))
    assert lte("join", file, "--check", "--device", "cpu", "--data", "elsewhere.txt").code == 0
    (here / "other.txt").write_text("something else " * 1000)
    refused("join", file, "--check", "--device", "cpu", "--data", "other.txt", words=("other content",))


def test_code_of_ones_own_is_compared_before_it_is_imported(
    lte: Lte, refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(here))
    (here / "own_network.py").write_text("class Net:\n    pass\n")
    file = invited(lte, here)
    good = {"key": "model.name", "name": "own_network:Net", "sha256": code_digest("model.name", "own_network:Net")}
    changed(file, code=[good])
    assert lte("join", file, "--check", "--device", "cpu").code == 0
    (here / "own_network.py").write_text("raise SystemExit('imported')\n")
    refused("join", file, "--check", words=("own_network", "differ from node 0's"))


def test_wireguard_files_fit_together(lte: Lte, refused: Refused, here: Path) -> None:
    nodes = []
    for node in (1, 2):
        run = write_run(here / "tiny.toml", cluster={"devices": 3})
        assert lte("invite", run, "--for", str(node), "--wireguard", "home.example.org").code == 0
        nodes.append(json.loads((here / f"node{node}.invite.json").read_text()))
    hub = (here / "lte0.conf").read_text()
    assert stat.S_IMODE((here / "lte0.conf").stat().st_mode) == 0o600
    assert hub.count("[Interface]") == 1
    for number, node in enumerate(nodes, 1):
        assert node["join"] == "10.99.0.1:29400"
        config = node["wireguard"]
        assert f"Address = 10.99.0.{number + 1}/24" in config
        assert "Endpoint = home.example.org:51820" in config
        public = wireguard.public_key(wireguard.private_key_of(config))
        assert f"PublicKey = {public}\nAllowedIPs = 10.99.0.{number + 1}/32\n" in hub
        assert f"PublicKey = {wireguard.public_key(wireguard.private_key_of(hub))}\n" in config
        # Each end computes the same shared secret, by the library alone.
        ours = X25519PrivateKey.from_private_bytes(base64.b64decode(wireguard.private_key_of(config)))
        theirs = X25519PrivateKey.from_private_bytes(base64.b64decode(wireguard.private_key_of(hub)))
        mine = X25519PublicKey.from_public_bytes(base64.b64decode(public))
        assert ours.exchange(theirs.public_key()) == theirs.exchange(mine)
    assert nodes[0]["wireguard"] != nodes[1]["wireguard"]
    (here / "node1.invite.json").unlink()
    refused("invite", here / "tiny.toml", "--for", "1", "--wireguard", "1.2.3.4", words=("knows node 1 already",))


def test_a_tunnel_that_is_not_up_is_named_and_its_file_written(lte: Lte, here: Path) -> None:
    file = invited(lte, here, "--wireguard", "192.0.2.1:5000")
    outcome = lte("join", file, "--check", "--device", "cpu")
    assert_one_line(outcome, 2, ("10.99.0.2", f"wg-quick up {here / 'lte1.conf'}"))
    assert stat.S_IMODE((here / "lte1.conf").stat().st_mode) == 0o600
    assert "Endpoint = 192.0.2.1:5000" in (here / "lte1.conf").read_text()


@pytest.mark.slow
def test_two_nodes_train_one_by_its_invitation_with_data_elsewhere(lte: Lte, here: Path) -> None:
    """Node 1 has run.toml, profile and secret from the file, its data at another path, and ends with node 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        join = f"127.0.0.1:{free.getsockname()[1]}"
    run = write_run(here / "tiny.toml", train={"dtype": "fp64"}, cluster={"timeout_s": 120, "join_timeout_s": 240})
    assert lte("invite", run, "--for", "node1", "--address", join).code == 0
    other = here / "other"
    other.mkdir()
    (here / "node1.invite.json").rename(other / "node1.invite.json")
    (other / "words.txt").write_bytes((here / "prose.txt").read_bytes())
    ltecli = [sys.executable, "-m", "ltecli"]
    lines = [
        (here, ["train", "tiny.toml", "--launch", "--nodes", "2", "--node", "0", "--join", join, "--secret-file",
                "lte.secret", "--device", "cpu", "--out", "run"]),
        (other, ["join", "node1.invite.json", "--data", "words.txt", "--device", "cpu", "--out", "run"]),
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            [*ltecli, *line], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for folder, line in lines
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    (launched,) = [e["val_loss"] for e in read_events(here / "run" / "events.jsonl") if e["kind"] == "evaluate"][-1:]
    assert lte("train", run, "--out", "alone", "--device", "cpu", "--quiet").code == 0
    (alone,) = [e["val_loss"] for e in read_events(here / "alone" / "events.jsonl") if e["kind"] == "evaluate"][-1:]
    assert launched == pytest.approx(alone, rel=1e-9)
    assert list((other / "run" / "checkpoints").iterdir())
