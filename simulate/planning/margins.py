"""Estimate the uncertainty of planned times from the sources of the profile's figures."""

from __future__ import annotations

from dataclasses import dataclass

from simulate.config.hardware import LOCAL, Profile

MARGINS = {"measured": 1.0, "datasheet": 1.25, "guess": 1.5}
"""Factor by which times may be shorter or longer, by source: a rule of thumb that every plan prints. Real efficiencies
of one card differ by about as much between networks (profiles/*.toml guess 0.3 to 0.5)."""
RULE = (
    "ranges of times: x 1/1.25 to 1.25 where figures are a datasheet's, x 1/1.5 to 1.5 where they are guesses, none "
    "where measured; compute by the devices' source, exchanges by the link's"
)


@dataclass(frozen=True)
class Margins:
    """Factors by which compute and exchanges may be shorter or longer than planned."""

    compute: float = 1.0
    exchange: float = 1.0
    is_order: bool = False
    """Whether times are known by their order of magnitude alone: this machine's, which nobody has measured."""

    @classmethod
    def of(cls, profile: Profile) -> Margins:
        """Return the margins of a profile: of its least certain device, and of its link."""
        # The slowest device sets the pace and may be any, so that the least certain one decides.
        unmeasured = profile.name == LOCAL and any(device.source == "guess" for device in profile.device)
        return cls(max(MARGINS[device.source] for device in profile.device), MARGINS[profile.link.source], unmeasured)

    @property
    def is_point(self) -> bool:
        """Whether times are as certain as measurements."""
        return self.compute == self.exchange == 1.0
