"""All candidates of a plan as CSV, one a row: `lte plan --csv` writes it for spreadsheets and pandas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from simulate.common.csv_text import csv_text
from simulate.planning.candidate import Candidate, Rejected, candidate_of
from simulate.planning.plan_json import candidate_json
from simulate.planning.planner import Plan


def candidates_csv(plan: Plan, top: int | None = None) -> str:
    """Return the candidates from the best one on, those of other methods, and the rejected ones; with `top`, the best.

    The columns are the keys of the plan's JSON, memory with one for each part and phase, behind the place among the
    candidates, whether it is the choice, whether it fits, and why not.
    """
    rows = list(_rows(plan, top))
    names = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text(names, ([row.get(name) for name in names] for row in rows))


def _rows(plan: Plan, top: int | None) -> Iterator[dict[str, Any]]:
    for place, candidate in enumerate(plan.candidates[:top], 1):
        yield _row(candidate, place, candidate is plan.chosen)
    for result in (*plan.rivals, *plan.rejected[:top]):
        yield _row(result, None, False)


def _row(result: Candidate | Rejected, place: int | None, is_chosen: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "place": place,
        "chosen": is_chosen,
        "fits": isinstance(result, Candidate),
        "reason": result.reason if isinstance(result, Rejected) else None,
    }
    for key, value in candidate_json(candidate_of(result)).items():
        if key == "classes":  # a list of tables has no cell; a plan's choice alone has classes
            row[key] = "; ".join(f"{one['micro_batch']} x {one['accumulate']}" for one in value)
        elif isinstance(value, dict):
            row |= {f"{key}_{part}": size for part, size in value.items()}
        else:
            row[key] = "; ".join(value) if isinstance(value, list) else value
    return row
