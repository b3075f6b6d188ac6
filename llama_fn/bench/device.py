"""The device that a name stands for."""

import torch


def device_of(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one, and else the CPU.

    Raises `ValueError` for a name that torch does not know and for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("a meta device computes nothing")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
