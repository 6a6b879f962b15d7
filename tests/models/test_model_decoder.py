"""The decoder and its attention strategies, against transformers and against themselves."""

import pytest
import torch
from iris_kernels import cpp
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from iris_fast.models import decoder as decoder_module
from iris_fast.models.attention import PackedAttention
from iris_fast.models.decoder import Decoder, DecoderConfig
from iris_fast.rollout.kv_cache import KVCache

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
LENGTHS = [5, 1, 9, 2]


def make_config(kv_heads: int, bias: bool = False, head_dim: int = 8, theta: float = 5e3):
    return DecoderConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=6,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        qkv_bias=bias,
    )


def make_decoder(**options) -> Decoder:
    decoder = Decoder(make_config(**options))
    for parameter in decoder.parameters():  # norms and biases too: ones and zeros hide errors
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def positions_of(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


REFERENCES = {
    "llama": (LlamaModel, LlamaConfig, 6, {"head_dim": 8}),
    "llama-gqa": (LlamaModel, LlamaConfig, 2, {"head_dim": 8}),
    "llama-wide-heads": (LlamaModel, LlamaConfig, 3, {"head_dim": 16}),
    "qwen2-mqa-with-bias": (Qwen2Model, Qwen2Config, 1, {}),
    "qwen2-gqa-with-bias": (Qwen2Model, Qwen2Config, 2, {}),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_transformers(name):
    model_class, config_class, kv_heads, extra = REFERENCES[name]
    rope = {"rope_type": "default", "rope_theta": 5e3}
    hf = model_class(
        config_class(**SIZES, num_key_value_heads=kv_heads, rope_parameters=rope, **extra)
    ).eval()
    ours = make_decoder(kv_heads=kv_heads, bias="bias" in name, head_dim=extra.get("head_dim", 8))
    hf.load_state_dict(ours.state_dict())
    ids = torch.randint(64, (1, 33))
    with torch.no_grad():
        expected = hf(input_ids=ids).last_hidden_state[0]
        hidden = ours(ours.embed_tokens(ids[0]), torch.arange(33), PackedAttention([33]))
    assert (hidden - expected).abs().max() < 5e-5


def test_positions_beyond_bf16_precision():
    """Rotary angles stay right in a bf16 model at positions that bf16 cannot hold."""
    decoder = make_decoder(kv_heads=2)
    rows = torch.randn(4, 48).to(torch.bfloat16)
    attention = PackedAttention([4])
    low = decoder.bfloat16()(rows, torch.arange(4), attention)
    high = decoder(rows, torch.arange(4) + 3001, attention)  # only differences of positions count
    assert (low.float() - high.float()).abs().max() < 0.1 * low.float().std()


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_packed_equals_one_by_one(kv_heads):
    decoder = make_decoder(kv_heads=kv_heads)
    rows = [torch.randn(length, 48) for length in LENGTHS]
    packed = decoder(torch.cat(rows), positions_of(LENGTHS), PackedAttention(LENGTHS))
    for part, alone in zip(packed.split(LENGTHS), rows, strict=True):
        expected = decoder(alone, torch.arange(len(alone)), PackedAttention([len(alone)]))
        assert (part - expected).abs().max() < 2e-5


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_packed_gradients_are_the_sums_of_one_by_one(kv_heads):
    decoder = make_decoder(kv_heads=kv_heads).double()
    rows = [torch.randn(length, 48, dtype=torch.float64) for length in LENGTHS]
    upstream = [torch.randn_like(part) for part in rows]

    def gradients(losses):
        decoder.zero_grad()
        sum(losses).backward()
        return [p.grad.clone() for name, p in decoder.named_parameters() if "embed" not in name]

    hidden = decoder(torch.cat(rows), positions_of(LENGTHS), PackedAttention(LENGTHS))
    together = gradients([(hidden * torch.cat(upstream)).sum()])
    alone = gradients(
        (decoder(part, torch.arange(len(part)), PackedAttention([len(part)])) * weight).sum()
        for part, weight in zip(rows, upstream, strict=True)
    )
    # The rotary tables are fp32, so the two agree to rounding of those alone: exactly.
    for left, right in zip(together, alone, strict=True):
        assert left.abs().max() > 0
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [2, 6])
@torch.no_grad()
def test_cached_decoding_equals_packed(kv_heads):
    decoder, steps = make_decoder(kv_heads=kv_heads), 7
    rows = [torch.randn(length + steps, 48) for length in LENGTHS]
    full = [length + steps for length in LENGTHS]
    expected = decoder(torch.cat(rows), positions_of(full), PackedAttention(full)).split(full)
    cache = KVCache(decoder.config, len(LENGTHS), max(full))
    for _ in range(2):  # a second prefill starts over in the same memory
        prompts = torch.cat([part[:n] for part, n in zip(rows, LENGTHS, strict=True)])
        hidden = decoder(prompts, positions_of(LENGTHS), cache.prefill_attention(LENGTHS)).split(
            LENGTHS
        )
        for part, whole in zip(hidden, expected, strict=True):
            assert (part - whole[: len(part)]).abs().max() < 2e-5
        assert cache.lengths_B.tolist() == LENGTHS
        for step in range(steps):
            new = torch.stack([part[n + step] for part, n in zip(rows, LENGTHS, strict=True)])
            hidden = decoder(new, cache.lengths_B, cache.decode_attention())
            cache.advance()
            whole = torch.stack([part[n + step] for part, n in zip(expected, LENGTHS, strict=True)])
            assert (hidden - whole).abs().max() < 2e-5
        assert cache.lengths_B.tolist() == full


@torch.no_grad()
def test_dead_cache_is_not_read():
    """Slots beyond a sequence's length change nothing, whatever they hold."""
    decoder = make_decoder(kv_heads=2)
    results = []
    for garbage in (0.0, 50.0):
        cache = KVCache(decoder.config, 2, 12)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(7, 48, generator=generator)
        decoder(rows, positions_of([2, 5]), cache.prefill_attention([2, 5]))
        for tensor in (*cache.keys, *cache.values):
            tensor[0, :, 3:] = garbage
            tensor[1, :, 6:] = garbage
        token = torch.randn(2, 48, generator=generator)
        results.append(decoder(token, cache.lengths_B, cache.decode_attention()))
    assert torch.equal(*results)


@torch.no_grad()
def test_cache_keeps_its_addresses():
    decoder = make_decoder(kv_heads=2)
    cache = KVCache(decoder.config, 1, 8)
    tensors = [cache.lengths_B, *cache.keys, *cache.values]
    before = [tensor.data_ptr() for tensor in tensors]
    decoder(torch.randn(3, 48), torch.arange(3), cache.prefill_attention([3]))
    decoder(torch.randn(1, 48), cache.lengths_B, cache.decode_attention())
    cache.advance()
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert tensors[0].tolist() == [4]


def test_cache_refuses_what_does_not_fit():
    cache = KVCache(make_config(kv_heads=2), 2, 4)
    with pytest.raises(ValueError, match="holds 4 tokens per sequence, 5 are needed"):
        cache.prefill_attention([5, 1])
    with pytest.raises(ValueError, match="3 prompts for a cache of 2"):
        cache.prefill_attention([1, 1, 1])
    cache.prefill_attention([4, 1])
    with pytest.raises(ValueError, match="5 are needed"):
        cache.decode_attention()


def test_packed_attention_refuses_wrong_lengths():
    with pytest.raises(ValueError, match="positive integers"):
        PackedAttention([3, 0])
    with pytest.raises(ValueError, match="positive integers"):
        PackedAttention([])
    row = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="expected 5 packed rows, got 4"):
        PackedAttention([3, 2])(0, row, row, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "bias"), [(2, True), (6, False)])
