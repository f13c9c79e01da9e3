"""Device of networks: `device="auto"` means CUDA where it is available, else the CPU."""

import torch

from sbi_phys.core.errors import SettingError

__all__ = ["require_float32", "require_gradients", "resolve_device"]


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


def require_float32() -> None:
    """Refuse another default type of torch: layers that are built under it do not fit the data.   Raises: SettingError."""
    if (found := torch.get_default_dtype()) is not torch.float32:
        raise SettingError(
            f"torch's default dtype is {found}; expected torch.set_default_dtype(torch.float32) around calls of this package"
        )


def require_gradients() -> None:
    """Refuse a training within `torch.inference_mode()`, whose tensors have no gradients.   Raises: SettingError."""
    if torch.is_inference_mode_enabled():
        raise SettingError("fit was called within torch.inference_mode(); expected a training outside of it")
