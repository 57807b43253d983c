"""Why deferred logits were made as values after all: sentences that the report counts."""

from __future__ import annotations

import linecache
import re
import sys
from types import FrameType

_LIBRARY = re.compile(r"[/\\](torch|elmo_compile)[/\\]")
_KEPT = 8
"""Sentences kept for one head; the rest are counted together."""

COMPILED = (
    "a function that Dynamo compiled apart received them (remedy: compute the loss in the graph "
    "that makes the logits, with no graph break between, or in code that is not compiled)"
)
EXCLUDED = "the weight's module was excluded with elmo_compile.exclude"
_OTHERS = "read elsewhere"


class Made(dict[str, int]):
    """How often the logits of one head were made, for each reason."""

    def count(self, why: str) -> None:
        """They are made once more."""
        key = why if why in self or len(self) < _KEPT else _OTHERS
        self[key] = self.get(key, 0) + 1


def read_by(operation: str) -> str:
    """The reason for an operation that needs the values, with the user's line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _LIBRARY.search(frame.f_code.co_filename):
        frame = frame.f_back
    where = ""
    if frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        where = f" at {file}:{line}: {linecache.getline(file, line).strip()}"
    return (
        f"`{operation}` read them{where} (remedy: what streams is listed in docs/logits.md: losses "
        "of torch.nn.functional, argmax and topk of them; where no update is fused also parts of "
        "losses, gather or logsumexp; or move what reads them into the compiled function)"
    )
