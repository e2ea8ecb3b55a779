"""lte invite: write the one private file by which another machine takes part in a launched run with `lte join`.

The run, its profile and the secret travel in it; of data and of the user's own code only digests. With --wireguard it
has the tunnel's file as well, and node 0's own file gets the matching block.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ltecli.commands.launch import DEFAULT_PORT
from ltecli.console import Output
from ltecli.output_paths import check_absent, unwritable, write_private
from ltecli.runs.run_folder import run_name
from simulate.common.errors import InputError
from simulate.common.version import version
from simulate.config.profiles import load_profile
from simulate.config.run import Run, dump_run, load_given_run, with_absolute_paths, with_profile_name
from simulate.data.load import load_data
from simulate.launch.preflight import wireguard
from simulate.launch.preflight.address import address_text, address_to_join, parse_endpoint
from simulate.launch.preflight.invite import Invitation, code_of, torch_version
from simulate.launch.preflight.secret import make_secret, read_private, read_secret_text

SECRET_NAME = "lte.secret"
HUB_NAME = "lte0.conf"
"""Node 0's WireGuard file; wg-quick names the interface by it."""
ENDPOINT = "--wireguard"
VERSION = 1


@dataclass(frozen=True)
class InviteArgs:
    """Options of an invitation."""

    node: str
    """node3, or 3."""
    nodes: int | None = None
    """Nodes of the run; None: a node for each device."""
    address: str | None = None
    """HOST:PORT of node 0."""
    secret_file: Path | None = None
    wireguard: str | None = None
    """HOST or HOST:PORT by which node 0 is reached from outside; None: no tunnel."""
    out: Path | None = None


@dataclass(frozen=True)
class Tunnel:
    """The two WireGuard files of an invitation."""

    node_config: str
    hub_file: Path
    hub_text: str
    """Text to append to node 0's file."""
    is_new: bool


def invite_command(run_file: Path, args: InviteArgs, output: Output) -> int:
    """Write the invitation and print the line to paste; returns the exit code."""
    run = with_absolute_paths(load_given_run(run_file))
    node, nodes = _numbers(args, run)
    out = args.out or Path(f"node{node}.invite.json")
    check_absent(out, "--out")
    tunnel = _tunnel(args.wireguard, node, run_file.parent)
    join = _address(args.address, tunnel)
    secret, secret_file, is_made = _secret(args.secret_file, run_file.parent / SECRET_NAME)
    data = load_data(run)
    profile = load_profile(run.cluster.profile)
    invitation = Invitation(
        lte=version(), torch=torch_version(), name=run_name(run_file).lstrip(".") or "run",
        node=node, nodes=nodes, join=join, run=dump_run(with_profile_name(run, profile), profile), secret=secret,
        data_sha256=data.fingerprint, data_bytes=data.num_bytes, code=code_of(run),
        wireguard=tunnel.node_config if tunnel else None,
    )  # fmt: skip
    if is_made and secret_file is not None:
        write_private(secret_file, secret, "--secret-file")
    write_private(out, invitation.to_json(), "--out")
    if tunnel is not None:
        _extend_hub(tunnel)
    own = f"lte train {run_file} --launch --nodes {nodes} --node 0 --join {join}"
    own += f" --secret-file {secret_file}" if secret_file is not None else ""  # else LTE_SECRET is set here, too
    _report(output, invitation, out, own, tunnel)
    return 0


def _report(output: Output, invitation: Invitation, out: Path, own: str, tunnel: Tunnel | None) -> None:
    line = f"lte join {out.name}"
    output.text(line)
    needs = [*(f"the module of {code.key} = {code.name}" for code in invitation.code)]
    what = ", ".join(["its data", *needs])
    output.hint(f"wrote {out}, which holds the secret: send it to node {invitation.node} privately, there chmod 600")
    output.hint(f"copy {what} to that machine yourself; then paste the line above there, and here:\n  {own}")
    if tunnel is not None:
        output.hint(f"before, the tunnel, as root: wg-quick up {tunnel.hub_file.absolute()} (if it is up, down first)")
    # The invitation's own text has the secret, and is no part of what is printed.
    output.json({"version": VERSION, "file": str(out), "node": invitation.node, "nodes": invitation.nodes,
                 "line": line, "node_0_line": own})  # fmt: skip


