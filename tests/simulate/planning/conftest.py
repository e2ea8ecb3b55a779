"""The fixtures that call `lte`: what a plan prints is tested through the command."""

from __future__ import annotations

from tests.ltecli.conftest import here, lte, refused

__all__ = ["here", "lte", "refused"]
