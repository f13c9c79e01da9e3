import pytest
import torch

from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import SettingError


@pytest.mark.parametrize("there", [False, True])
def test_auto_takes_cuda_where_there_is_one(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert resolve_device("auto") == torch.device("cuda" if there else "cpu")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "expected 'auto', 'cpu', 'cuda'"), (None, "expected"), ("cuda:0", "finds no CUDA device")]
)
def test_a_bad_device_is_named(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingError, match=f"device is {device!r}.*{message}"):
        resolve_device(device)
