"""What runs at every call of a compiled graph: which heads may be fused now, and with what inputs.

A graph is compiled once for each combination of fused heads that occurs; most programs have one.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from elmo_compile.config import Options
from elmo_compile.deferred import Origin
from elmo_compile.deferred.loss import defer_loss
from elmo_compile.deferred.made import Made
from elmo_compile.deferred.nodes import defer
from elmo_compile.lowering import lower, lower_later
from elmo_compile.ops.data_parallel import hooked, wrapper_of
from elmo_compile.ops.dtensors import local_of, local_part
from elmo_compile.ops.exclusion import is_excluded
from elmo_compile.ops.fused import open_call, serial_if_deferred
from elmo_compile.ops.holders import in_a_module
from elmo_compile.ops.kept import Tops, collecting
from elmo_compile.ops.linear import carry
from elmo_compile.ops.owners import Owner, live_owners, owner_of
from elmo_compile.ops.shards import telling
from elmo_compile.ops.unfused import FROZEN, is_read_elsewhere, note
from elmo_compile.passes.defer import same_logits
from elmo_compile.passes.find import is_matrix, weight_inputs
from elmo_compile.passes.graphs import hint, parameter_name, tensor_of
from elmo_compile.passes.pipeline import Analysis
from elmo_compile.passes.records import DeferredOutput, PlannedHead, Rewritten
from elmo_compile.passes.rewrite import rewrite

NOT_OWNED = "no elmo_compile optimizer owns the weight"


class Treatment(NamedTuple):
    """What one call does with one head."""

    kind: Literal["fused", "gradient", "untouched"]
    """Updated by its backward; chunked with a real gradient; as the program has it (excluded)."""
    owner: Owner | None
    """Who updates it, if `fused`."""
    why: str
    """Why it is not fused; empty if it is."""


class CompiledGraph:
    """The callable a backend returns for one graph with heads in it."""

    def __init__(self, analysis: Analysis, inputs: Sequence[Any], options: Options) -> None:
        self.analysis = analysis
        self.options = options
        self.grad = torch.is_grad_enabled()
        self.dynamic = any(isinstance(value, torch.SymInt) for value in inputs)
        self._variants: dict[tuple[str, ...], tuple[Rewritten, Callable[..., Any]]] = {}
        self._lock = threading.Lock()
        self._was_fused: list[weakref.ref[Owner] | None] = [None] * len(analysis.heads)
        self._warned = False
        self._strangers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """Weights of other models, with the key of the owner they have nothing to do with."""
        self._weights = [_weights(head) for head in analysis.heads]
        placeholders = analysis.module.graph.find_nodes(op="placeholder")
        self._names = [parameter_name(node) for node in placeholders]
        self.made: dict[fx.Node, Made] = {output.seed: Made() for output, _ in analysis.deferred}
        """How often the deferred logits of a head (its product) were made, for each reason."""
        self._origins = [self._origin(*pair) for pair in analysis.deferred]
        self._collected = {
            origin: head.weight_input
            for origin in self._origins
            for head in analysis.heads
            if head.weight_input is not None and same_logits(origin.output, head)
        }
        first_added = [output.added_from for output, _ in analysis.deferred]
        self._num_results = min(first_added, default=0)
        self._first_kinds = tuple(treatment.kind for treatment in self.treatments(inputs))
        self.first = self._build(self._first_kinds)

    def _origin(self, output: DeferredOutput, top: PlannedHead) -> Origin:
        made = rewrite(top.match.region.site.module, [top], [False], grad=False)
        origin = Origin(output, made.module, self.options, self.made[output.seed])
        heads = self.analysis.heads
        origin.has_loss = any(output.seed in head.match.region.nodes for head in heads)
        return origin

    def compile_first(self, inputs: Sequence[Any]) -> None:
        """Compile the variant these inputs call for; others follow when a call needs them."""
        with_extras = self._arguments(self.first, inputs)
        compiled = lower(self.first.module, with_extras, self.options, rewritten=True)
        self._variants[self._first_kinds] = (self.first, compiled)

    def treatments(self, inputs: Sequence[Any]) -> list[Treatment]:
        """What a call with these inputs does with each head."""
        return [self._treatment(head, inputs) for head in self.analysis.heads]

    def weight_of(self, output: DeferredOutput) -> int | None:
        """Where the weight of deferred logits enters the graph, if it does."""
        logits = tensor_of(output.seed)
        placeholders = list(self.analysis.module.graph.find_nodes(op="placeholder"))
        found = {
            position
            for kind, position in output.sources
            if kind != "output" and logits is not None
            if is_matrix(placeholders[position], hint(logits.shape[-1]))
        }
        return found.pop() if len(found) == 1 else None

    def name_of(self, position: int | None, inputs: Sequence[Any]) -> str:
        """What messages and reports call a weight: as its optimizer does, which takes the graph's
        name for it where it was given none."""
        if position is None:
            return ""
        owner = owner_of(inputs[position])
        if owner is None:
            return self._names[position]
        give_name(owner, self._names[position])
        return owner.name

    def __call__(self, *inputs: Any) -> Any:
        treatments = self.treatments(inputs)
        for head, treatment, weights in zip(self.analysis.heads, treatments, self._weights):
            with telling(head.shard, _device_of(head, inputs)):
                _check_usable(head, treatment, inputs)
            for position in weights:
                self.name_of(position, inputs)
            if treatment.owner is None and treatment.why != NOT_OWNED and torch.is_grad_enabled():
                for position in weights:
                    note(inputs[position], treatment.why)
        variant, compiled = self._variant(tuple(treatment.kind for treatment in treatments))
        self._notice_lost_owners(treatments, inputs)
        arguments = self._arguments(variant, inputs)
        with self._collecting(inputs) as tops:
            results = compiled(*arguments)
        results = self._open_losses(variant, arguments, treatments, results)
        return self._with_deferred(inputs, results, tops)

    def _collecting(self, inputs: Sequence[Any]) -> AbstractContextManager[Tops]:
        """Around a call: what deferred logits keep is collected by the loss pass, where it can."""
        wanted = [inputs[p] for o, p in self._collected.items() if o.large]
        if not wanted or not torch.is_grad_enabled():
            return nullcontext({})
        return collecting(wanted)

    def _with_deferred(self, inputs: Sequence[Any], results: Any, tops: Tops) -> Any:
        """The results, with deferred logits where the graph left them out."""
        if not self._origins:
            return results
        returned = list(results[: self._num_results])
        for origin in self._origins:
            weight = self._collected.get(origin)
            found = [] if weight is None else tops.get(inputs[weight].data_ptr(), [])
            # Two passes over one weight: which of them these logits belong to is not known.
            top = found[0] if len(found) == 1 else None
            returned[origin.output.position] = defer(origin, inputs, results, top)
        return tuple(returned)

    def _variant(self, kinds: tuple[str, ...]) -> tuple[Rewritten, Callable[..., Any]]:
        found = self._variants.get(kinds)
        if found is None:
            with self._lock:
                found = self._variants.get(kinds)
                if found is None:
                    built = self._build(kinds)
                    found = (built, lower_later(built.module, self.options, self.dynamic))
                    self._variants[kinds] = found
        return found

    def _build(self, kinds: tuple[str, ...]) -> Rewritten:
        chosen = [(h, k) for h, k in zip(self.analysis.heads, kinds) if k != "untouched"]
        fused = [kind == "fused" for _, kind in chosen]
        return rewrite(self.analysis.module, [head for head, _ in chosen], fused, self.grad)

    def _arguments(self, variant: Rewritten, inputs: Sequence[Any]) -> list[Any]:
        """The variant's inputs: fused weights left out, carried ones detached, extras behind."""
        localized = self.analysis.localized
        arguments = []
        for position, value in enumerate(inputs):
            if position in variant.dropped:
                continue
            if position in variant.detached:
                value = local_of(value)
            elif position in localized:
                value = local_part(value)
            arguments.append(value)
        opened: dict[int, dict[str, Tensor]] = {}
        for extra in variant.extras:
            weight = inputs[extra.weight_input]
            if extra.kind == "carrier":
                arguments.append(carry(weight))
                continue
            if extra.weight_input not in opened:
                owner = owner_of(weight)
                assert owner is not None
                parts = open_call(owner)
                opened[extra.weight_input] = dict(zip(("anchor", "handle", "sink"), parts))
            arguments.append(opened[extra.weight_input][extra.kind])
        return arguments

    def _open_losses(
        self,
        variant: Rewritten,
        arguments: list[Any],
        treatments: list[Treatment],
        results: Any,
    ) -> Any:
        """Remember the losses whose value the backward is to fill in; the results with `auto`
        losses as tensors that compute themselves."""
        first_extra = len(arguments) - len(variant.extras)
        handles = {
            extra.weight_input: arguments[first_extra + i]
            for i, extra in enumerate(variant.extras)
            if extra.kind == "handle"
        }
        for head, (_, owner, _) in zip(self.analysis.heads, treatments):
            if owner is None or not head.deferred or head.loss_output is None:
                continue
            assert head.weight_input is not None
            serial = serial_if_deferred(handles[head.weight_input])
            if serial is not None:
                loss = results[head.loss_output]
                opened = owner.open_loss(serial, loss)
                if head.loss_value == "auto" and opened.value is not None:
                    changed = list(results)
                    changed[head.loss_output] = defer_loss(loss, owner, serial, opened)
                    results = tuple(changed)
                else:
                    owner.keep_open(opened)
        return results

    def _treatment(self, head: PlannedHead, inputs: Sequence[Any]) -> Treatment:
        if head.weight_input is None:
            return Treatment("gradient", None, head.unfusable)
        weight = inputs[head.weight_input]
        if is_excluded(weight):
            return Treatment("untouched", None, "excluded with elmo_compile.exclude")
        owner, why = (None, head.unfusable) if head.unfusable else _owner(head, weight, inputs)
        return Treatment("gradient" if owner is None else "fused", owner, why)

    def _notice_lost_owners(self, treatments: list[Treatment], inputs: Sequence[Any]) -> None:
        """Warn, once, where a head's Parameter was fused and is now another one that nobody owns.

        Another model of the same class shares the graph, and is none of an owner's business: its
        calls leave the owner's Parameter in its own module.
        """
        if not (self.grad and torch.is_grad_enabled()):
            return
        for position, (head, treatment) in enumerate(zip(self.analysis.heads, treatments)):
            if treatment.owner is not None:
                self._was_fused[position] = weakref.ref(treatment.owner)
                continue
            reference = self._was_fused[position]
            before = None if reference is None else reference()
            if before is None or before.superseded or head.weight_input is None:
                continue
            weight = inputs[head.weight_input]
            if weight.requires_grad and owner_of(weight) is None:
                known = self._strangers.get(weight) == before.key  # type: ignore[no-untyped-call]
                if known or before.replaced_by_unowned:
                    continue
                if in_a_module(before.param):
                    self._strangers[weight] = before.key
                    continue
                before.notice_replacement(weight)
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"elmo_compile: the head weight {before.name} was updated inside "
                        "backward() until now, but this call uses a Parameter that no "
                        "elmo_compile optimizer owns, and no module has the former one any more "
                        "(load_state_dict(assign=True)?). It gets an ordinary gradient; construct "
                        "the optimizer again if it is to be trained",
                        stacklevel=3,
                    )


