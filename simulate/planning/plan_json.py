"""Write the JSON of one candidate with all of its figures, as `lte plan --json` prints it and run folders keep it.

The keys are a contract: scripts and older run folders read them, so a key is added, but never renamed or dropped.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from simulate.planning.candidate import Candidate, joined_devices
from simulate.planning.time_ranges import range_keys


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """Return a candidate's keys and figures; a key that its method lacks is None or its neutral value."""
    run, method, time = candidate.run, candidate.run.method, candidate.time
    return {
        "method": method.name,
        "rank": getattr(method, "rank", None),
        "heads": run.heads or None,
        "heads_per_device": getattr(method, "heads_per_device", None),
        **({"devices_per_node": size} if (size := joined_devices(method)) > 1 else {}),
        "quantize": method.frozen_format,
        "merge_every": getattr(method, "merge_every", None),
        "merge_transport": getattr(method, "merge_transport", None),
        "reset": getattr(method, "reset", None),
        "wire": getattr(method, "wire", "full"),
        "fragments": getattr(method, "fragments", 1),
        "micro_batch": run.train.micro_batch,
        "accumulate": run.train.accumulate,
        "activation_checkpointing": run.train.activation_checkpointing,
        "autocast": run.train.autocast,
        "optimizer": run.train.optimizer,
        "optimizer_state": run.train.optimizer_state,
        "learning_rate": run.train.learning_rate,
        "final_share": run.train.final_share,
        "steps": run.train.steps,
        "memory_bytes": {"total": candidate.memory.total, **candidate.memory.parts()},
        "memory_by_phase": candidate.memory_by_phase,
        "host_memory_bytes": candidate.host_memory_bytes,
        "host_memory_by_part": candidate.host_memory_by_part,
        "sent_bytes_per_round": candidate.sent_bytes_per_round,
        "sent_bytes_per_step": candidate.sent_bytes_per_round / time.steps,
        "received_bytes_per_step": candidate.received_bytes_per_round / time.steps,
        "sent_bytes": candidate.sent_bytes_per_round * candidate.rounds,
        "compute_s": time.compute_s,
        "exchange_s": time.exchange_s,
        "step_s": candidate.step_s,
        "round_s": time.round_s,
        "samples_per_s": candidate.samples_per_s,
        "idle_share": candidate.idle_share,
        "wall_s": candidate.wall_s,
        "training_s": candidate.training_s,
        "evaluations": candidate.eval_and_save.evaluations,
        "evaluation_s": candidate.eval_and_save.evaluation_s,
        "checkpoints": candidate.eval_and_save.saves,
        "checkpoint_bytes": candidate.eval_and_save.save_bytes,
        "checkpoint_s": candidate.eval_and_save.save_s,
        "checkpoint_waits_s": candidate.eval_and_save.saving_s,
        "assumed_samples_factor": candidate.samples_factor,
        "equivalent_wall_s": candidate.equivalent_wall_s,
        **range_keys(candidate),
        "warnings": list(candidate.warnings),
        **_of_classes(candidate),
    }


def _of_classes(candidate: Candidate) -> dict[str, Any]:
    """Return the figures of classes of unequal devices; `memory_bytes` are the fullest one's."""
    if not candidate.run.cluster.classes:
        return {}
    return {"classes": [asdict(one) for one in candidate.classes], "fullest_class": candidate.fullest_class}
