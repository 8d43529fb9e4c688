"""A filter that smooths features and keeps their edges, without parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visadapt.backbone.operators import convolve

_WINDOW, _SIGMA, _AMOUNT = 11, 1.0, 0.2


def edge_preserving(z: Tensor, rank: int) -> Tensor:
    """z + 0.2·f(z), with f the raised cosine bilateral filter that CoLoRA puts into its branch (NeurIPS 2025).

    f(z)_i = Σ_j w_ij·z_j / Σ_j w_ij over a window of 11, with w_ij = g(i − j)·cos(π·(z_i − z_j)/(2T)), g a Gaussian of
    standard deviation 1 and T the range of the channel: a neighbour counts less the more it differs. Because
    cos(a − b) = cos a·cos b + sin a·sin b, this is four convolutions. Positions outside have no weight; the weights are
    constants in the gradient (Chaudhury et al. 2011, arXiv 1105.4204).

    Args:
        z: ``(N, C, …)`` with ``rank`` axes of positions.
        rank: of its positions.

    Returns:
        A tensor of the same shape.
    """
    axes = tuple(range(2, 2 + rank))
    with torch.no_grad():
        spread = z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True) + 1e-5
        angle = z * (math.pi / 2) / spread
        cosine, sine = angle.cos(), angle.sin()
        weight = cosine * _blurred(cosine, rank) + sine * _blurred(sine, rank)
    summed = cosine * _blurred(cosine * z, rank) + sine * _blurred(sine * z, rank)
    return z + _AMOUNT * summed / weight


def _blurred(z: Tensor, rank: int) -> Tensor:
    """The Gaussian mean, with zeros outside."""
    steps = torch.arange(_WINDOW, device=z.device, dtype=z.dtype) - _WINDOW // 2
    line = torch.exp(-(steps**2) / (2 * _SIGMA**2))
    kernel = line / line.sum()
    # separable: one axis after the other
    for axis in range(rank):
        shape = [1, 1, *(_WINDOW if i == axis else 1 for i in range(rank))]
        padding = tuple(_WINDOW // 2 if i == axis else 0 for i in range(rank))
        z = convolve(rank, z.flatten(0, 1)[:, None], kernel.view(shape), padding=padding).view(z.shape)
    return z
