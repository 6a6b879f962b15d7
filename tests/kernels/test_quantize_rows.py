"""quantize_rows: the largest value of a row becomes the largest fp8; products with row scales."""

import math

import pytest
import torch
from iris_kernels import quantize_rows
from iris_kernels.quantize_rows import quantize_rows_reference

ops = torch.ops.iris_kernels
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

# name: (shape, dtype)
REGIMES = {
    "janus_1b_hidden": ((3, 2048), torch.bfloat16),
    "janus_7b_inner": ((1, 11008), torch.bfloat16),
    "not_a_power_of_two": ((4, 100), torch.float32),
    "narrow": ((5, 16), torch.float16),
    "one_channel": ((2, 1), torch.float32),
}


# Triton's interpreter loses the carry into the exponent, and NaN, in the conversion to fp8.
true_conversion = pytest.mark.parametrize(
    "backend",
    ["torch", "cpp", pytest.param("triton", marks=pytest.mark.gpu, id="on a GPU")],
    indirect=True,
)


def representable(shape, dtype, device, seed=0):
    """Rows that fp8 represents exactly, at a scale that is a power of two."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator) * 60).clamp(-FP8_MAX, FP8_MAX).to(FP8).float()
    values[:, 0] = FP8_MAX
    values[1::2] *= -1  # the largest can be a negative one
    scales = 2.0 ** torch.randint(-9, 4, (shape[0], 1), generator=generator)
    return values.to(device), scales.to(device), (values * scales).to(device, dtype)


@pytest.mark.parametrize("regime", REGIMES)
def test_representable_rows_are_exact(regime, backend, device):
    values, scales, x = representable(*REGIMES[regime], device)
    found = quantize_rows(x)
    assert found.values.dtype == FP8 and found.scales.dtype == torch.float32
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.values.float(), values)


@true_conversion
@pytest.mark.parametrize("regime", REGIMES)
def test_rounding_error(regime, backend, device):
    """Half a step of the 3-bit mantissa, or of the subnormal numbers, at the row's scale."""
    shape, dtype = REGIMES[regime]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    values, scales = quantize_rows(x)
    expected = quantize_rows_reference(x)
    assert torch.equal(values.float(), expected.values.float())
    torch.testing.assert_close(scales, expected.scales, rtol=1e-6, atol=0)
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(scales, largest / FP8_MAX, rtol=1e-6, atol=0)
    assert torch.equal(values.float().abs().amax(dim=-1), torch.full_like(largest[:, 0], FP8_MAX))
    error = (values.double() * scales.double() - x.double()).abs()
    allowed = (x.double().abs() * 2**-4).clamp(min=2**-10 * scales.double()) * (1 + 1e-5)
    assert (error <= allowed).all()


def test_zeros_and_extremes(backend, device):
    x = torch.zeros(4, 32, device=device)
    x[1], x[2, 7], x[3, 5] = 2.0**-100, 448 * 2.0**100, 1e-44
    values, scales = quantize_rows(x)
    assert scales[0] == 1 and (values[0].float() == 0).all()
    assert scales[3] == 1 and values[3].float().isfinite().all()
    assert (values[1].float() == FP8_MAX).all()
    assert values[2].float().tolist() == [FP8_MAX if i == 7 else 0.0 for i in range(32)]


@true_conversion
def test_nan_stays_in_its_row(backend, device):
    _, _, x = representable((3, 32), torch.float32, device)
    x[1, 4] = math.nan
    values, scales = quantize_rows(x)
    dequantized = values.float() * scales
    assert dequantized.isnan().any(dim=-1).tolist() == [False, True, False]


def test_a_row_does_not_depend_on_other_rows(backend, device):
    _, _, x = representable((4, 80), torch.bfloat16, device)
    together = quantize_rows(x)
    for r in range(4):
        alone = quantize_rows(x[r : r + 1])
        assert torch.equal(alone.values.float(), together.values[r : r + 1].float())
        assert torch.equal(alone.scales, together.scales[r : r + 1])


def test_opcheck_and_fullgraph(backend, device):
    _, _, x = representable((3, 32), torch.float32, device)
    torch.library.opcheck(ops.quantize_rows.default, (x,))
    torch._dynamo.reset()

    def run(x):
        values, scales = quantize_rows(x * 2)
        return values.float() * scales

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))


def test_no_rows(backend, device):
    found = quantize_rows(torch.zeros(0, 8, device=device))
    assert found.values.shape == (0, 8) and found.scales.shape == (0, 1)


WRONG_ARGUMENTS = {
    r"x has shape \(2, 3, 4\)": torch.zeros(2, 3, 4),
    r"x has shape \(1, 32769\)": torch.zeros(1, 32769),
    "x .* contiguous": torch.zeros(2, 16)[:, ::2],
    "x .* torch.float64": torch.zeros(2, 8, dtype=torch.float64),
}


@pytest.mark.parametrize("message", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        quantize_rows(WRONG_ARGUMENTS[message])
