"""What a rank computes on, as the checkpoint notes it and the model card prints it."""

from __future__ import annotations

import os
import platform

import torch


def hardware_name() -> str:
    """The device's own name, as "NVIDIA A100-SXM4-80GB"; of a CPU its kind and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
