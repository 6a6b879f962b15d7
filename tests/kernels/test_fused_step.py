"""A decoding step of the trainer's fused decoder on both backends, in the dtype that GPUs use."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from kernel_oracle import assert_close, rounding
from torch.utils._python_dispatch import TorchDispatchMode

from iris_fast.models.attention import PackedAttention
from iris_fast.models.decoder import Decoder, DecoderConfig, RMSNorm
from iris_fast.models.janus import GenerationHead
from iris_fast.rollout import fused_decoder
from iris_fast.rollout.fused_decoder import FusedDecoder, image_logits
from iris_fast.rollout.shared_cache import SharedKVCache, SharedPrefixes

SIZES = DecoderConfig(
    vocab_size=16, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, qkv_bias=True,
)  # fmt: skip
PREFIXES = [[1, 2, 3], [1, 2], [1, 2, 3]]
STEPS = 2


class Launches(TorchDispatchMode):
    """Counts the operations that are more than a view."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.found[op.name().removeprefix("iris_kernels::")] += 1
        return op(*args, **(kwargs or {}))


def make_decoder(device: str, sizes: DecoderConfig = SIZES) -> Decoder:
    torch.manual_seed(3)
    decoder = Decoder(sizes)
    for number, module in enumerate(decoder.modules()):
        if isinstance(module, RMSNorm):  # norms of ones would hide a mix-up
            module.weight.data += 0.3 * torch.randn(sizes.hidden_size)
            module.eps = 0.01 * (1 + number)
    return decoder.requires_grad_(False).to(device, torch.bfloat16)


def whole(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    """Hidden state of the last row of a sequence, by the modules."""
    positions = torch.arange(len(rows), device=rows.device)
    return decoder(rows, positions, PackedAttention([len(rows)], rows.device))[-1]


def test_steps_are_as_accurate_as_the_modules(backend, device):
    decoder = make_decoder(device)
    shared = SharedPrefixes.of(PREFIXES)
    cache = SharedKVCache(SIZES, shared, STEPS, torch.bfloat16, device)
    prefix = torch.tensor([token for ids in shared.prefixes for token in ids], device=device)
    positions = [i for ids in shared.prefixes for i in range(len(ids))]
    attention = cache.prefill_attention()
    decoder(decoder.embed_tokens(prefix), torch.tensor(positions, device=device), attention)
    tokens = torch.tensor([[4, 5, 6], [7, 8, 9]], device=device)  # [step, sequence]
    fused, exact = FusedDecoder(decoder), make_decoder(device).double()
    for number in range(STEPS):
        embeds = decoder.embed_tokens(tokens[number])
        with Launches() as launches:
            step = fused.step(embeds, cache)
        for b, prefix_ids in enumerate(PREFIXES):
            ids = torch.tensor(prefix_ids + tokens[: number + 1, b].tolist(), device=device)
            eager = whole(decoder, decoder.embed_tokens(ids))
            truth = whole(exact, exact.embed_tokens(ids))
            floor = 8 * rounding(torch.bfloat16) * float(truth.abs().max())
            assert_close("hidden state", step[b], eager, truth, floor)
    if backend == "triton":
        assert launches.found["decode_linear"] == 4 * SIZES.num_layers
        assert launches.found["rope_append_attention"] == SIZES.num_layers
        assert launches.found["add_rms_norm"] == 2 * SIZES.num_layers + 1
        # Seven launches per layer; the final norm and the lengths.
        assert launches.found.total() == 7 * SIZES.num_layers + 2


@pytest.mark.parametrize("rows", [2, 3])
def test_few_rows_take_our_product(rows, backend, device, monkeypatch):
    monkeypatch.setattr(fused_decoder, "FEW_ROWS", 2)
    decoder = make_decoder(device)
    cache = SharedKVCache(SIZES, SharedPrefixes.of([[1]] * rows), 1, torch.bfloat16, device)
    attention = cache.prefill_attention()
    start = torch.zeros(1, dtype=torch.int64, device=device)
    decoder(decoder.embed_tokens(start + 1), start, attention)
    with Launches() as launches:
        FusedDecoder(decoder).step(decoder.embed_tokens(start.expand(rows) + 2), cache)
    ours = 4 * SIZES.num_layers if backend == "triton" and rows == 2 else 0
    assert launches.found["decode_linear"] == ours


def test_widths_that_16_does_not_divide_take_torch_s_product(backend, device):
    """An MLP of 100 channels: loads of single elements would be slower."""
    sizes = dataclasses.replace(SIZES, intermediate_size=100)
    decoder = make_decoder(device, sizes)
    cache = SharedKVCache(sizes, SharedPrefixes.of([[1]]), 1, torch.bfloat16, device)
    start = torch.zeros(1, dtype=torch.int64, device=device)
    decoder(decoder.embed_tokens(start + 1), start, cache.prefill_attention())
    with Launches() as launches:
        hidden = FusedDecoder(decoder).step(decoder.embed_tokens(start + 2), cache)
    assert launches.found["decode_linear"] == 0 and hidden.isfinite().all()


@pytest.mark.parametrize("rows", [2, 3])
def test_the_image_head(rows, backend, device, monkeypatch):
    """Few rows take two launches; logits are as accurate as the module's."""
    monkeypatch.setattr(fused_decoder, "FEW_ROWS", 2)
    torch.manual_seed(4)
    head = GenerationHead(64, 48).requires_grad_(False).to(device, torch.bfloat16)
    hidden = torch.randn(rows, 64, device=device, dtype=torch.bfloat16)
    with Launches() as launches:
        logits = image_logits(head, hidden)
    assert launches.found["decode_linear"] == (2 if backend == "triton" and rows == 2 else 0)
    eager, truth = head(hidden), copy.deepcopy(head).double()(hidden.double())
    floor = 4 * rounding(torch.bfloat16) * float(truth.abs().max())
    assert_close("logits", logits, eager, truth, floor)
