"""Model of a decoding step of images on an H200: its kernels counted, its time predicted.

    python -m bench.trainer.step_model [--model 1B|7B] [--json FILE]

The trainer's own step is captured on fake CUDA tensors (`bench.harness.fake_cuda`): every kernel
with its operands, grid and options, and whether it is launched by programmatic dependent launch
(PDL; the launchers pass `launch_pdl`). The caches are those of the benchmark `rollout`: prompts of
64 tokens that 8 samples share, 576 tokens per image, on average half of them live.

The kernels of a step depend on each other and run one after another. On a common time axis, with
`ended` the end of the kernel before,

    start   = ended + PDL_S if launched by PDL, else LAUNCH_S
    arrived = start + LATENCY_S + dram / bandwidth - early     the last byte from memory
    ended   = max(arrived, start + latency + max(l2, port, products))

    dram      bytes that the kernel must read from memory. Weights, live keys and values (a shared
              prefix once) and new cache entries; everything else that a step passes from kernel to
              kernel stays in the L2 cache of 60 MB.
    l2        bytes that pass the L2 cache / L2_RATE: as above, what earlier kernels wrote, partial
              sums, and what programs read again: the rows of a product once per tile of columns
    port      the same bytes of the multiprocessor with the most programs / PORT_RATE
    products  2 M N K / MATRIX_RATE, scaled to the multiprocessor with the most programs
    latency   LATENCY_S; L2_LATENCY_S where first data have been fetched early, or where a Triton
              kernel reads only what the step wrote before
    early     PDL kernels after a Triton kernel start while that one runs; `_linear_kernel` then
              fetches the first LINES cache lines of its rows of the weight into the L2 cache, a
              norm AHEAD more for the product after it, and the first EARLY_PROGRAMS programs of
              attention the first EARLY entries of their own sequences, of which those that are not
              live yet are read in vain. This goes on while memory would be idle: from the last byte
              of the kernel before (and its start + LATENCY_S) to start + LATENCY_S. Only programs
              count that fit on a multiprocessor next to the last ones of the kernel before; what
              all of them read in vain takes its time of memory.

The bandwidth is

    share COPY_RATE, at most bytes in flight / (LATENCY_S + TILE_S)

where a program has in flight: of the products and attention, all but one stage of its tiles
(attention without stages one tile, and in TILE_S, its arithmetic, nothing is in flight). The last
wave of programs is counted by itself. A multiprocessor holds as many programs as shared memory and
registers allow: as many per thread as the launch permits, else 128; of the norm 48, as compiled.
Attention reads lengths first, one L2_LATENCY_S more.

Assumed without a count: arithmetic overlaps loads fully in a kernel's pipeline, and the end of a
kernel (last product, epilogue) is part of the next start. torch's products are taken to occupy the
GPU evenly and to read their rows from the L2 cache once, which favours them: at 128 rows and tiles
of 128 columns, a kernel without multicast reads as many bytes of rows as of weights.

Constants, and where they are from ("optimistic" in parentheses):

    COPY_RATE   4.3 TB/s       a large copy, measured with torch on an H200
    MATRIX_RATE 790 TFLOP/s    bf16, size 8192, measured with torch on an H200
    L2_RATE     5.5 (6.2) TB/s assumption: reads from an H100's L2 cache (Chips and Cheese, 2023, on
                               the PCIe card; 6.2: in proportion to the higher clock)
    PORT_RATE   64 B per cycle of 1.755 GHz, as documented for an A100's multiprocessor
    LAUNCH_S    1.95 (1.3) us  per empty kernel in a CUDA graph 1.3 us were published for an H100
                               (Hazy Research, "Look Ma, No Bubbles!", 2025); assumption: 1.5 times
                               that for kernels with work before and after
    PDL_S       0.75 (0.5) us  assumption: the end of the grid before and the release of the wait,
                               but not the launch; no published figure was found
    LATENCY_S   0.9 (0.6) us   assumption: the unloaded latency of an H100's memory is about 0.3 us
                               by published microbenchmarks (arXiv 2402.13499); loaded, 3 (2) times
    L2_LATENCY_S 0.45 (0.3) us the same of its L2 cache: about 0.15 us, loaded 3 (2) times
    TILE_S      0.3 us         assumption: about 4 instructions per element of a tile of 16,384
    share       0.75 (0.85)    assumption for Triton kernels: 83% was published for a fused log-prob
                               kernel on an H100 (TRL); the goal of the kernels is 92% of a copy
                0.70 (0.80)    assumption for torch's products with few rows: 78% of a copy follows
                               from gpt-fast's 104.9 tokens/s of Llama-2-7B in bf16 on an A100

The cautious values were chosen for agreement with an earlier, independent estimate of the step when
it had 240 kernels (37 to 74% of the floor). Nothing here has been measured on a GPU.

The floor is that of the benchmark `rollout`, which counts the whole prompt of every sequence: a
shared prefix is read less often than it assumes.

"new graph": what a phase of a rollout costs besides its steps if its graph is not kept from an
earlier one: the eager warm-up steps, bound by the host, and the capture (6 us per eager launch,
15 us per captured kernel, both assumptions).
"""

