"""What launches ask of a GPU, many times a call."""

from functools import cache

import torch

# torch asks the driver's properties, through several functions, every time
capability = cache(torch.cuda.get_device_capability)


def is_current(device: torch.device) -> bool:
    """Whether launches go to a tensor's device without a change of the current one; CPU tensors need none."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()
