"""Messages of a node's agent about processes that failed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

from torch.distributed import HashStore

from simulate.config.run import build_run
from simulate.launch.agent import Launch, Node
from simulate.launch.keys import REPORTED


def test_a_failure_is_quoted_from_the_newest_log_not_from_the_highest_attempt(tmp_path: Path) -> None:
    # A new checkpoint refills the restart budget, and torchrun then numbers attempts from 0 again.
    for attempt, text, written_s in ((3, "an old failure", 100), (0, "the new failure", 200)):
        log = tmp_path / f"logs/node0/run/attempt_{attempt}/0/stderr.log"
        log.parent.mkdir(parents=True)
        log.write_text(f"{text}\n\n")
        os.utime(log, (written_s, written_s))
    launch = Launch(tmp_path, build_run({}), Node(processes=1, device="cpu"), lambda line: None, threads=1)
    launch._store = store = HashStore()
    assert launch.on_failures({0: SimpleNamespace(exitcode=1, local_rank=0)}) == (0, True)
    assert store.get(f"{REPORTED}/1") == b"process 0 on node 0 ended with 1: the new failure"
