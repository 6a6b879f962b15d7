"""The random tiny model for tests: small, fast to build and deterministic."""

import subprocess
import sys
import time

import torch

from iris_fast.tiny import build_random_tiny

DIGEST = """
import hashlib, torch
from iris_fast.tiny import build_random_tiny
torch.rand({numbers})
tiny = build_random_tiny(seed=5)
states = tiny.model.state_dict(), tiny.vq.state_dict(), tiny.untouched
parts = [part for state in states for part in state.values()]
data = b"".join(part.numpy().tobytes() for part in parts) + tiny.tokenizer.json_text().encode()
print(hashlib.sha256(data).hexdigest())
"""


def test_is_small_and_fast_to_build():
    build_random_tiny()
    start = time.perf_counter()
    tiny = build_random_tiny()
    assert time.perf_counter() - start < 1
    parameters = sum(p.numel() for m in (tiny.model, tiny.vq) for p in m.parameters())
    assert 1e6 < parameters < 2e6
    assert (tiny.config.image_size, tiny.config.image_tokens) == (64, 64)
    assert tiny.config.vq.codebook_size == 256
    assert len(tiny.tokenizer) < tiny.config.decoder.vocab_size


def test_is_equal_in_every_process():
    runs = [
        subprocess.run(
            [sys.executable, "-c", DIGEST.format(numbers=numbers)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for numbers in (1, 7)
    ]
    assert runs[0] == runs[1]


def test_seed_and_generator():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second = build_random_tiny(seed=0), build_random_tiny(seed=1)
    assert torch.equal(torch.rand(1), expected)  # the global generator is unchanged
    assert not torch.equal(first.model.lm_head.weight, second.model.lm_head.weight)


def test_bfloat16():
    tiny = build_random_tiny(dtype=torch.bfloat16)
    tensors = [*tiny.model.parameters(), *tiny.vq.parameters(), *tiny.untouched.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
