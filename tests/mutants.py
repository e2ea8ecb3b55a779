"""Break what must never break, one line at a time, and expect a test to turn red: python tests/mutants.py

A mutation replaces one text in a copy of the tree. The tests that are named beside it must pass before, and one of them
must fail after; --everything runs all that `make test` runs instead. Prints a line for each mutation. Exit code 1 says
that one survived, 2 that one does not apply or its tests do not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
PACKAGES = ("simulate", "ltecli", "profiles")
PASSED, FAILED = 0, 1
"""Exit codes of pytest; all others say that it ran no tests."""
TIMEOUT_S, EVERYTHING_TIMEOUT_S = 900, 3600
FIRST_FAILURE = re.compile(r"^FAILED (\S+?(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)


class BrokenMutantError(Exception):
    """A mutation that does not apply, or whose tests cannot be run."""


@dataclass(frozen=True)
class Mutant:
    """One thing that must never break."""

    name: str
    """What it does once it is broken."""
    file: str
    before: str
    """Occurs once in the file."""
    after: str
    tests: tuple[str, ...]
    """One of them turns red."""


MUTANTS = (
    Mutant(
        name="a late device's change counts as much as a fresh one",
        file="simulate/methods/quorum.py",
        before="self.brought_N * discounts_N * ",
        after="self.brought_N * ",
        tests=("tests/simulate/methods/test_quorum.py::test_a_change_that_comes_one_merge_late_by_hand",),
    ),
    Mutant(
        name="a device that takes no part in a rounded merge loses what its last message left out",
        file="simulate/methods/lte/merge.py",
        before="        error_LX[absent] = kept\n",
        after="",
        tests=("tests/simulate/methods/test_quorum_wire.py::test_merged_products_and_errors_are_what_heads_learned",),
    ),
    Mutant(
        name="what a rounded mean of some devices loses counts once, not N times for an N-th",
        file="simulate/comm/mean_of_some.py",
        before="alpha=self.communicator.num_devices",
        after="alpha=1",
        tests=("tests/simulate/methods/test_quorum_wire.py::test_what_was_merged_and_the_errors_are_what_was_learned",),
    ),
    Mutant(
        name="heads of other classes are added up with a class's own",
        file="simulate/methods/lte/merge.py",
        before="if device in team.devices)",
        after=")",
        tests=("tests/simulate/methods/test_quorum_unequal.py::test_lte_trains_like_the_twin",),
    ),
    Mutant(
        name="unequal devices' heads count alike, whatever they trained on",
        file="simulate/methods/base.py",
        before="return None if samples_N is None else self._as_shares(samples_N)",
        after="return None",
        tests=("tests/simulate/methods/test_unequal.py::test_heads_of_unequal_devices_train_like_the_twin",),
    ),
    Mutant(
        name="what a broken merge has changed stays with some of the survivors",
        file="simulate/training/together.py",
        before="                backup.restore()\n",
        after="                pass\n",
        tests=("tests/simulate/training/test_together.py::test_a_broken_merge_is_taken_back_and_done_again",),
    ),
    Mutant(
        name="devices of one place each have its line for themselves",
        file="simulate/costs/line_paths.py",
        before="min(line.up_bytes_per_s, line.place_up_bytes_per_s / crossing)",
        after="min(line.up_bytes_per_s, line.place_up_bytes_per_s)",
        tests=("tests/simulate/costs/test_line_paths.py::test_the_edges_that_leave_a_place_share_its_line",),
    ),
    Mutant(
        name="zeros that fill up the last block of int2 count for its scale",
        file="simulate/comm/compression.py",
        before=".sub_(WIRE_BLOCK - counts_LW)",
        after="",
        tests=("tests/simulate/comm/test_compression.py::test_a_short_int2_block_counts_only_its_own_numbers",),
    ),
    Mutant(
        name="an invitation that others can read is taken",
        file="simulate/launch/preflight/secret.py",
        before='            raise InputError(f"{option} {path} is open to other users',
        after='            print(f"{option} {path} is open to other users',
        tests=("tests/ltecli/commands/test_invite.py::test_a_file_that_others_can_read_is_refused",),
    ),
    Mutant(
        name="LTE's merge divides by devices, not by heads",
        file="simulate/methods/lte/products.py",
        before="options.alpha / one.rank / (devices * one.heads_per_device)",
        after="options.alpha / one.rank / devices",
        tests=("tests/simulate/methods/test_merge.py::test_the_first_merge_adds_the_mean_of_the_products",),
    ),
    Mutant(
        name="without reset, a merge adds once more what the last one added",
        file="simulate/methods/lte/merge.py",
        before="        if layer.start_weight is None:\n            return layer.merged_weight()\n",
        after="        if not own:\n            return layer.merged_weight()\n",
        tests=("tests/simulate/methods/test_merge.py::test_without_reset_the_second_merge_adds_only_what_changed",),
    ),
    Mutant(
        name="one device's gradients decide how another's are clipped",
        file="simulate/methods/stepper.py",
        before="(torch.linalg.vector_norm(norms, dim=0) + 1e-6)",
        after="(torch.linalg.vector_norm(norms, dim=(0, 1), keepdim=True)[0] + 1e-6)",
        tests=("tests/simulate/methods/test_method.py::test_clipping_scales_only_the_device_that_exceeds_the_norm",),
    ),
    Mutant(
        name="DiLoCo's outer optimizer forgets its momentum",
        file="simulate/methods/diloco/train.py",
        before=".mul_(self.options.outer_momentum).add_(change)",
        after=".mul_(0.0).add_(change)",
        tests=("tests/simulate/methods/test_diloco.py::test_two_outer_steps_by_hand",),
    ),
    Mutant(
        name="what rounding left out of a message is not sent with the next one",
        file="simulate/comm/compression.py",
        before="x_NC.sub_(decode(message, self.chunk, self.wire, x_NC.dtype))",
        after="x_NC.zero_()",
        tests=("tests/simulate/comm/test_compression.py::test_a_compressed_mean_by_hand",),
    ),
    Mutant(
        name="a device computes with another device's adapters",
        file="simulate/layers/lora.py",
        before="out_HMX.baddbmm_(small_HMR, self.a_HRI if to_inputs else self.b_HOR.mT)",
        after="out_HMX.baddbmm_(small_HMR, self.a_HRI if to_inputs else self.b_HOR.flip(0).mT)",
        tests=("tests/simulate/layers/test_lora.py::test_lora_computes_with_its_effective_weight",),
    ),
    Mutant(
        name="a draw depends on which process makes it",
        file="simulate/layers/lora.py",
        before='seed = address(self.spec.seed, "adapter", self.name, head, steps_done)',
        after='seed = address(self.spec.seed, "adapter", self.name, index, steps_done)',
        tests=("tests/simulate/layers/test_lora.py::test_a_head_draws_the_same_whoever_else_is_local",),
    ),
    Mutant(
        name="an all-gather counts what a device keeps as sent",
        file="simulate/comm/base.py",
        before="crossings = devices * (devices - 1) * own",
        after="crossings = devices * devices * own",
        tests=("tests/simulate/comm/test_transfers.py::test_lte_sends_what_was_planned",),
    ),
    Mutant(
        name="real processes take what one sent for what everybody sent",
        file="simulate/comm/process_exchanges.py",
        before="    for part, count in zip(parts, counts, strict=True):",
        after="    for part, count in zip([parts[0]] * len(parts), counts, strict=True):",
        tests=("tests/simulate/comm/test_process_group.py::test_a_device_that_draws_other_batches_is_noticed",),
    ),
    Mutant(
        name="a plan forgets the memory of exchanges and of the optimizer's step",
        file="simulate/costs/memory.py",
        before="    others = (*lasting.exchange, SAVING)\n",
        after="    others: tuple[Phase, ...] = (SAVING,)\n",
        tests=("tests/simulate/costs/test_memory.py::test_planned_memory_is_what_the_allocator_gives",),
    ),
    Mutant(
        name="a plan counts the latency of one hop of a ring only",
        file="simulate/costs/message_time.py",
        before="seconds = hops * (latency_s + share * transfer.payload_bytes / wire.bytes_per_s)",
        after="seconds = latency_s + hops * share * transfer.payload_bytes / wire.bytes_per_s",
        tests=("tests/simulate/costs/test_step_time.py::test_a_message_takes_what_its_links_allow",),
    ),
    Mutant(
        name="a quantised base loses small updates",
        file="simulate/layers/lora.py",
        before="            return self.master.to(self.b.device, copy=True)\n",
        after="            return dense(self.frozen or self.weight)\n",
        tests=("tests/simulate/layers/test_quantized.py::test_a_thousand_tiny_changes_arrive_with_a_master",),
    ),
    Mutant(
        name="a resumed run drops a moment of Adam",
        file="simulate/methods/method_state.py",
        before="{k: v.to(parameter.device).clone() for k, v in moments.items()}",
        after='{k: v.to(parameter.device) * (k != "exp_avg") for k, v in moments.items()}',
        tests=("tests/simulate/methods/test_adapter_resume.py::test_a_restored_method_continues_bit_for_bit[lte-6]",),
    ),
    Mutant(
        name="a damaged checkpoint is loaded",
        file="simulate/training/checkpoints.py",
        before='if digest != meta["tensors_sha256"]:',
        after='if len(digest) != len(meta["tensors_sha256"]):',
        tests=("tests/ltecli/commands/test_resume.py::test_damage_is_refused_and_nothing_written[tensors altered]",),
    ),
    Mutant(
        name="a checkpoint counts as whole before it is on the disk",
        file="simulate/training/checkpoints.py",
        before='return path.with_name(f".{path.name}.{os.getpid()}.partial")',
        after="return path",
        tests=(
            "tests/simulate/training/test_checkpoints.py::test_a_checkpoint_counts_only_once_all_of_it_is_on_the_disk",
        ),
    ),
    Mutant(
        name="validation overlaps what is trained on",
        file="simulate/data/text.py",
        before="return self.tokens[: self._split]",
        after="return self.tokens[:]",
        tests=("tests/simulate/data/test_text.py::test_the_last_tenth_is_held_out",),
    ),
    Mutant(
        name="the short last batch of an evaluation counts as much as a full one",
        file="simulate/training/loop.py",
        before="[scores[0].numel(), *(float(score_M.double().sum()) for score_M in scores)]",
        after="[1.0, *(float(score_M.double().mean()) for score_M in scores)]",
        tests=(
            "tests/ltecli/commands/test_export.py::test_exported_weights_have_the_loss_that_the_run_ended_with[gpt-lte]",
        ),
    ),
    Mutant(
        name="a device's gradients are divided by another device's loss scale",
        file="simulate/optim/loss_scale.py",
        before="            scale = self.scale_C.repeat_interleave(len(gradient) // len(self.scale_C))\n",
        after="            scale = self.scale_C.repeat(len(gradient) // len(self.scale_C))\n",
        tests=("tests/simulate/optim/test_loss_scale.py::test_gradients_are_unscaled_by_their_rows_own_scale",),
    ),
    Mutant(
        name="a secret is in the log of an error",
        file="simulate/launch/preflight/secret.py",
        before='f"{name} holds no certificate with its key, which',
        after='f"{name} holds no certificate with its key in {text!r}, which',
        tests=(
            "tests/simulate/launch/preflight/test_secret.py::"
            "test_text_that_is_no_such_secret_is_refused_by_name_and_not_quoted",
        ),
    ),
    Mutant(
        name="a node with another run.toml takes part",
        file="simulate/launch/preflight/consistency.py",
        before="if same_program and node.run_fingerprint != node_0.run_fingerprint:",
        after="if same_program and node.run.keys() != node_0.run.keys():",
        tests=("tests/simulate/launch/preflight/test_consistency.py::test_a_differing_run_names_key_and_values",),
    ),
    Mutant(
        name="a stranger without a certificate gets as far as the greeting",
        file="simulate/launch/preflight/secret.py",
        before="context.verify_mode = ssl.CERT_REQUIRED",
        after="context.verify_mode = ssl.CERT_NONE",
        tests=("tests/simulate/launch/preflight/test_handshake.py::test_a_caller_without_a_certificate_is_refused",),
    ),
    Mutant(
        name="a stranger whose certificate the run's key has signed is let in",
        file="simulate/launch/preflight/handshake.py",
        before="if sock.getpeercert(binary_form=True) != me.secret.certificate:",
        after="if not sock.getpeercert(binary_form=True):",
        tests=(
            "tests/simulate/launch/preflight/test_handshake.py::"
            "test_a_certificate_that_the_key_has_signed_is_not_the_certificate",
        ),
    ),
    Mutant(
        name="a node speaks an older TLS",
        file="simulate/launch/preflight/secret.py",
        before="context.minimum_version = ssl.TLSVersion.TLSv1_3",
        after="context.minimum_version = ssl.TLSVersion.TLSv1_2",
        tests=(
            "tests/simulate/launch/preflight/test_handshake.py::"
            "test_tls_1_2_is_refused_by_both_ends_with_the_right_certificate",
        ),
    ),
    Mutant(
        name="a plan takes memory that the device's system reserves",
        file="simulate/planning/planner.py",
        before="short_bytes = max(0, memory_bytes - device.usable_bytes)",
        after="short_bytes = max(0, memory.tensors - device.memory_bytes)",
        tests=("tests/ltecli/commands/test_plan.py::test_candidates_fit_and_the_rejected_say_why_they_do_not",),
    ),
    Mutant(
        name="a report shows planned memory as measured",
        file="ltecli/runs/figures.py",
        before='"measured": memory and memory["measured_bytes"],',
        after='"measured": memory and tensor_bytes(chosen),',
        tests=("tests/ltecli/commands/test_report.py::test_each_figure_comes_from_where_its_label_says",),
    ),
    Mutant(
        name="a refused command leaves a folder behind",
        file="ltecli/runs/run_folder.py",
        before="        shutil.rmtree(path, ignore_errors=True)\n        if isinstance(error, OSError):\n",
        after="        if isinstance(error, OSError):\n",
        tests=("tests/ltecli/commands/test_train.py::test_a_folder_that_cannot_be_filled_is_taken_away",),
    ),
    Mutant(
        name="an export inside a round leaves out what is not merged yet",
        file="ltecli/commands/export.py",
        before="        method.merge(run.train.steps - 1)",
        after="        assert method.merge_due(run.train.steps - 1)",
        tests=("tests/ltecli/commands/test_export.py::test_a_checkpoint_inside_a_round_is_merged_first",),
    ),
    Mutant(
        name="a report imports the user's network, whose counts its folder has",
        file="simulate/models/schema.py",
        before="        if self._stored_shape is not None:\n",
        after="        if isinstance(self._stored_shape, str):\n",
        tests=("tests/ltecli/commands/test_whole_run_file.py::test_a_report_imports_no_network",),
    ),
    Mutant(
        name="a sweep that goes on trains its finished runs once more",
        file="ltecli/runs/many_runs.py",
        before="        if share > 0:\n",
        after="        if share >= 0:\n",
        tests=("tests/ltecli/commands/test_sweep.py::test_the_same_command_repeats_no_finished_run",),
    ),
    Mutant(
        name="a report compares losses of different data",
        file="ltecli/runs/comparison.py",
        before="        if len(set(digests)) > 1:\n",
        after="        if len(set(digests)) > len(digests):\n",
        tests=("tests/ltecli/runs/test_comparison.py::test_what_cannot_be_compared_is_said",),
    ),
    Mutant(
        name="a parameter that its network freezes is trained",
        file="simulate/layers/per_device.py",
        before="    if not parameter.requires_grad:\n",
        after="    if parameter.is_meta:\n",
        tests=(
            "tests/simulate/models/test_any_network.py::"
            "test_every_method_counts_what_was_planned_exports_what_it_reports_and_resumes[part1-ddp]",
        ),
    ),
)


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """Return the file's text with the mutation; raises BrokenMutantError where it does not apply."""
    path = root / mutant.file
    if not path.is_file():
        raise BrokenMutantError(f"{mutant.name}: there is no {mutant.file}")
    text = path.read_text(encoding="utf-8")
    if (count := text.count(mutant.before)) != 1:
        raise BrokenMutantError(f"{mutant.name}: {mutant.file} has its text {count} times, not once: {mutant.before!r}")
    changed = text.replace(mutant.before, mutant.after)
    try:
        compile(changed, mutant.file, "exec")
    except SyntaxError as error:
        raise BrokenMutantError(f"{mutant.name}: {mutant.file} is no Python any more: {error}") from None
    return changed


