"""An invitation: one private file with all that a node needs to take part in a launched run, but data and code.

`lte invite` writes it on node 0, and `lte join` reads it on the node that it names, after a check that this machine
has the same versions, data and code. The file holds the run's secret, so it is its owner's alone (mode 0600). Data and
code travel by the user's own ways; the invitation has their digests. Torch-free.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from simulate.common import toml_io
from simulate.common.errors import InputError
from simulate.common.user_code import code_digest
from simulate.common.version import version
from simulate.config.method_table import OUTSIDE
from simulate.config.run import Run, load_given_run
from simulate.launch.preflight.secret import MAX_INVITATION_BYTES, read_private
from simulate.launch.preflight.settings import MAX_NODES
from simulate.models.schema import FactoryModel

OPTION = "FILE"


class UserCode(toml_io.Schema):
    """A module of the user's that a run names, and the digest of its files."""

    key: str
    """Key of run.toml."""
    name: str
    """package.module:Name."""
    sha256: str


class Invitation(toml_io.Schema):
    """All that a node of a launched run needs, in one file."""

    version: Literal[1] = 1
    lte: str
    """Version of lte on node 0."""
    torch: str | None = None
    """Version of torch there; not set: none was installed."""
    name: str = Field(min_length=1, pattern=r"^[^./\\\x00][^/\\\x00]*$")
    """Name of the run, and of its folder below runs/."""
    node: int = Field(ge=1)
    nodes: int = Field(ge=2, le=MAX_NODES)
    join: str
    """HOST:PORT of node 0."""
    run: str
    """run.toml, with a profile that lte does not ship."""
    secret: str
    """The secret's PEM text."""
    data_sha256: str
    data_bytes: int = Field(ge=0)
    code: list[UserCode] = Field(default_factory=list)
    wireguard: str | None = None
    """Configuration of this node's tunnel, for wg-quick."""

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(self.model_dump(exclude_none=True), indent=1) + "\n"


def torch_version() -> str | None:
    """Return the installed version of torch without importing it, and without its build ("+cpu")."""
    try:
        return installed("torch").partition("+")[0]
    except PackageNotFoundError:
        return None


def code_of(run: Run) -> list[UserCode]:
    """Return the modules of the user's that a run names. Raises InputError where one is not found."""
    names = {"model.name": run.model.name if isinstance(run.model, FactoryModel) else None}
    names["model.loss"] = getattr(run.model, "loss", None)
    names["method.name"] = run.method.name if OUTSIDE in run.method.name else None
    return [
        UserCode(key=key, name=name, sha256=code_digest(key, name)) for key, name in names.items() if name is not None
    ]


def read_invitation(path: Path) -> Invitation:
    """Read an invitation; raises InputError where it is not there, not private or not one. Its secret is not quoted."""
    content = read_private(
        path, OPTION, "lte invite on node 0 writes it; copy it here, with mode 600", MAX_INVITATION_BYTES
    )
    remedy = "write it anew with lte invite"
    try:
        table = json.loads(content)
        if isinstance(table, dict) and table.get("version", 1) != 1:
            raise InputError(f"{path} is an invitation of another version of lte; install node 0's version here")
        return Invitation.model_validate(table)
    except ValidationError as error:
        # Not pydantic's own text, which quotes values.
        key = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise InputError(f"{path} is no invitation: {key} is missing or wrong; {remedy}") from None
    except ValueError:
        raise InputError(f"{path} is no invitation, or was cut short; {remedy}") from None


def check_versions(invitation: Invitation) -> None:
    """Raise InputError where this machine has another lte or torch than node 0."""
    here = {"lte": version(), "torch": torch_version()}
    for program, there in (("lte", invitation.lte), ("torch", invitation.torch)):
        if there is not None and there != here[program]:
            raise InputError(
                f"{program} is {here[program] or 'not installed'} here and {there} on node 0; install the same version"
            )


def check_code(invitation: Invitation) -> None:
    """Raise InputError where a module of the user's differs from node 0's; nothing is imported."""
    for code in invitation.code:
        if code_digest(code.key, code.name) != code.sha256:
            module = code.name.partition(":")[0].partition(".")[0]
            raise InputError(f"{code.key} = {code.name!r}: the files of {module} differ from node 0's; copy its here")


def invited_run(invitation: Invitation, folder: Path, data: str | None) -> Run:
    """Return the run of an invitation; `data` is where its data lie here.

    run.toml is written into `folder`, where its profile is found until a run folder is made. Raises InputError.
    """
    path = folder / "run.toml"
    path.write_text(invitation.run, encoding="utf-8")
    run = load_given_run(path)
    if data is not None:
        if run.data.path is None:
            raise InputError(f"--data {data}: the run's data is {run.data.name!r}, which is no path; leave --data out")
        run = run.model_copy(update={"data": run.data.model_copy(update={"path": str(Path(data).absolute())})})
    if run.data.path is not None and not Path(run.data.path).exists():
        raise InputError(
            f"data.path = {run.data.path!r} is not here; copy node 0's data there, or name their place with --data PATH"
        )
    return run


def check_data(invitation: Invitation, fingerprint: str, num_bytes: int) -> None:
    """Raise InputError where the data here have another content than node 0's."""
    if (fingerprint, num_bytes) != (invitation.data_sha256, invitation.data_bytes):
        raise InputError(
            f"the data here have other content ({num_bytes:,} bytes with digest {fingerprint[:8]}) than node 0's "
            f"({invitation.data_bytes:,} bytes with digest {invitation.data_sha256[:8]}); copy node 0's, or name their "
            "place with --data PATH"
        )
