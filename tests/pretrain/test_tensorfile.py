"""What is written is what the safetensors library reads, and its hash is the file's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pretrain import tensorfile
from pretrain.tensorfile import write_tensors


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(max_size=20).filter(lambda name: name != "__metadata__"), st.integers(0, 300), max_size=8)
)
def test_the_library_reads_it_back(tmp_path: Path, sizes: dict[str, int]) -> None:
    tensors = {name: torch.randn(numel) for name, numel in sizes.items()}
    num_bytes, sha256 = write_tensors(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (num_bytes, sha256)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], values) for name, values in tensors.items())


def test_large_tensors_go_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "CHUNK_BYTES", 1000)
    values = torch.randn(12_345)
    _, sha256 = write_tensors(tmp_path / "x", {"a": values})
    assert torch.equal(load_file(tmp_path / "x")["a"], values)
    assert hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest() == sha256


def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left"):
        write_tensors(Path("/dev/full"), {"a": torch.zeros(10)})