class Copy:
    """A copy of the tree in which one mutation at a time is tested."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder = folder.resolve()
        self._environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # it may be deleted, and that not committed
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._check_imports()

    def _check_imports(self) -> None:
        script = (
            f"import {', '.join(PACKAGES)}; print({', '.join(f'{name}.__file__' for name in PACKAGES)}, sep=chr(10))"
        )
        done = self._run(["-c", script], TIMEOUT_S)
        if done.returncode:
            raise BrokenMutantError(f"the copy {self.folder} cannot be imported: {done.stderr}")
        for file in done.stdout.splitlines():
            if not Path(file).is_relative_to(self.folder):
                raise BrokenMutantError(f"{file} is imported, which is not in the copy {self.folder}")

    def _run(self, arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [sys.executable, *arguments], cwd=self.folder, env=self._environment, capture_output=True, text=True,
                check=False, timeout=timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise BrokenMutantError(f"{arguments[-1]} took more than {timeout_s:.0f} s") from None

    def test(self, tests: Iterable[str]) -> tuple[int, str]:
        """Run tests up to the first that fails, all of `make test` where none is named; returns code and output."""
        named = list(tests)
        # Those of this script see that a mutation does not apply twice, which proves nothing.
        selection = ["-m", "", *named] if named else ["--ignore", "tests/test_mutants.py"]
        done = self._run(
            ["-m", "pytest", "-x", "-q", "-rf", "-p", "no:cacheprovider", *selection],
            TIMEOUT_S if named else EVERYTHING_TIMEOUT_S,
        )
        return done.returncode, done.stdout + done.stderr

    def catch(self, mutant: Mutant, tests: Iterable[str]) -> str | None:
        """Return the test that turns red, None where none does; raises BrokenMutantError where none is run."""
        path, changed = self.folder / mutant.file, mutated(mutant, self.folder)
        text = path.read_text(encoding="utf-8")
        try:
            self._write(path, changed)
            code, output = self.test(tests)
        finally:
            self._write(path, text)
        if code == PASSED:
            return None
        found = FIRST_FAILURE.search(output)
        if code != FAILED or found is None:
            raise BrokenMutantError(f"{mutant.name}: pytest ended with {code}, and no test failed:\n{output}")
        return found[1]

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # Compiled files go by seconds and size, which another text may share.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()


def main() -> int:
    """Try the mutants; returns the exit code."""
    options = _options()
    chosen = [m for m in MUTANTS if options.only is None or options.only in m.name]
    try:
        for mutant in MUTANTS:
            mutated(mutant)
        if not chosen:
            raise BrokenMutantError(f"--only {options.only}: no mutant has that in its name")
        with ExitStack() as stack:
            folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(options.jobs)]
            caught = _try_all(chosen, [Copy(folder) for folder in folders], options.everything)
    except BrokenMutantError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught == len(chosen) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Break the product, and expect a red test.")
    parser.add_argument("--only", metavar="NAME", help="Mutants with this in their name.")
    parser.add_argument("--jobs", type=int, default=2, help="Mutants at a time, each in a copy of the tree.")
    parser.add_argument("--everything", action="store_true", help="Run all of make test for each mutant: hours.")
    return parser.parse_args()


def _try_all(chosen: Sequence[Mutant], copies: Sequence[Copy], everything: bool) -> int:
    """Print a line for each mutant, in the order in which they end; returns how many were caught."""
    tests = [] if everything else sorted({test for mutant in chosen for test in mutant.tests})
    code, output = copies[0].test(tests)
    if code != PASSED:
        raise BrokenMutantError(f"tests fail without a mutation, so that they prove nothing:\n{output}")
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def attempt(mutant: Mutant) -> tuple[str | None, float]:
        copy, begun = free.get(), time.monotonic()
        try:
            return copy.catch(mutant, () if everything else mutant.tests), time.monotonic() - begun
        finally:
            free.put(copy)

    caught, broken = 0, list[str]()
    with ThreadPoolExecutor(len(copies)) as pool:
        names = {pool.submit(attempt, mutant): mutant.name for mutant in chosen}
        for done in as_completed(names):
            if isinstance(error := done.exception(), BrokenMutantError):
                broken.append(str(error))
                continue
            test, seconds = done.result()
            caught += test is not None
            print(f"{seconds:6.1f} s  {names[done]}: {f'caught by {test}' if test else 'NOT CAUGHT'}", flush=True)
    if broken:
        raise BrokenMutantError("\n".join(broken))
    return caught


if __name__ == "__main__":
    sys.exit(main())