def _numbers(args: InviteArgs, run: Run) -> tuple[int, int]:
    """Return the invited node's number and the number of nodes; raises InputError."""
    devices = run.cluster.devices
    nodes = devices if args.nodes is None else args.nodes
    match = re.fullmatch(r"(?:node)?(\d{1,6})", args.node)
    if match is None:
        raise InputError(f"--for {args.node}: name a node by its number, node1 or 1")
    node = int(match[1])
    if nodes > devices:
        raise InputError(f"--nodes {nodes} are more than cluster.devices = {devices}; each node needs a device")
    if nodes < 2:
        raise InputError(f"--nodes {nodes}: a run of one node invites nobody; give --nodes 2 or more")
    if node == 0:
        raise InputError("--for node0: node 0 is this machine, which needs no invitation; nodes to invite count from 1")
    if node >= nodes:
        raise InputError(f"--for node{node}: the run has {nodes} nodes, 0 to {nodes - 1}; lower it, or raise --nodes")
    return node, nodes


def _address(given: str | None, tunnel: Tunnel | None) -> str:
    if given is not None:
        return str(parse_endpoint(given))
    host = wireguard.address(0) if tunnel is not None else str(address_to_join(None))
    return address_text(host, DEFAULT_PORT)


def _secret(given: Path | None, beside: Path) -> tuple[str, Path | None, bool]:
    """Return the secret, its file, and whether it is made now.

    It is that of --secret-file, LTE_SECRET (which is no file) or lte.secret beside run.toml, in this order.
    """
    found = read_secret_text(given)
    if found is not None:
        return found, given, False
    if beside.exists():
        return str(read_secret_text(beside)), beside, False
    return make_secret(), beside, True


def _tunnel(given: str | None, node: int, folder: Path) -> Tunnel | None:
    """Return the tunnel's files with fresh keys for a node; node 0's keys stay. Raises InputError."""
    if given is None:
        return None
    if node >= wireguard.MOST_NODES:
        raise InputError(f"--for node{node}: a tunnel has addresses for {wireguard.MOST_NODES} nodes; invite fewer")
    bare = ":" not in given or given.endswith("]")
    endpoint = str(parse_endpoint(f"{given}:{wireguard.PORT}" if bare else given))
    hub_file, private = folder / HUB_NAME, wireguard.make_private_key()
    is_new = not hub_file.exists()
    if is_new:
        hub_private = wireguard.make_private_key()
        start = wireguard.hub_config(hub_private)
    else:
        hub_private, start = _known_hub(hub_file, node), ""
    peer = wireguard.peer_of_hub(node, wireguard.public_key(private))
    config = wireguard.node_config(node, private, wireguard.public_key(hub_private), endpoint)
    return Tunnel(config, hub_file, start + peer, is_new)


def _known_hub(path: Path, node: int) -> str:
    """Return the private key in node 0's file, which must not know the node yet."""
    text = read_private(path, ENDPOINT, "run the command again", 2**20).decode(errors="replace")
    if wireguard.has_peer(text, node):
        raise InputError(f"{ENDPOINT}: {path} knows node {node} already; remove its [Peer] there to invite it anew")
    try:
        private = wireguard.private_key_of(text)
        wireguard.public_key(private)
    except ValueError:
        raise InputError(f"{ENDPOINT}: {path} has no PrivateKey of WireGuard; move it away, and all are made") from None
    return private


def _extend_hub(tunnel: Tunnel) -> None:
    if tunnel.is_new:
        write_private(tunnel.hub_file, tunnel.hub_text, ENDPOINT)
        return
    try:
        handle = os.open(tunnel.hub_file, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        raise unwritable(tunnel.hub_file, error, ENDPOINT) from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(tunnel.hub_text)
