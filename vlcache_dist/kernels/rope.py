"""Rotary embedding in torch: transformers' ``rotate_half`` convention, fp32 inside, one rounding."""

from __future__ import annotations

import torch


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [R, H, D], cos and sin fp32 [R, D/2] -> [R, H, D] in x's dtype: (a cos - b sin, b cos + a sin), where a and
    b are the first and second half of a head.

    transformers casts cos and sin to the model's dtype and rounds after each product; here the product is rounded
    once, so in bf16 the two differ by up to a few units in the last place (and are equal in fp32 up to one).
    """
    a, b = x.float().chunk(2, -1)
    c, s = cos.float()[:, None], sin.float()[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)
