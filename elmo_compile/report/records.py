"""What the backend says it did: frozen records without tensors."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from elmo_compile.config import LossValue
from elmo_compile.planner import HeadMemory, Plan
from elmo_compile.report.strip import strip

if TYPE_CHECKING:
    from torch.fx import GraphModule


class Code(str, enum.Enum):
    """Why a head was not rewritten. The value is what a report prints."""

    LOGITS_ESCAPE = "logits-escape"
    """Something other than the loss reads the logits."""
    UNKNOWN_LOSS = "unknown-loss"
    """What follows the logits is no loss that is known."""
    UNSUPPORTED_ARGUMENT = "unsupported-argument"
    """A known loss with an argument that is not supported (class weights, smoothing, ...)."""
    UNSUPPORTED_TARGET = "unsupported-target"
    """Targets in a form or dtype that is not supported."""
    UNSUPPORTED_DTYPE = "unsupported-dtype"
    UNSUPPORTED_DEVICE = "unsupported-device"
    UNSUPPORTED_SHAPE = "unsupported-shape"
    """Logits that are not rows by outputs, a weight that is not 2-D, or an unknown size."""
    WEIGHT_COMPUTED = "weight-computed"
    """The weight is made in the graph (parametrised, LoRA): it is no tensor of its own."""
    WEIGHT_SHARED = "weight-shared"
    """Tied, aliased, or read a second time in the graph."""
    MUTATION = "mutation"
    """Something in the region writes in place."""
    AUTOCAST = "autocast"
    CHECKPOINT = "checkpoint"
    """Inside an activation-checkpoint body that is not understood."""
    BUDGET = "budget"
    """The planner found no chunk that fits `memory_budget`."""
    EXCLUDED = "excluded"
    """The user asked for it: `elmo_compile.exclude`."""
    RETRACE_FAILED = "retrace-failed"
    """The region could not be traced to ATen."""

    __str__ = str.__str__


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """One candidate head that was left as it was, and why."""

    code: Code
    node: str
    """The first blocking node of the graph."""
    source: str
    """The user's line, `file:line: text`, or empty where the graph does not know it."""
    reason: str
    remedy: str
    """What the user can do."""

    def __str__(self) -> str:
        where = f" at {self.source}" if self.source else ""
        return f"[{self.code}] {self.node}{where}: {self.reason}; {self.remedy}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """One head that was rewritten."""

    loss: str
    """Its name in `torch.nn.functional` where it has one."""
    num_outputs: int
    num_features: int
    fused_update: bool
    chunk_size: int
    """Outputs per chunk."""
    dtype: torch.dtype
    """Of the weight as stored."""
    compute_dtype: torch.dtype
    products: int
    """Matrix products in a step."""
    name: str = ""
    """The weight's, as its optimizer has it or else the graph; empty where neither knows."""
    at_step: bool = False
    """Whether a fused update is that of `opt.step()` (`update_at="step"`)."""
    source: str = ""
    """The user's line, `file:line: text`."""
    deferred: bool = False
    """Whether the logits are deferred."""
    loss_value: LossValue = "exact"
    graph_break: str = ""
    """The user's line after which the graph ends, where the loss is not in it."""
    made: Mapping[str, int] = dataclasses.field(default_factory=dict, compare=False)
    """How often the deferred logits were made as values all the same, for each reason; goes on."""
    notes: tuple[str, ...] = ()
    """Sentences: why the update is not fused, what the plan could not meet."""

    @property
    def update(self) -> str:
        """How the weight changes: "by gradient" (no fused update), or when and where."""
        if self.deferred and self.loss == "linear":
            return "with its loss"  # which has a report of its own
        if not self.fused_update:
            return "by gradient"
        return "in opt.step()" if self.at_step else "in backward"

    def __str__(self) -> str:
        """One line."""
        name = f"{self.name}: " if self.name else ""
        parts = [
            f"{name}{self.loss} of {self.num_outputs} outputs",
            f"in chunks of {self.chunk_size}",
            f"weight updated {self.update}",
            *(["logits deferred"] if self.deferred else []),
        ]
        return ", ".join(parts) + (f" ({self.source})" if self.source else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One compiled graph."""

    name: str
    """Unique among the graphs of one compilation: Dynamo's compile id, for example."""
    matches: tuple[Match, ...] = ()
    plans: tuple[Plan, ...] = ()
    """The plan of each match, in the same order."""
    refusals: tuple[Refusal, ...] = ()
    below_min_outputs: tuple[int, int] | None = None
    """Outputs of the largest linear layer, and `min_outputs`, where no layer has as many."""
    graph_before: GraphModule | None = None
    """Kept as a copy that can be printed and holds no tensors; so is `graph_after`."""
    graph_after: GraphModule | None = None

    def __post_init__(self) -> None:
        """A plan belongs to a match; graphs lose their tensors."""
        object.__setattr__(self, "graph_before", strip(self.graph_before))
        object.__setattr__(self, "graph_after", strip(self.graph_after))
        if len(self.plans) != len(self.matches):
            raise ValueError(f"{len(self.matches)} matches, but {len(self.plans)} plans")


@dataclasses.dataclass(frozen=True)
class Report:
    """What was done to one compiled program: a section for each of its graphs."""

    sections: tuple[Section, ...] = ()
    updates: Mapping[str, Mapping[str, float]] = dataclasses.field(
        default_factory=dict, compare=False
    )
    """Fused heads of this process, when the report was asked for: `updates` so far, and of a sample
    the shares `unchanged` by an update (rounded to nearest: lost), `saturated` and `zero`."""
    notes: tuple[str, ...] = ()
    """Sentences about the whole: why no head was seen."""

    @property
    def matches(self) -> tuple[Match, ...]:
        """The heads that were rewritten."""
        return tuple(match for section in self.sections for match in section.matches)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each match, in the same order."""
        return tuple(plan for section in self.sections for plan in section.plans)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The heads that were not, and why."""
        return tuple(refusal for section in self.sections for refusal in section.refusals)

    @property
    def memory(self) -> tuple[HeadMemory, ...]:
        """Bytes before and after of each match, in the same order."""
        return tuple(plan.memory for plan in self.plans)

    @property
    def graph_before(self) -> GraphModule | None:
        """The graph as it came, of the first section that holds a match (else of the last)."""
        return self._graph("graph_before")

    @property
    def graph_after(self) -> GraphModule | None:
        """The same graph rewritten."""
        return self._graph("graph_after")

    def _graph(self, which: Literal["graph_before", "graph_after"]) -> GraphModule | None:
        candidates = [s for s in self.sections if s.matches] or list(self.sections[-1:])
        return getattr(candidates[0], which) if candidates else None

    def dump(self, directory: str | Path) -> Path:
        """Write report.txt, ledger.json and the graphs of every section; returns the folder."""
        from elmo_compile.report.dump import dump

        return dump(self, Path(directory))

    def __str__(self) -> str:
        from elmo_compile.report.render import render

        return render(self)

    def __repr__(self) -> str:
        """The same: what a notebook shows."""
        return str(self)
