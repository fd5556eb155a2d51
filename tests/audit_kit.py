"""What the tests of audits share."""

from __future__ import annotations

from typing import Any

from mmalign.audit_table import Judgement
from mmalign.records import MediaRef


def judged(prompt: str, a: str, b: str, answer: float, user: str | None = None, **more: bool) -> Judgement:
    return Judgement(prompt, MediaRef(f"/{a}"), MediaRef(f"/{b}"), answer, user, 1.0, True, **more)


def rounded(value: Any) -> Any:
    """Nested data with its floats cut to what two orders of summing share."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 9) if isinstance(value, float) else value