def give_name(owner: Owner, name: str) -> None:
    """Call a weight by its qualified name, if its optimizer has only a number for it."""
    if not name or not owner.name.startswith("#"):
        return
    number = owner.name.partition(" ")[0]
    taken = any(other.name == name and not other.superseded for other in live_owners())
    owner.name = f"{name} ({number})" if taken else name


def _weights(head: PlannedHead) -> list[int]:
    """Where a head's weight enters the graph, or what it is computed from."""
    if head.weight_input is not None:
        return [head.weight_input]
    region = head.match.region
    return weight_inputs(region.site, region.seed, region.num_outputs)


def _owner(head: PlannedHead, weight: Tensor, inputs: Sequence[Any]) -> tuple[Owner | None, str]:
    """Who updates a head's weight in this call, or why nobody does."""
    owner = owner_of(weight)
    if owner is None:
        return None, NOT_OWNED if weight.is_leaf else "the weight is computed, in an earlier graph"
    for reason, applies in _CALL_REASONS:
        if applies(weight):
            return None, reason
    if is_read_elsewhere(weight) and not owner.policy().at_step:
        return None, "the graph that made the logits also reads the weight (tied or shared)"
    if not head.shard:  # else its processes make one update of its gradients' mean
        reason = _data_parallel(weight, at_step=owner.policy().at_step)
        if reason:
            return None, reason
    storage = _storage(local_of(weight))
    for position, other in enumerate(inputs):
        if position == head.weight_input or not isinstance(other, Tensor):
            continue
        if storage and _storage(other) == storage:
            return None, "another input of the graph shares the weight's memory"
    return owner, ""


