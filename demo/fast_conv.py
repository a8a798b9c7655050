"""A faster backward pass for convolutions over tiny pictures on a CPU.

For 8x8 inputs the backward pass of PyTorch's convolution takes twenty times as long as the forward pass. A forward
convolution with the flipped kernel gives the gradient of the input cheaply, and one matrix product over unfolded
patches that of the kernel.
"""

import types

import torch
import torch.nn.functional as F


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        size = weight.shape[2]
        flipped = weight.flip(2, 3).transpose(0, 1).contiguous()
        grad_x = F.conv2d(grad, flipped, padding=size - 1 - ctx.padding)
        patches = F.unfold(x, size, padding=ctx.padding).permute(0, 2, 1).flatten(0, 1)
        rows = grad.flatten(2).permute(1, 0, 2).flatten(1)
        grad_weight = (rows @ patches).view_as(weight)
        return grad_x, grad_weight, grad.float().sum((0, 2, 3)).to(grad.dtype), None


def _forward(self, x):
    x = x.to(torch.bfloat16)
    weight, bias = self.weight.to(torch.bfloat16), self.bias.to(torch.bfloat16)
    return _Conv.apply(x.contiguous(), weight, bias, self.padding[0])


def speed_up(model):
    """Gives every stride-1 convolution of `model` the faster backward pass, in bfloat16."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.stride == (1, 1):
            module.forward = types.MethodType(_forward, module)
