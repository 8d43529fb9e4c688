"""The papers' recipes, by name; change one with `Recipe.replace`."""

from __future__ import annotations

from visadapt.training.recipe import Recipe

HOULSBY = Recipe()
"""Adapters on text (Houlsby et al. 2019, arXiv 1902.00751, §3.1)."""

REBUFFI = Recipe(
    epochs=120,
    lr=0.1,
    batch_size=128,
    warmup=0.0,
    schedule="step",
    optimizer="sgd",
    weight_decay=5e-4,
    adapter_decay=2e-3,
    grad_clip=None,
)
"""Residual adapters (Rebuffi et al. 2017, arXiv 1705.08045, §4): a tenth of the rate after 80 and 100 of 120 epochs.

The 1×1 convs have a weight decay of their own: 5e-4 with much data, 2e-3 to 5e-3 with little. Norms and biases decay in
the paper but not here.
"""

CONV_ADAPTER = Recipe(
    epochs=100, batch_size=64, warmup=0.0, schedule="cosine", weight_decay=1e-4, eps=1e-8, grad_clip=None
)
"""Conv-Adapter (Chen et al. 2022, arXiv 2208.07463): the defaults of its released code."""

FINE_TUNING = Recipe(lr=1e-4, head_lr=1e-3)
"""Fine-tuning of every weight: pretrained weights at a tenth of an adapter's rate, the new head at the full rate."""

RECIPES = {"houlsby": HOULSBY, "rebuffi": REBUFFI, "conv-adapter": CONV_ADAPTER, "fine-tuning": FINE_TUNING}
"""Recipes by name."""
