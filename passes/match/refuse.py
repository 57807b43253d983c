"""How a rule says no: an exception inside the matcher, a `Refusal` outside it."""

from __future__ import annotations

import torch.fx as fx

from elmo_compile.passes.graphs import source_of
from elmo_compile.report.records import Code, Refusal


class NoMatch(Exception):
    """Raised by a rule; `match_region` turns it into a Refusal."""

    def __init__(self, code: Code, node: fx.Node | None, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.code, self.node, self.reason, self.remedy = code, node, reason, remedy

    def refusal(self, fallback: fx.Node) -> Refusal:
        """The refusal, blaming `fallback` where the rule had no node with a source line."""
        source = source_of(self.node) or source_of(fallback)
        node = self.node if self.node is not None else fallback
        return Refusal(
            code=self.code,
            node=f"{node.name} ({_target(node)})",
            source=source,
            reason=self.reason,
            remedy=self.remedy,
        )


def _target(node: fx.Node) -> str:
    if node.op == "call_function":
        name = str(node.target)
        return getattr(node.target, "__name__", name) if name.startswith("<") else name
    return f".{node.target}()" if node.op == "call_method" else node.op
