"""Named tensors -> a safetensors file, hashed while it is written. Reading is the library's.

The format (huggingface/safetensors, README): 8 bytes little-endian length, a JSON header, the values one after the
other. Written here and not by the library because a background writer must neither copy the values nor hold the
interpreter: large writes and hashes release it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 16 << 20


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write fp32 vectors that lie in CPU memory, and bring them to the disk. Returns (bytes, sha256 of the file).

    Raises OSError where the disk refuses (full, read-only, quota).
    """
    header: dict[str, Any] = {}
    end = 0
    for name, values_K in tensors.items():
        assert values_K.dtype == torch.float32
        assert values_K.is_contiguous()
        begin, end = end, end + values_K.numel() * values_K.element_size()
        header[name] = {"dtype": "F32", "shape": list(values_K.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values must be aligned
    prefix = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(prefix)
    with path.open("wb") as file:
        file.write(prefix)
        for values_K in tensors.values():
            view = values_K.numpy().data.cast("B") if values_K.numel() else memoryview(b"")
            for begin in range(0, len(view), CHUNK_BYTES):
                chunk = view[begin : begin + CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return len(prefix) + end, digest.hexdigest()
