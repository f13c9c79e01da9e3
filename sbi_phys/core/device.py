"""Device of networks: `device="auto"` means CUDA where it is available, else the CPU."""

import torch

from sbi_phys.core.errors import SettingError

__all__ = ["resolve_device"]


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the torch device of a name such as 'auto', 'cpu', 'cuda' or 'cuda:1'.   Raises: SettingError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as err:
        raise SettingError(f"device is {device!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from err
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"device is {device!r}, but torch {torch.__version__} finds no CUDA device; expected 'auto' or 'cpu' here")
    return resolved
