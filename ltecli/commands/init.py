"""lte init: a profile and a run.toml from a few answers: which devices, what links, which network, whose data.

A profile has thirty figures, and few people know theirs. The devices of the shipped profiles are known cards with
sources; links are named as they are sold. Options answer, or in a terminal questions do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

import profiles
from ltecli.commands.plan import nearest_miss_text, show_verdict, write_run
from ltecli.console import Output
from ltecli.output_paths import check_file, write_file
from ltecli.plan_request import PlanArgs, plan_request
from simulate.common import toml_io
from simulate.common.errors import InputError, NothingFeasibleError, near_match
from simulate.config.hardware import LOCAL, Device, Link, Profile
from simulate.config.lines import LINE_EXAMPLES, PAYLOAD_SHARE, Place, line_sources, read_line
from simulate.config.profile_slips import rate_text
from simulate.config.profiles import detect_local, load_profile
from simulate.planning.verdict import verdict_of

IN_A_ROOM = "1 GbE"
"""Link between devices of one place."""
VARIANTS = frozenset({"ti", "super", "laptop", "mobile"})
"""Words of a card's name that stand for another card."""


@dataclass(frozen=True)
class InitArgs:
    """Answers that the command line gives; what is missing is asked for in a terminal."""

    gpus: Sequence[str] = ()
    links: Sequence[str] = ()
    """One for each of `gpus`, in their order, or one for all."""
    model: str | None = None
    data: str | None = None
    tokens: int | None = None
    name: str = "home"


def init_command(args: InitArgs, folder: Path, force: bool) -> int:
    """Write NAME.toml, a profile, and run.toml into a folder; a wrong answer raises InputError and writes nothing."""
    if not re.fullmatch(r"[\w-]+", args.name):
        raise InputError(f"--name {args.name!r}: must be letters, digits, - and _, as it names a file; try home")
    # Absolute, since run.toml names the profile and is used from any folder.
    profile_path, run_path = folder.resolve() / f"{args.name}.toml", folder.resolve() / "run.toml"
    for path in (profile_path, run_path):
        check_file(path, force, path.name, "--out")
    args = _asked(args)
    output = Output()
    profile, notes = _profile(args)
    # The plan reads the profile by its path, as lte train will.
    is_new = not folder.exists()
    before = profile_path.read_text(encoding="utf-8") if profile_path.exists() else None
    write_file(profile_path, toml_io.dump(profile.model_dump(exclude_none=True)))
    request = PlanArgs(profile=str(profile_path), model=args.model, data=args.data, tokens=args.tokens)
    try:
        plan = plan_request(request)
    except InputError:
        if before is None:
            profile_path.unlink()
            if is_new:
                folder.rmdir()
        else:
            write_file(profile_path, before)
        raise
    for note in (*notes, *_payload_notes(args.links)):
        output.text(note)
    show_verdict(verdict_of(plan), output)
    if plan.chosen is None:
        raise NothingFeasibleError(f"{nearest_miss_text(plan)}; {profile_path} is written, to be edited")
    write_run(run_path, plan)
    output.hint(
        f"wrote {profile_path} and {run_path}, which has that profile, too; next: lte profile check {profile_path}, "
        f"lte train {run_path}"
    )
    return 0


def _profile(args: InitArgs) -> tuple[Profile, list[str]]:
    """Return the answers' profile, and notes on its link: each of the devices' own, or one for all."""
    link, notes = _slowest([parse_link(text) for text in args.links])
    devices, places = [parse_device(text) for text in args.gpus], list[Place]()
    if len(args.links) == len(devices) > 1:
        # Lines lead to a hub; rooms of several devices share theirs, and in them 1 GbE is a guess.
        notes = []
        for index, (device, text) in enumerate(zip(devices, args.links, strict=True)):
            name = f"place{index}"
            places.append(Place.model_validate({"name": name, "link": text}))
            devices[index] = device.model_copy(update={"place": name})
        link = parse_link(IN_A_ROOM)
    return Profile(name=args.name, description=", ".join(args.gpus), device=devices, link=link, place=places), notes


