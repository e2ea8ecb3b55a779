"""Before a run on several machines: meet, prove the shared secret, agree, measure the links. Torch-free."""

from simulate.preflight.address import parse_endpoint
from simulate.preflight.facts import Facts, NodeFacts
from simulate.preflight.links import LinkFigures, measured_link, slow_links
from simulate.preflight.preflight import Preflight
from simulate.preflight.probe import Limits
from simulate.preflight.secret import VARIABLE as SECRET_VARIABLE
from simulate.preflight.secret import Secret, make_secret, read_secret
from simulate.preflight.settings import Result, Settings
from simulate.preflight.station import LinkPlan

__all__ = [
    "SECRET_VARIABLE",
    "Facts",
    "Limits",
    "LinkFigures",
    "LinkPlan",
    "NodeFacts",
    "Preflight",
    "Result",
    "Secret",
    "Settings",
    "make_secret",
    "measured_link",
    "parse_endpoint",
    "read_secret",
    "slow_links",
]