import argparse
import json
import math
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

from bench.harness.fake_cuda import Launch, fake_cuda
from bench.harness.rows import rounded
from bench.trainer.models import NumberTokenizer, make_model, model_configs
from bench.trainer.rollout import CFG_WEIGHT, PROMPT_TOKENS, make_prompts, step_bytes
from bench.trainer.step_time import (
    ATTENTION,
    CAUTIOUS,
    COPY_RATE,
    DEFAULT_WARPS,
    OPTIMISTIC,
    REGISTERS_PER_THREAD,
    TILE_S,
    Machine,
    Node,
    Step,
)
from iris_fast.config import SamplingConfig
from iris_fast.models.janus import Janus, JanusConfig
from iris_fast.models.templates import unconditional_ids
from iris_fast.rollout.decode_loop import WARM_UP_STEPS
from iris_fast.rollout.sampler import Sampler

SEQUENCES = (2, 16, 64, 128, 256)
COMPILED_REGISTERS = {"_add_rms_norm_kernel": 48, "_silu_mul_kernel": 32}
EAGER_LAUNCH_S, CAPTURE_S_PER_NODE = 6e-6, 15e-6
LINEAR = "_linear_kernel"
PRODUCTS = (LINEAR, "_uneven_linear_kernel")
GOALS = {"1B": 0.78, "7B": 0.82}


def capture(config: JanusConfig, sequences: int) -> list[Launch]:
    """The kernels of a step of images, as the sampler captures it."""
    tokenizer = NumberTokenizer(config.decoder.vocab_size)
    prompts = make_prompts(sequences, 0)
    uncond = [unconditional_ids(ids, tokenizer) for ids in prompts]
    with warnings.catch_warnings(), fake_cuda() as gpu, torch.no_grad():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        janus = make_model(config, torch.device("cuda"), torch.bfloat16)
        janus.attn_implementation = "varlen"
        settings = SamplingConfig(cfg_weight=CFG_WEIGHT)
        sampler = Sampler(janus, tokenizer, settings, config.image_tokens)
        sampler.sample_image(prompts, uncond, list(range(len(prompts))), lambda: None)
        (step,) = gpu.captured
    return step


