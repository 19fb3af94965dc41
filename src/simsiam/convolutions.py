"""Convolutions in forms for which the libraries have fast kernels. The sums are the same, in another order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simsiam import kernels


class Conv2d(nn.Conv2d):
    """nn.Conv2d that computes gradients on a CPU in other ways where oneDNN takes several times as long."""

    def forward(self, x: Tensor) -> Tensor:
        if not _trains(self, x):
            return super().forward(x)
        casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cpu") if casts else x.dtype
        ours = _image_is_strided(self), dtype == torch.bfloat16 and kernels.multiplies()
        if not any(ours):
            return super().forward(x)
        y: Tensor = _Convolution.apply(x.to(dtype), self.weight, dtype, self.stride[0], self.padding[0], ours)
        return y


def taught(net: nn.Module) -> nn.Module:
    """Turns every nn.Conv2d of the network into a `Conv2d`, in place, and returns the network."""
    for module in net.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
    return net


def _trains(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `_Convolution` supports this convolution, and gradients are needed."""
    (k, k2), (stride, stride2) = conv.kernel_size, conv.stride
    return (
        kernels.wanted()
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and conv.weight.requires_grad
        and conv.bias is None
        and (k, stride) == (k2, stride2)
        and conv.padding in ((0, 0), (k // 2, k // 2))
        and (conv.groups, conv.dilation, conv.padding_mode) == (1, (1, 1), "zeros")
        and x.ndim == 4
    )


def _image_is_strided(conv: nn.Conv2d) -> bool:
    """Whether most of x's gradient is zero: oneDNN takes 2 to 4 times as long as the product of what is not."""
    return conv.kernel_size[0] == 1 and conv.stride[0] > 1 and conv.padding[0] == 0


class _Convolution(torch.autograd.Function):
    """conv(x) in `dtype`, which x has. ours: whether the gradients of x and of the weight are computed here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, stride: int, padding: int, ours: tuple[bool, bool]
    ) -> Tensor:
        ctx.dtype, weight = weight.dtype, weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.given = stride, padding, ours
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (stride, padding, ours) = ctx.saved_tensors, ctx.given
        y = gradients[0].contiguous(memory_format=torch.channels_last)
        outer, inner, k, _ = weight.shape
        wanted = ctx.needs_input_grad[:2]
        of_x = of_weight = None
        left = [want and not our for want, our in zip(wanted, ours, strict=True)]
        if any(left):
            shape = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
            of_x, of_weight, _ = torch.ops.aten.convolution_backward(y, x, weight, *shape, [*left, False])
        if wanted[0] and ours[0]:
            values = y.permute(0, 2, 3, 1).reshape(-1, outer) @ weight.view(outer, inner)
            of_x = torch.zeros_like(x)
            of_x[:, :, ::stride, ::stride] = values.view(len(x), *y.shape[2:], inner).permute(0, 3, 1, 2)
        if wanted[1] and ours[1]:
            of_weight = kernels.weight_gradient(x, y, k, stride, padding)
        return of_x, None if of_weight is None else of_weight.to(ctx.dtype), None, None, None, None


def on_matrix_units(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x), without bias, in a form for which cuDNN has kernels on a GPU's matrix units: images are padded with five
    channels of zeros, and strided 1x1 convolutions subsample their input first."""
    weight, stride = conv.weight, conv.stride
    if conv.in_channels == 3:
        room = (0, 0, 0, 0, 0, 5)
        x, weight = F.pad(x, room), F.pad(weight, room)
    elif conv.kernel_size == (1, 1):
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, weight, None, stride, conv.padding)


class Folded:
    """A convolution with the following BN folded in, for inference on a CPU in float32 or bfloat16. oneDNN fuses the
    shortcut and ReLU into it. Its weights are a copy."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        assert conv.bias is None and bn.running_mean is not None and bn.running_var is not None
        with torch.no_grad():
            scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
            weight = (conv.weight * scale[:, None, None, None]).to(dtype, memory_format=torch.channels_last)
            bias = (bn.bias - bn.running_mean * scale).to(dtype)
        self.given = weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups

    def __call__(self, x: Tensor, relu: bool = True) -> Tensor:
        """relu(bn(conv(x)))."""
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, *self.given, "relu" if relu else "none", [], "")
        return y

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        """relu(bn(conv(x)) + y), computed in place of y."""
        fused = torch.ops.mkldnn._convolution_pointwise_.binary
        y = fused(y, x, *self.given, "add", 1.0, "relu", [], "")
        return y

    @staticmethod
    def possible() -> bool:
        """Whether this version of torch has the fused operations, and they may be used."""
        try:
            _ = torch.ops.mkldnn._convolution_pointwise.default, torch.ops.mkldnn._convolution_pointwise_.binary
        except AttributeError:  # internal names of torch
            return False
        return kernels.wanted() and torch.backends.mkldnn.is_available()