def _device_of(head: PlannedHead, inputs: Sequence[Any]) -> torch.device:
    """Where a sharded head is; any device for another one."""
    position = head.weight_input
    return torch.device("cpu") if position is None else inputs[position].device


def _check_usable(head: PlannedHead, treatment: Treatment, inputs: Sequence[Any]) -> None:
    """Raise FusedUpdateError where a head must not be called: its weight is half updated. Not while
    compiling: Dynamo would keep it."""
    if treatment.owner is not None:
        treatment.owner.check_consistent()
    elif head.weight_input is not None:
        known = owner_of(inputs[head.weight_input])
        if known is not None:
            known.check_consistent()


def _data_parallel(weight: Tensor, *, at_step: bool) -> str:
    """Why DistributedDataParallel keeps this weight from being fused in this call; or nothing."""
    wrapper = wrapper_of(weight)
    if wrapper is None:
        return ""
    if not at_step:
        return (
            "DistributedDataParallel must see the gradient (use update_at='step', or fused=False)"
        )
    if any(param is weight for param in wrapper._module_parameters):
        return (
            "DistributedDataParallel reduces the weight's gradient: call "
            "elmo_compile.distributed.ignore_heads(model) before wrapping the model"
        )
    return ""


_CALL_REASONS: tuple[tuple[str, Callable[[Tensor], bool]], ...] = (
    ("gradients are off", lambda weight: not torch.is_grad_enabled()),
    (FROZEN, lambda weight: not weight.requires_grad),
    ("the weight is not contiguous", lambda weight: not weight.is_contiguous()),
    ("the weight has gradient hooks, which would see no gradient", hooked),
    ("the weight is an inference tensor", lambda weight: weight.is_inference()),
)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0  # Wrapper subclasses and fake tensors have no storage to share.
