from __future__ import annotations

import pytest

from pretrain.redact import without_secrets


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("s3://bucket/a/{000..009}.tar", "s3://bucket/a/{000..009}.tar"),
        ("https://me:secret@host:8443/a/b?X-Signature=1&b#c", "https://host:8443/a/b"),
        ("see https://u:p@h/x?y, or /local/path?not=a&url", "see https://h/x or /local/path?not=a&url"),
        ("https://u:p@[broken/x", "https://…"),
        ("no url", "no url"),
    ],
)
def test_urls_lose_their_secrets(text: str, bare: str) -> None:
    assert without_secrets(text) == bare
    assert without_secrets({"a": [text, 1, None], "b": {"c": (text,)}}) == {"a": [bare, 1, None], "b": {"c": [bare]}}
