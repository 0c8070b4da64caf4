import pytest
import torch
from safetensors.torch import save_file

from abft_fast.runtime.tensor_file import write_tensors

pytestmark = pytest.mark.unit


def test_the_bytes_are_those_of_safetensors(tmp_path):
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.bias": torch.randn(7).bfloat16(),
        "a.weight": torch.randn(2, 3, 4).double(),
        "ü": torch.randn(5, 3).half(),
        "empty": torch.zeros(0, 4),
        "none": torch.tensor(1.5),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tensors, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_transposed_tensor_is_written_by_rows(tmp_path):
    tensor = torch.randn(4, 6)
    write_tensors({"t": tensor.T}, tmp_path / "ours")
    save_file({"t": tensor.T.contiguous()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