def _asked(args: InitArgs) -> InitArgs:
    """Return the answers with those that were missing asked for; raises InputError where nobody can answer."""
    missing = [option for option, given in (("--gpu", args.gpus), ("--link", args.links)) if not given]
    if missing and not sys.stdin.isatty():
        raise InputError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; for example "
            "lte init --gpu '8 x GTX 1080 Ti' --link '1 GbE' --model gpt2 --data texts/"
        )
    if not args.gpus:
        args = replace(args, gpus=[_ask("Devices, like 8 x GTX 1080 Ti (or local)", parse_device)])
    if not args.links:
        args = replace(args, links=[_ask(f"Link between them, like {LINE_EXAMPLES}", parse_link)])
    if missing and args.model is None:
        args = replace(args, model=typer.prompt("Network", default="gpt2", err=True))
    if missing and args.data is None:
        data = typer.prompt("Text or images (a path; empty: the embedded text)", default="", err=True)
        args = replace(args, data=data or None)
    return args


def _ask(question: str, parse: Callable[[str], Any]) -> str:
    """Return an answer that can be read, asking until there is one."""
    while True:
        answer: str = typer.prompt(question, err=True)
        try:
            parse(answer)
        except InputError as error:
            typer.echo(str(error), err=True)
        else:
            return answer


def known_devices() -> dict[str, Device]:
    """Return the devices of the shipped profiles by kind, and this machine as `local`."""
    shipped = [device for name in profiles.names() for device in load_profile(name).device]
    return {**{device.kind: device for device in shipped}, LOCAL: detect_local().device[0]}


def parse_device(text: str) -> Device:
    """Return a device of `8 x GTX 1080 Ti`, so many of a known kind; raises InputError."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*]\s*)?(.+?)\s*", text)
    assert match is not None
    count, words, known = int(match[1] or 1), match[2], known_devices()
    if count < 1:
        raise InputError(f"--gpu {text!r}: must be at least one device; write it like '8 x GTX 1080 Ti'")
    # A GTX 1080 is no GTX 1080 Ti: words that tell variants apart must be given.
    found = [kind for kind in known if _plain(words) in _plain(kind) and _variant(words) == _variant(kind)]
    if not found:
        raise InputError(f"--gpu {text!r}: is not known; {near_match(words, known)}; or edit lte profile show NAME")
    # The shortest name is the plainest card of those that contain the words.
    return known[min(found, key=len)].model_copy(update={"count": count})


def _variant(text: str) -> frozenset[str]:
    return VARIANTS.intersection(re.findall(r"[a-z]+", text.lower()))


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def parse_link(text: str) -> Link:
    """Return a link as it is sold; raises InputError."""
    try:
        figures = read_line(text)
    except ValueError as error:
        raise InputError(f"--link {error}") from None
    return Link(topology="star", **figures._asdict(), source="guess", sources=line_sources(text))


def _payload_notes(links: Sequence[str]) -> list[str]:
    """Return a note on what TCP takes from lines' rates; Wi-Fi's guess already is what arrives."""
    lines = [text for text in links if not _plain(text).startswith("wifi")]
    if not lines:
        return []
    said = f"{' and '.join(lines)} x {PAYLOAD_SHARE}, what TCP leaves for data"
    return [f"the profile's link is {said}; edit it where you measured another rate"]


def _slowest(links: Sequence[Link]) -> tuple[Link, list[str]]:
    """Return one link for all, and a note where several were given."""
    up, down = min(link.up_bytes_per_s for link in links), min(link.down_bytes_per_s for link in links)
    latency_s = max(link.latency_s for link in links)
    update = {"up_bytes_per_s": up, "down_bytes_per_s": down, "latency_s": latency_s}
    slowest = links[0].model_copy(update=update)
    if len(links) == 1:
        return slowest, []
    return slowest, [
        f"all places are planned with the slowest link: up {rate_text(up)}, down {rate_text(down)}; devices wait for "
        "it at merges"
    ]
