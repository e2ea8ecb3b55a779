"""Help pages: options under headings that say what they are for, and an example at the end.

`lte plan` alone has thirty options; in one list nobody finds the five that matter. app.py's commands write their pages
by these functions. An option that no heading names is one of the question itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEADINGS: dict[str, tuple[str, ...]] = {
    "What": (),
    "Pin": ("method", "rank", "heads_per_device", "quantize", "merge_every", "assignments"),
    "Launch": (
        "launch", "processes", "nodes", "node", "join", "interface", "secret_file", "trust_network", "port", "store",
        "listen",
    ),
    "Explain": ("show_all", "top", "why", "timeline", "rounds", "timeline_svg", "verify", "layers"),
    "Output": ("out", "force", "form", "html", "csv", "as_json", "quiet", "help"),
}  # fmt: skip
"""Options by heading, in the order of the page; the first one has those that none names."""
EXAMPLES = {
    "lte": "lte plan --profile gtx1080ti_x8 --model gpt2",
    "lte plan": "lte plan --profile gtx1080ti_x8 --model gpt2 --data texts/ -o run.toml",
    "lte init": "lte init --gpu '8 x GTX 1080 Ti' --link '1 GbE' --model gpt2 --data texts/",
    "lte probe": "lte probe run.toml -o probe.json",
    "lte validate": "lte validate --quick --only memory",
    "lte train": "lte train run.toml --set train.steps=1000",
    "lte doctor": "lte doctor run.toml --launch",
    "lte secret": "lte secret lte.secret",
    "lte store": "lte store --listen 10.99.0.1:29600 --secret-file lte.secret",
    "lte report": "lte report runs/first runs/second",
    "lte watch": "lte watch runs/first",
    "lte sweep": "lte sweep run.toml --set method.rank=8,16,32 --seeds 3",
    "lte compare": "lte compare run.toml --with ddp,diloco",
    "lte export": "lte export runs/first --format hf",
    "lte sample": "lte sample runs/first --prompt 'def '",
    "lte eval": "lte eval runs/first --data other_texts/",
    "lte profile": "lte profile list",
    "lte profile list": "lte profile list --json",
    "lte profile show": "lte profile show gtx1080ti_x8 > mine.toml",
    "lte profile check": "lte profile check mine.toml",
    "lte profile measure": "lte profile measure --quick -o mine.toml",
    "lte profile serve": "lte profile serve --interface eth0 --secret-file lte.secret",
}
"""A line to paste, by command."""


def heading_of(option: str) -> str:
    """Return the heading of an option or argument, by the name of its parameter."""
    return next((heading for heading, options in HEADINGS.items() if option in options), next(iter(HEADINGS)))


def write_options(parameters: Iterable[Any], ctx: Any, formatter: Any) -> None:
    """Write the parameters of a command under their headings; those without help stay away."""
    under: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
    for parameter in parameters:
        record = parameter.get_help_record(ctx)
        if record is not None:
            under[heading_of(parameter.name)].append(record)
    for heading, records in under.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def write_example(command: str, formatter: Any) -> None:
    """Write a command's example, if it has one."""
    if command in EXAMPLES:
        with formatter.section("Example"):
            formatter.write_text(EXAMPLES[command])
