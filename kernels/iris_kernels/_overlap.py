"""Programmatic dependent launch: a kernel starts while the previous one in the stream still runs.

From sm_90 on. The hardware starts the programs of a kernel as soon as all programs of the previous
one have called `let_next_kernel_start` or ended. `wait_for_previous_kernel` then blocks until that
kernel is complete and its writes are visible. Three rules make this safe after and before any other
kernel, whoever launched it:

- Every program waits, without a condition, before its first access to memory. The previous kernel
  did the same, so all earlier kernels are complete as well, and memory that they have freed may
  be written.
- Before the wait a program may only `prefetch_to_l2`: the L2 cache is where memory is coherent, so
  that a line which the previous kernel writes later is updated there.
- A kernel that does not call `let_next_kernel_start` counts as if it did so at its end.
"""

from ._backend import interpreted, jit, tl, triton

FIRST_ARCHITECTURE = 90
LINE_BYTES = 128  # of the L2 cache
# Of a weight, into the L2 cache while the previous kernel ends, at least: what memory delivers in
# 2 us. At most twice as much, as long as the norm between two products, which leaves memory idle,
# and the start of the second one take.
PREFETCH_BYTES = 8 << 20


def architecture() -> int:
    """Of the GPU that a kernel is launched on, 90 for sm_90; 0 in the interpreter or elsewhere."""
    if interpreted():
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def overlap_options() -> dict[str, bool]:
    """Options of a launch: OVERLAP for the kernel, and `launch_pdl` where the GPU supports it."""
    if architecture() < FIRST_ARCHITECTURE:
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


def prefetched_lines(weight_rows: int, parts: int, part_k: int) -> int:
    """Cache lines per row and part of a weight of 2-byte elements that its product fetches early: a
    power of two."""
    wanted = -(-PREFETCH_BYTES // (LINE_BYTES * weight_rows * parts))
    most = max(2 * part_k // LINE_BYTES, 1)
    return min(triton.next_power_of_2(wanted), 1 << most.bit_length() - 1)


@jit
def wait_for_previous_kernel(OVERLAP: tl.constexpr):
    """Block until the previous kernel is complete, then let the next one start.

    The next kernel could be allowed to start before the wait. Its programs would then hold shared
    memory while two other kernels run, and gain nothing: they wait for this one.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def prefetch_to_l2(pointers, OVERLAP: tl.constexpr):
    """Start to read the cache lines of `pointers` into L2; they must be valid addresses."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers], tl.int32, is_pure=False, pack=1
        )
