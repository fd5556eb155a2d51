"""Earlier turns of a conversation with a vision-language model: what was said before the question that is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Turn", "earlier_turns"]


@dataclass(frozen=True)
class Turn:
    """What one side said.

    Attributes:
        images: how many pictures stand before the text; turns take the row's pictures in their order.
    """

    role: Literal["user", "assistant"]
    content: str
    images: int = 0


def earlier_turns(value: Any, images: int | None = None) -> tuple[Turn, ...]:
    """The turns in a table's column `turns`: a list of ``{role, content}``, of the user also with ``images``.

    Args:
        value: of the column; None is no turn.
        images: pictures of the row, where they are known.

    Raises:
        ValueError: not the layout, roles that do not alternate from the user to the assistant, or more pictures than
            the row has.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) % 2:
        raise ValueError("turns is no list of pairs, what the user said and what the assistant answered")
    turns = tuple(_turn(one, number) for number, one in enumerate(value, 1))
    if images is not None and sum(turn.images for turn in turns) > images:
        raise ValueError(f"turns show {sum(turn.images for turn in turns)} pictures, and the row has {images}")
    return turns


def _turn(value: Any, number: int) -> Turn:
    role: Literal["user", "assistant"] = "user" if number % 2 else "assistant"
    if not isinstance(value, dict) or value.get("role") != role or not isinstance(value.get("content"), str):
        raise ValueError(f"turn {number} is {value!r:.60}; it is an object with role {role} and content, a text")
    shown = value.get("images", 0)
    if strange := set(value) - {"role", "content", "images"}:
        raise ValueError(f"turn {number} has {', '.join(sorted(strange))}; known are role, content and images")
    if not isinstance(shown, int) or isinstance(shown, bool) or shown < 0 or (shown and role == "assistant"):
        raise ValueError(f"turn {number}: images is {shown!r:.40}; it is how many pictures the user showed there")
    return Turn(role, value["content"], shown)