def node_of(launch: Launch, config: JanusConfig, sequences: int) -> Node:
    """What a captured kernel moves and computes."""
    if launch.name == ATTENTION:
        return _attention(launch, config, sequences)
    name, operands = launch.name, launch.tensors
    options, grid = launch.options, launch.grid
    pdl = bool(options.get("launch_pdl"))
    warps = options.get("num_warps", DEFAULT_WARPS)
    programs = math.prod(grid)
    if name in PRODUCTS:
        weight, x = operands["weight"], operands["x"]
        line, stages = 2 * options["BLOCK_K"], options["num_stages"]  # of a tile, in bytes
        columns = options["BLOCK_N"] + options.get("EXTRA", 0)
        columns *= 2 if options["GATED"] else 1
        return Node(
            name, weight.bytes, launch.bytes + (grid[0] - 1) * x.bytes, x.shape[0] * weight.bytes,
            programs, warps, options["maxnreg"] or REGISTERS_PER_THREAD,
            stages * line * (columns + options["BLOCK_M"]), (stages - 1) * line * columns,
            early=programs * columns * options["LINES"] * 2 * options["LINE"], pdl=pdl, triton=True,
        )  # fmt: skip
    if name.startswith(("aten.mm.", "aten.addmm.")):
        matrices = [o for o in operands.values() if len(o.shape) == 2]
        a, b = matrices[:2]
        weight = max(a, b, key=lambda operand: operand.bytes)
        operations = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        return Node(f"{name} {weight.shape}", weight.bytes, launch.bytes, operations)
    selected = {"aten.embedding.default", "aten.index_select.default", "aten.index_copy_.default"}
    moved = launch.bytes
    if name in selected:  # not the whole table
        moved = 2 * min(operand.bytes for operand in operands.values())
    if launch.triton:  # of a cache, it writes one entry
        moved -= sum(operand.bytes for operand in operands.values() if len(operand.shape) == 4)
        registers = COMPILED_REGISTERS.get(name, REGISTERS_PER_THREAD)
        ahead = 0.0
        if "ahead" in operands:  # fetched into the L2 cache, if at all
            moved -= operands["ahead"].bytes
            rows, width = operands["ahead"].shape
            lines = -(-width // options["LINE"]) - options["FROM_LINE"]
            ahead = 2.0 * options["LINE"] * min(programs * options["AHEAD"], rows * max(lines, 0))
        return Node(
            name, 0.0, moved, 0.0, programs, warps, registers, ahead=ahead, pdl=pdl, triton=True
        )
    return Node(name, 0.0, moved)


def _attention(launch: Launch, config: JanusConfig, sequences: int) -> Node:
    """Average over the image: prefix and half of the image's tokens are live."""
    cache = launch.tensors["keys"]
    item = cache.dtype.itemsize
    slot = 2 * config.decoder.num_kv_heads * config.decoder.head_dim * item
    own = sequences * config.image_tokens / 2
    prefixes = launch.tensors["prefix_keys"].shape[0] if "prefix_keys" in launch.tensors else 0
    from_memory = (own + prefixes * (PROMPT_TOKENS - 1) + sequences) * slot
    stages = launch.options.get("STAGES", 1)  # all but the one that is multiplied are in flight
    tile = 2 * launch.options["L"] * launch.options["D"] * item
    programs = math.prod(launch.grid)
    warps = launch.options["num_warps"]
    entries = 2 * launch.options["EARLY"] * launch.options["WIDTH"] * item  # a key and a value
    fetching = min(programs, launch.options["EARLY_PROGRAMS"])
    return Node(
        launch.name, from_memory, (own + sequences * PROMPT_TOKENS) * slot,
        programs=programs, warps=warps, shared=max(stages - 1, 1) * tile,
        early=fetching * entries, fetching=fetching,
        useful=1 - launch.options["EARLY"] / (2 * config.image_tokens),
        in_flight=max(stages - 1, 1) * tile, tile_s=TILE_S if stages == 1 else 0.0,
        pdl=bool(launch.options.get("launch_pdl")), triton=True,
    )  # fmt: skip


def model_step(config: JanusConfig, sequences: int, machine: Machine = CAUTIOUS) -> Step:
    """The modelled step of `sequences` rows, conditional and unconditional."""
    with torch.device("meta"):
        shapes = Janus(config).to(torch.bfloat16)
    floor = step_bytes(shapes, sequences, PROMPT_TOKENS) / COPY_RATE
    nodes = [node_of(launch, config, sequences) for launch in capture(config, sequences)]
    return Step(nodes, floor, machine)


def optimistic(step: Step) -> float:
    """The fraction of the floor with the optimistic constants."""
    return Step(step.nodes, step.floor_s, OPTIMISTIC).fraction


def new_graph_s(step: Step) -> float:
    """Seconds that a phase of a rollout spends more if its graph is not kept from an earlier one.

    The warm-up steps' kernels are launched one by one (EAGER_LAUNCH_S each), and the capture takes
    CAPTURE_S_PER_NODE, with the graph's instantiation; both are assumptions for torch and Triton.
    """
    nodes = len(step.nodes)
    eager = max(nodes * EAGER_LAUNCH_S, step.total_s)
    return WARM_UP_STEPS * (eager - step.total_s) + nodes * CAPTURE_S_PER_NODE


def table(model: str, steps: dict[int, Step]) -> str:
    """The result as lines of text."""
    lines = [f"{model}: modelled, not measured; goal {GOALS[model]:.0%} of the floor from 64 rows"]
    lines.append("rows  nodes  PDL  floor us  step us  of floor  optimistic  idle us  new graph ms")
    for rows, step in steps.items():
        pdl = sum(node.pdl for node in step.nodes)
        lines.append(
            f"{rows:4} {len(step.nodes):6} {pdl:4} {step.floor_s * 1e6:9.0f} "
            f"{step.total_s * 1e6:8.0f} {step.fraction:9.0%} {optimistic(step):11.0%} "
            f"{step.idle_s * 1e6:10.0f} {new_graph_s(step) * 1e3:13.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*GOALS], help="default: both")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--kernels", action="store_true", help="also print seconds by kernel")
    arguments = parser.parse_args()
    configs = model_configs(torch.device("cuda"))
    found = {}
    for model in [arguments.model] if arguments.model else GOALS:
        steps = {rows: model_step(configs[model], rows) for rows in SEQUENCES}
        print(table(model, steps), flush=True)
        for rows, step in steps.items() if arguments.kernels else ():
            print(f"{rows} rows")
            calls = Counter(node.name for node in step.nodes)
            for name, seconds in step.seconds.most_common(12):
                print(f"  {seconds * 1e6:9.1f} us {calls[name]:4} x {name}")
        found[model] = {
            rows: {
                "nodes": len(step.nodes),
                "pdl": sum(node.pdl for node in step.nodes),
                "floor_us": rounded(step.floor_s * 1e6),
                "step_us": rounded(step.total_s * 1e6),
                "fraction_of_floor": rounded(step.fraction),
                "optimistic": rounded(optimistic(step)),
                "new_graph_ms": rounded(new_graph_s(step) * 1e3),
            }
            for rows, step in steps.items()
        }
    if arguments.json:
        arguments.json.write_text(json.dumps({"step_model": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
