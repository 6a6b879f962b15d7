"""Several linear layers of one input, whose gradients with respect to it the products add up."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _JoinedLinear(torch.autograd.Function):
    """(x, weight, bias, weight, bias, ...) -> outputs. Each product of the backward pass adds to
    the gradient of `x` that the one before has written; autograd would write one gradient per layer
    and then read them all again."""

    @staticmethod
    def forward(ctx, x, *parameters):
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x, *weights = ctx.saved_tensors
        needed, d_x, d_parameters = ctx.needs_input_grad, None, []
        for i, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            if needed[0] and d_x is None:
                d_x = gradient @ weight
            elif needed[0]:
                d_x.addmm_(gradient, weight)
            d_parameters.append(gradient.t() @ x if needed[1 + 2 * i] else None)
            d_parameters.append(gradient.sum(0) if needed[2 + 2 * i] else None)
        return d_x, *d_parameters


def joined_linear(x_TD: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The outputs [T, out] of all `layers` for the rows `x_TD`.

    Layers that are not plain `nn.Linear`, as those with adapters, are called one by one.
    """
    if any(type(layer) is not nn.Linear for layer in layers):
        return tuple(layer(x_TD) for layer in layers)
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    return _JoinedLinear.apply(x_TD, *parameters)
