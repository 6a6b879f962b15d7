"""Count the instructions of a compiled kernel, and how long issuing them takes.

    t_issue = programs * warps * (outside + sum over loops of trips * body) / (S * f)

outside: instructions outside of all loops, per warp; body: instructions of a loop, counted in the
SASS between a backward branch and its target; trips: how often a program runs the loop, as the
launch gives it. S = 528 schedulers (132 multiprocessors x 4), each of which issues one instruction
of one warp per cycle; f = 1.98 GHz, the H200's boost clock. Instructions per element are the same
sum times 32 threads over the elements of the launch.

t_memory = bytes / 4.3 TB/s, the copy bandwidth measured on an H200, with the bytes that the op's
docstring counts.

The model is a bound, not a prediction: a kernel needs at least the larger of both times. Every
instruction outside of loops counts as executed, also where a branch skips it; subroutines that only
a call reaches (divisions of subnormal numbers) do not. Left out are latency, stalls, the last wave
of programs, the multiprocessors that a launch of fewer than 132 programs leaves idle (64 rows of
guided_sample occupy 64, which doubles their issue time), and that some units accept an instruction
only every second cycle (minimum, comparison, integers) or every eighth (exp2, square root).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from iris_fast.preflight.estimate import H200

SCHEDULERS = 132 * 4
CLOCK_HZ = 1.98e9
THREADS_PER_WARP = 32

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Instructions:
    """Instructions per warp: outside of all loops, and in each loop, in the order of the code."""

    outside: int
    loops: tuple[int, ...]

    def executed(self, trips: Sequence[float]) -> float:
        """Instructions that a warp issues, with `trips` iterations of each loop.

        Raises:
            ValueError: another number of loops than trips: the compiler has unrolled, split or
                removed one, and the counts of the op's gate case no longer describe the code.
        """
        if len(trips) != len(self.loops):
            raise ValueError(
                f"the kernel has {len(self.loops)} loops but the gate case gives trips for "
                f"{len(trips)}: correct the gate case"
            )
        return self.outside + sum(n * body for n, body in zip(trips, self.loops, strict=True))


def count(sass: str) -> Instructions:
    """Count the instructions of the kernel in the output of `nvdisasm -c`."""
    addresses: list[int] = []
    targets: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    labels: list[str] = []
    for line in sass.splitlines():
        if line.startswith("$__internal"):  # subroutines, which follow the kernel
            break
        if label := _LABEL.match(line):
            labels.append(label[1])
        if not (found := _INSTRUCTION.match(line)) or found[2].startswith("NOP"):
            continue
        address = int(found[1], 16)
        targets |= dict.fromkeys(labels, address)
        labels = []
        if branch := _BRANCH.search(found[2]):
            if targets.get(branch[1]) == address:
                continue  # the endless loop after the last instruction
            branches.append((address, branch[1]))
        addresses.append(address)
    spans = sorted((targets[t], a) for a, t in branches if targets.get(t, a) < a)
    inside: set[int] = set()
    loops = []
    for start, stop in sorted(spans, key=lambda span: span[1] - span[0]):  # inner loops first
        body = {a for a in addresses if start <= a <= stop} - inside
        inside |= body
        loops.append((start, len(body)))
    return Instructions(len(addresses) - len(inside), tuple(n for _, n in sorted(loops)))


def issue_seconds(warp_instructions: float) -> float:
    """The time to issue them with every scheduler busy."""
    return warp_instructions / (SCHEDULERS * CLOCK_HZ)


def memory_seconds(moved: int) -> float:
    """The time to move the bytes at the speed of a copy."""
    return moved / H200.copy_bytes_per_s
