"""The time of a sequence of dependent kernels: the formula in bench/trainer/step_model.py."""

from collections import Counter
from dataclasses import dataclass, field

from iris_fast.preflight.estimate import H200

COPY_RATE, MATRIX_RATE = H200.copy_bytes_per_s, H200.flops_per_s  # bytes/s, operations/s
L2_RATE = 5.5e12  # bytes/s
PORT_RATE = 64 * 1.755e9  # bytes/s from the L2 cache to one multiprocessor
LAUNCH_S, PDL_S, LATENCY_S, L2_LATENCY_S = 1.95e-6, 0.75e-6, 0.9e-6, 0.45e-6
TILE_S = 0.3e-6
TRITON_SHARE, BLAS_SHARE = 0.75, 0.70
MULTIPROCESSORS, WARP = 132, 32
REGISTERS, SHARED_BYTES = 65536, 227 << 10  # of a multiprocessor
DEFAULT_WARPS = 4
REGISTERS_PER_THREAD = 128  # unless the launch states a maximum, or as compiled
ATTENTION = "_decode_kernel"


@dataclass(frozen=True)
class Machine:
    """The constants that are assumptions and are varied."""

    triton_share: float = TRITON_SHARE
    blas_share: float = BLAS_SHARE
    launch_s: float = LAUNCH_S
    pdl_s: float = PDL_S
    latency_s: float = LATENCY_S
    l2_latency_s: float = L2_LATENCY_S
    l2_rate: float = L2_RATE


CAUTIOUS = Machine()
OPTIMISTIC = Machine(0.85, 0.80, 1.3e-6, 0.5e-6, 0.6e-6, 0.3e-6, 6.2e12)


@dataclass(frozen=True)
class Node:
    """A kernel's work: bytes from memory and through the L2 cache, operations of products; its
    programs, what each takes of a multiprocessor, and bytes that it has in flight; bytes that
    `fetching` of its programs (0: all) may fetch early, for itself and for the kernel after it."""

    name: str
    dram: float
    l2: float
    operations: float = 0.0
    programs: int = MULTIPROCESSORS
    warps: int = DEFAULT_WARPS
    registers: int = REGISTERS_PER_THREAD
    shared: int = 0
    in_flight: float | None = None
    tile_s: float = 0.0
    early: float = 0.0
    ahead: float = 0.0
    fetching: int = 0
    useful: float = 1.0  # share of the bytes fetched early
    pdl: bool = False
    triton: bool = False

    @property
    def busiest(self) -> float:
        """Work of the multiprocessor with the most programs, over the average of all."""
        if not self.triton:
            return 1.0
        return -(-self.programs // MULTIPROCESSORS) * MULTIPROCESSORS / self.programs

    def beside(self, shared: int = 0, registers: int = 0) -> int:
        """Programs that fit on a multiprocessor of which so much is taken."""
        most = (REGISTERS - registers) // (WARP * self.warps * self.registers)
        if self.shared:
            most = min(most, (SHARED_BYTES - shared) // self.shared)
        return max(most, 0)

    def memory_s(self, machine: Machine) -> float:
        """Seconds in which its bytes from memory arrive."""
        share = machine.triton_share if self.triton else machine.blas_share
        if self.in_flight is None:
            return self.dram / (share * COPY_RATE)
        resident = MULTIPROCESSORS * max(self.beside(), 1)
        whole, rest = divmod(self.programs, resident)
        seconds = 0.0
        for running, waves in ((resident, whole), (rest, 1)):
            if running and waves:
                most = running * self.in_flight / (machine.latency_s + self.tile_s)
                rate = min(share * COPY_RATE, most)
                seconds += waves * running * (self.dram / self.programs) / rate
        return seconds

    def other_s(self, machine: Machine) -> float:
        """Seconds that the L2 cache or the tensor cores take."""
        l2 = max(self.l2 / machine.l2_rate, self.l2 * self.busiest / (MULTIPROCESSORS * PORT_RATE))
        return max(l2, self.operations * self.busiest / MATRIX_RATE)

    def fitting(self, previous: "Node") -> float:
        """Share of the fetching programs that fit next to the last ones of `previous`."""
        if not (self.pdl and previous.triton):
            return 0.0
        at_once = MULTIPROCESSORS * max(previous.beside(), 1)
        last = (previous.programs - 1) % at_once + 1
        each, one_more = divmod(last, MULTIPROCESSORS)
        running = 0
        for held, count in ((each, MULTIPROCESSORS - one_more), (each + 1, one_more)):
            registers = WARP * previous.warps * previous.registers
            running += count * self.beside(held * previous.shared, held * registers)
        return min(running / (self.fetching or self.programs), 1.0)


@dataclass
class Step:
    """The model of one step: its nodes, and seconds by kernel."""

    nodes: list[Node]
    floor_s: float
    machine: Machine = CAUTIOUS
    seconds: Counter = field(default_factory=Counter)
    memory_s: float = 0.0

    def __post_init__(self) -> None:
        machine, previous = self.machine, Node("", 0.0, 0.0)
        released = ended = memory_ended = 0.0  # of the previous kernel
        ahead = ahead_from = 0.0  # that kernel's bytes for this one, in seconds, and since when
        for node in self.nodes:
            start = ended + (machine.pdl_s if node.pdl else machine.launch_s)
            first = start + machine.latency_s
            if node.name == ATTENTION:
                first += machine.l2_latency_s  # it reads lengths before entries
            share = machine.triton_share * COPY_RATE
            memory_s = node.memory_s(machine)
            idle_from = max(memory_ended, released + machine.latency_s)
            early = _early_s(node, previous, share, max(first - idle_from, 0.0))
            if ahead:  # fetched by the kernel before while only that one could, and then by both
                before = min(ahead, max(idle_from - ahead_from, 0.0))
                both = ahead - before + early
                early = before + min(both, max(first - max(idle_from, ahead_from), 0.0))
            early = min(early, memory_s)
            cached = early > 0 or (node.triton and not node.dram)
            latency = machine.l2_latency_s if cached else machine.latency_s
            end = max(first + memory_s - early, start + latency + node.other_s(machine))
            self.seconds[node.name] += end - ended
            self.memory_s += memory_s
            ahead, ahead_from = node.ahead * node.fitting(previous) / share, idle_from
            memory_ended = first + memory_s - early if node.dram else memory_ended
            released, ended, previous = start, end, node

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return self.seconds.total()

    @property
    def idle_s(self) -> float:
        """Seconds in which memory delivers nothing."""
        return self.total_s - self.memory_s

    @property
    def fraction(self) -> float:
        """Of the benchmark's floor."""
        return self.floor_s / self.total_s


def _early_s(node: Node, previous: Node, share: float, idle: float) -> float:
    """Seconds of memory that a kernel saves by what it fetches itself in so many idle ones."""
    fetched = node.early * node.fitting(previous) / share
    if not fetched:
        return 0.0
    in_vain = (1 - node.useful) * node.early / share
    return min(fetched * node.useful, idle - in_vain if in_vain else idle)
