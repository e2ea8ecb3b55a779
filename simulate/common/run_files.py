"""Names of the files and folders of a run folder."""

from __future__ import annotations

RUN_FILE, PROFILE_FILE, PLAN_FILE, EVENTS_FILE = "run.toml", "profile.toml", "plan.json", "events.jsonl"
"""Files of a run folder."""
LOGGERS_FILE = "loggers.json"
"""Ids of the run in external stores of curves, where it has any."""
EXTENDED_FILE = "extended.json"
"""Digests of run.toml before it got more steps, which older checkpoints have."""
STATUS_FILE = "status.json"
"""The run's present state, for `lte watch`; written while it trains."""
LOCK_FILE = ".lock"
"""Locked while a process trains in the folder; the file stays."""
CHECKPOINTS, TENSORBOARD, LOGS = "checkpoints", "tensorboard", "logs"
"""Folders of a run folder."""
