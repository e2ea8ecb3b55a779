"""lte join: take part in a launched run by the file that `lte invite` wrote on node 0.

What differs from node 0 (versions, the user's own code, data) is found first, each in one line; then the node is
launched as `lte train --launch --node K` would. --check stops before that.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltecli.commands.doctor import check_machine
from ltecli.commands.launch import LaunchArgs
from ltecli.commands.train import TrainArgs, train_run
from ltecli.console import Output
from ltecli.output_paths import write_private
from ltecli.runs.run_folder import RUNS, check_new
from simulate.common.errors import InputError
from simulate.data.load import load_data
from simulate.launch.preflight import wireguard
from simulate.launch.preflight.address import interfaces
from simulate.launch.preflight.invite import (
    Invitation,
    check_code,
    check_data,
    check_versions,
    invited_run,
    read_invitation,
)

if TYPE_CHECKING:
    from simulate.config.run import Run


@dataclass(frozen=True)
class JoinArgs:
    """Options of a node that joins, beside those of its launch."""

    data: str | None = None
    """Place of the data on this machine; None: node 0's path."""
    out: Path | None = None
    resume: bool = False
    device_name: str = "auto"
    only_checks: bool = False


def join_command(
    file: Path, args: JoinArgs, output: Output, processes: int | None, interface: str | None, trust_network: bool
) -> int:
    """Check this machine against the invitation, and train as its node; returns the exit code."""
    invitation = read_invitation(file)
    launch = LaunchArgs(
        processes, invitation.nodes, invitation.node, invitation.join, interface, file, trust_network
    )  # fmt: skip
    out = args.out or RUNS / invitation.name
    if not args.resume:
        check_new(out)
    check_versions(invitation)
    check_code(invitation)
    # The profile that the run brings lies here until the run folder has it.
    with tempfile.TemporaryDirectory(prefix="lte-") as folder:
        run = invited_run(invitation, Path(folder), args.data)
        _check_here(invitation, run, args, launch, output)
        _check_tunnel(invitation, file)
        if args.only_checks:
            output.text(f"all well: this machine can be node {invitation.node} of {invitation.nodes}")
            output.json({"version": 1, "ok": True, "node": invitation.node, "nodes": invitation.nodes})
            return 0
        given = None if args.resume else run
        return train_run(given, out, args.resume, args.device_name, TrainArgs(), launch, output)[1]


def _check_here(invitation: Invitation, run: Run, args: JoinArgs, launch: LaunchArgs, output: Output) -> None:
    """Ask what `lte doctor` asks of a launch, and compare the data; raises InputError for what stops the run."""
    for warning in check_machine(run, args.device_name, launch):
        if args.only_checks:  # else all nodes tell it in the preflight
            output.warning(warning)
    data = load_data(run)
    check_data(invitation, data.fingerprint, data.num_bytes)


def _check_tunnel(invitation: Invitation, file: Path) -> None:
    """Raise InputError where the tunnel of the invitation is not up; its file is written for wg-quick."""
    if invitation.wireguard is None:
        return
    own = wireguard.address(invitation.node)
    if any(str(address) == own for interface in interfaces() for address in interface.addresses):
        return
    path = file.parent / f"lte{invitation.node}.conf"
    if not path.exists():
        write_private(path, invitation.wireguard, "FILE")
    raise InputError(
        f"the tunnel is not up (no interface has {own}); as root: wg-quick up {path.absolute()}, then again"
    )
