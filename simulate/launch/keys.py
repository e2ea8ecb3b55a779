"""Names that the processes of a launched run share: files, keys of the store, exit codes."""

from __future__ import annotations

RUN_FILE, PROFILE_FILE, EVENTS_FILE, CHECKPOINTS = "run.toml", "profile.toml", "events.jsonl", "checkpoints"
"""What the worker reads and writes in the run's folder."""
STOP, OUTCOME, FATAL, REPORTED, STEP, START, LINKS = "stop", "outcome", "fatal", "told", "step", "start", "links"
BEGUN, ANSWERED = "begun", "answered"
"""Keys of the store."""
FAILED_EXIT, FATAL_EXIT, REPORTED_EXIT = 1, 2, 3
"""3: what failed was told."""
AGENT_THREAD, LISTENER_THREAD = "lte-agent", "lte-listener"
"""Threads that may be in a call which does not return: to a store behind a link that is down."""
