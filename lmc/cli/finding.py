"""What the doctor has to say about one thing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Finding:
    """`bad` keeps lmc from working here as the settings ask for, `note` is good to know.

    `todo` says what to do about it; `figures` is what a program may want to read.
    """

    name: str
    state: Literal["ok", "note", "bad"]
    text: str
    todo: str = ""
    figures: Mapping[str, object] = field(default_factory=dict)