@pytest.mark.parametrize("path", ["torch", "cpp"])
def test_fused_blocks_equal_the_modules(monkeypatch, path, dtype, kv_heads, bias):
    """What runs on a GPU, here on the ops' other paths: the same values on torch's, gradients and
    the values of C++ up to rounding, and no gradient for what is frozen."""
    if path == "cpp" and cpp.library() is None:
        pytest.skip("the C++ kernels are not compiled")
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", path)
    decoder = make_decoder(kv_heads=kv_heads, bias=bias).to(dtype)
    decoder.layers[1].self_attn.k_proj.weight.requires_grad_(False)
    decoder.layers[1].input_layernorm.weight.requires_grad_(False)
    rows = torch.randn(sum(LENGTHS), 48).to(dtype).requires_grad_()
    upstream = torch.randn(sum(LENGTHS), 48).to(dtype)

    def run(fused: bool):
        monkeypatch.setattr(decoder_module, "runs_fused", lambda x: fused)
        decoder.zero_grad(set_to_none=True)
        rows.grad = None
        hidden = decoder(rows, positions_of(LENGTHS), PackedAttention(LENGTHS))
        hidden.backward(upstream)
        return hidden.detach(), {
            name: p.grad for name, p in [("rows", rows), *decoder.named_parameters()]
        }

    (expected, gradients), (found, ours) = run(False), run(True)
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    assert (found - expected).norm() <= (limit * expected.norm() if path == "cpp" else 0)
    frozen = {"embed_tokens.weight", "layers.1.self_attn.k_proj.weight"}
    frozen |= {"layers.1.input_layernorm.weight"}
    assert {name for name, gradient in ours.items() if gradient is None} == frozen
    for name, gradient in gradients.items():
        if name not in frozen:
            error = (ours[name].float() - gradient.float()).norm() / gradient.float().norm()
            assert error <= limit, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_blocks_on_a_gpu_equal_the_modules(monkeypatch, dtype):
    """The Triton kernels against the modules: hidden states and every gradient."""
    decoder = make_decoder(kv_heads=2, bias=True).to("cuda", dtype)
    generator = torch.Generator().manual_seed(0)
    rows, upstream = (
        torch.randn(sum(LENGTHS), 48, generator=generator).to("cuda", dtype) for _ in range(2)
    )
    attention = PackedAttention(LENGTHS, "cuda")
    assert decoder_module.runs_fused(rows)
    found = []
    for fused in (True, False):
        monkeypatch.setattr(decoder_module, "runs_fused", lambda x, fused=fused: fused)
        leaf = rows.clone().requires_grad_()
        decoder.zero_grad(set_to_none=True)
        hidden = decoder(leaf, positions_of(LENGTHS).cuda(), attention)
        hidden.backward(upstream)
        trained = [p.grad for p in decoder.parameters() if p.grad is not None]
        found.append([hidden.detach(), leaf.grad, *trained])
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*found, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error <= limit
