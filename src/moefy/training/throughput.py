"""The share of the hardware that training uses: model FLOPs utilisation (MFU).

MFU = 3 · FLOPs of a forward pass · tokens/s / peak FLOP/s of all processes (PaLM, arXiv 2204.02311,
appendix B). It counts the experts that run, not those that wait, and neither the teacher nor what
gradient checkpointing computes again.
"""

from __future__ import annotations

import torch

from moefy.hardware import device, multiply_rate

TRAINED_PASSES = 3  # forward once, backward twice: gradients of inputs and of weights
_PUBLISHED_TFLOPS = {  # bfloat16, dense, from NVIDIA's data sheets; the longest name that fits
    **{"B200": 2250.0, "H200": 989.5, "H100": 989.5, "H100 PCIe": 756.5, "H100 NVL": 835.5},
    **{"A100": 312.0, "A10": 125.0, "A40": 149.7, "L40S": 362.0, "L4": 121.0, "V100": 125.0},
    **{"RTX 4090": 165.2, "RTX 3090": 71.2},
}


def peak_flops(precision: str) -> float:
    """Return the published FLOP/s of a known GPU in bfloat16, else those of a large product."""
    if device().type == "cuda" and precision == "bfloat16":
        chosen = known_gpu(torch.cuda.get_device_name())
        if chosen:
            return _PUBLISHED_TFLOPS[chosen] * 1e12
    return multiply_rate(getattr(torch, precision))


def known_gpu(name: str) -> str | None:
    """Return which GPU of the data sheets a device's name means; None for others and for slices."""
    words = name.replace("-", " ").split()
    if "MIG" in words:
        return None
    known = [key for key in _PUBLISHED_TFLOPS if all(part in words for part in key.split())]
    return max(known, key=len, default=None)
