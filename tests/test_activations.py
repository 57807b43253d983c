"""What is kept for the backward beside a rewritten head, and that gradients do not change."""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from elmo_compile import activations
from elmo_compile.testing.memory import allocated_peak

settings: Any = config
ROWS, FEATURES, INNER, LABELS = 1024, 64, 1024, 20_000
OPTIONS = {"min_outputs": 10_000}


class Layers(nn.Module):
    """What a transformer's layers do to each token, and a head.

    Args:
        features: of a token between layers.
        inner: within them.
        stream: what a layer makes is added to what it is given, and normalized.
        dropout: of what a layer makes.
        regions: each layer is checkpointed.
    """

    def __init__(
        self, features: int, inner: int, layers: int, *,
        stream: bool = True, dropout: float = 0.0, regions: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(features, inner) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(inner, features) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(layers * stream))
        self.head = nn.Linear(features, LABELS)
        self.dropout, self.regions = dropout, regions

    def layer(self, i: int, x: Tensor) -> Tensor:
        made: Tensor = self.down[i](F.gelu(self.up[i](x)))
        made = F.dropout(made, self.dropout)
        return self.norms[i](x + made) if self.norms else made

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for i in range(len(self.up)):
            layer = functools.partial(self.layer, i)
            x = checkpoint(layer, x, use_reentrant=False) if self.regions else layer(x)
        return F.cross_entropy(self.head(x[:4]), y)


def batch(rows: int = ROWS, features: int = FEATURES) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, features), torch.randint(0, LABELS, (4,))


def peak_and_gradients(
    model: Any, inputs: tuple[Tensor, Tensor], budget: float | None = None, **how: Any
) -> tuple[int, list[Tensor]]:
    """Peak bytes of a forward and a backward, and the gradients of the first ones."""
    torch._dynamo.reset()
    step = torch.compile(model, **{"backend": "elmo", "options": OPTIONS, **how})
    given = {} if budget is None else {"activation_memory_budget": budget}
    with config.patch(**given):
        torch.manual_seed(0)
        model.zero_grad()
        step(*inputs).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        return allocated_peak(lambda: step(*inputs).backward()), gradients


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_beside_a_head_few_activations_are_kept() -> None:
    """GELU's result is made again from its argument, which its gradient needs; not where no head
    was replaced, nor against a setting of the user's. Again and again: nothing is left set."""
    model, inputs = Layers(FEATURES, INNER, 4, stream=False), batch()
    name = "ban_recompute_materialized_backward"
    for _ in range(2):
        assert settings._is_default(name)
        few, gradients = peak_and_gradients(model, inputs)
    revert = settings._make_closure_patcher(**{name: True})()
    try:
        asked, same = peak_and_gradients(model, inputs)
    finally:
        revert()
    spared = ROWS * INNER * 4  # one of four: at the peak, the last layer's is there, and more
    assert few < asked - spared
    assert_close(gradients, same)
    untouched, _ = peak_and_gradients(model, inputs, options={"min_outputs": 30_000})
    inductor, _ = peak_and_gradients(model, inputs, backend="inductor", options=None)
    assert abs(untouched - inductor) < ROWS * INNER


@pytest.mark.parametrize(("dropout", "spared"), [(0.0, {0.5: 0.7}), (0.2, {0.7: 0.4, 0.3: 0.9})])
def test_an_activation_budget_takes_as_much_less_memory(
    dropout: float, spared: dict[float, float]
) -> None:
    """By torch's own way it takes more than without one: the stream between the layers is made
    again from the first for the last one's backward, and each part waits for its own layer's."""
    rows, features, layers = 4096, 64, 10
    model, inputs = Layers(features, features, layers, dropout=dropout), batch(rows, features)
    one = rows * features * 4  # of two that each layer keeps
    everything, expected = peak_and_gradients(model, inputs)
    for budget, share in spared.items():
        assert settings.activation_memory_budget == 1
        peak, gradients = peak_and_gradients(model, inputs, budget)
        assert_close(gradients, expected)
        assert peak < everything - share * layers * one, budget


class Counted(CustomGraphPass):
    """A pass of a user's."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> Any:
        return "counted"


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> list[set[Any]]:
    """The marks in each joint graph that was seen."""
    found: list[set[Any]] = []
    apply = activations.BeforePartition.__call__

    def looked(self: Any, graph: fx.Graph) -> None:
        apply(self, graph)
        found.append({node.meta.get("recompute") for node in graph.nodes} - {None})

    monkeypatch.setattr(activations.BeforePartition, "__call__", looked)
    return found


def compile_with(budget: float, *, regions: bool = False, **how: Any) -> None:
    model, inputs = Layers(16, 16, 3, regions=regions), batch(64, 16)
    with inductor_config.patch(fx_graph_cache=False), config.patch(enable_autograd_cache=False):
        peak_and_gradients(model, inputs, budget, **how)


def test_layers_are_marked_with_a_budget_alone(marked: list[set[Any]]) -> None:
    compile_with(1.0)
    assert marked == [set()]
    compile_with(0.5)
    assert marked[1:] == [{CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_SAVE}]
    marked.clear()
    compile_with(0.5, options={"min_outputs": 30_000})
    assert marked == []


def test_checkpointed_regions_are_the_users(marked: list[set[Any]]) -> None:
    plan = activations.layers_to_recompute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "layers_to_recompute", lambda *_: pytest.fail("looked for"))
        compile_with(0.5, regions=True)
    assert len(marked) == 1
    assert activations.layers_to_recompute is plan


@pytest.mark.parametrize("where", ["config", "options"])
def test_a_pass_of_the_users_runs_too(where: str, marked: list[set[Any]]) -> None:
    given = Counted()
    if where == "config":
        with inductor_config.patch(joint_custom_post_pass=given):
            compile_with(0.5)
    else:
        patches = {"joint_custom_post_pass": given}
        compile_with(0.5, options={**OPTIONS, "inductor": patches})
    assert given.calls == len(marked) == 1
    assert marked[0]


def test_caches_tell_budgets_and_passes_apart() -> None:
    made = functools.partial(activations.BeforePartition, settled=lambda: None)
    ids = {made(0.5).uuid(), made(0.4).uuid(), made(0.5, others=[Counted()]).uuid()}
    assert len(ids) == 3
    assert made(0.5).uuid() in ids
    assert made(0.5, others=[lambda graph: None]).uuid() is None


class Buffers(nn.Module):
    """Layers that read and write what they have seen before, as a queue or a codebook does.

    Args:
        silently: they write outside of autograd.
    """

    def __init__(self, *, silently: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, LABELS)
        self.register_buffer("seen", torch.ones(4, 16))
        self.silently = silently

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            h = layer(x) * self.seen[i].clone()
            x = x + torch.tanh(h * (1 + self.seen[i].clone().square()))
            with torch.set_grad_enabled(not self.silently):
                self.seen[i].mul_(1.5).add_(h.detach().mean(0))
        return F.cross_entropy(self.head(self.norm(x)[:4]), y)


@pytest.mark.parametrize("budget", [1.0, 0.5])
@pytest.mark.parametrize("silently", [True, False])
def test_what_the_forward_overwrites_is_kept(budget: float, silently: bool) -> None:
    """torch makes values again from a buffer's new value (pytorch/pytorch#197039)."""
    model, inputs = Buffers(silently=silently), batch(64, 16)
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for backend in ("eager", "elmo"):
        model.load_state_dict(begin)
        how = {"backend": backend, "options": OPTIONS if backend == "elmo" else None}
        _, gradients = peak_and_gradients(model, inputs, budget, **how)
        results.append([*gradients, *model.buffers()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


class Written(Layers):
    """Layers normalized by buffers (the spectral norm's vectors), of an input that the forward
    writes to."""

    def __init__(self) -> None:
        super().__init__(16, 32, 4)
        for layer in self.up:
            nn.utils.parametrizations.spectral_norm(layer)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x.clone()
        for i in range(len(self.up)):
            h = self.layer(i, torch.sin(h) * torch.cos(x.clone()))
            with torch.no_grad():
                x.mul_(1.1)
        return F.cross_entropy(self.head(h[:4]), y)


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_so_are_inputs(budget: float) -> None:
    model, (x, y) = Written(), batch(64, 16)
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    for backend in ("eager", "elmo"):
        model.load_state_dict(begin)
        how = {"backend": backend, "options": OPTIONS if backend == "elmo" else None}
        results.append(peak_and_gradients(model, (x.clone(), y), budget, **how)[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_caches_hold_what_the_pass_has_run_over() -> None:
    model, inputs = Layers(16, 16, 3), batch(64, 16)
    peak_and_gradients(model, inputs, 0.5)
    counters.clear()
    peak_and_gradients(model, inputs, 0.5)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    counters.clear()
    never_before = 0.3 + time.time_ns() % 10**9 / 10**10  # the caches are kept on disk
    peak_and_gradients(model, inputs, never_before)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 0


def joint_graph(layers: int, rows: int, stream: bool) -> fx.Graph:
    """Forward and the backward's begin of products one after the other, with fake values."""
    graph = fx.Graph()
    value = torch.empty(rows, 8)

    def node(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta["val"] = value
        return made

    x = graph.placeholder("primals_1")
    w = graph.placeholder("primals_2")
    tangent = graph.placeholder("tangents_1")
    aten = torch.ops.aten
    for _ in range(layers):
        inner = node(aten.relu.default, node(aten.mm.default, x, w))
        made = node(aten.mm.default, inner, w)
        x = node(aten.add.Tensor, x, made) if stream else made
    grad = node(aten.mul.Tensor, tangent, x)
    graph.output([x, grad])
    return graph


def test_layers_end_where_little_is_alive() -> None:
    layers = activations.layers_of(joint_graph(4, 100, stream=True), 2)
    assert [[end.name for end in layer.end] for layer in layers] == [
        ["add_tensor"], ["add_tensor_1"], ["add_tensor_2"], []
    ]  # fmt: skip
    assert [layer.made for layer in layers] == [2 * 100 * 8 * 4] * 4
    assert [layer.needs for layer in layers] == [0] + [100 * 8 * 4] * 3
    assert all(earlier.end == later.begin for earlier, later in itertools.pairwise(layers))
    longer = activations.layers_of(joint_graph(4, 100, stream=True), 4)
    assert [len(layer.nodes) for layer in longer] == [8, 8]


def test_a_graph_without_a_backward_has_no_layers() -> None:
    graph = joint_graph(4, 100, stream=True)
    graph.find_nodes(op="output")[0].args = ([next(reversed(graph.find_nodes(
        op="call_function", target=torch.ops.aten.add.Tensor)))],)  # fmt: skip
    for node in reversed(list(graph.nodes)):
        if node.target == torch.ops.aten.mul.Tensor or "tangents" in node.name:
            graph.erase_node(node)
    assert activations.layers_to_recompute(graph, 0.5) == []


@pytest.mark.parametrize("budget", [0.9, 0.5, 0.2, 0.01])
def test_the_first_layers_are_made_again(budget: float) -> None:
    graph = joint_graph(12, 100, stream=True)
    again = activations.layers_to_recompute(graph, budget)
    assert again
    assert again[0].begin == []
    everything = 12 * 2 * 100 * 8 * 4
    # The last layer has no end, and is kept.
    kept = everything - sum(layer.made - layer.needs for layer in again)
    if budget >= 0.5:
        assert budget - 0.1 < kept / everything < budget + 0.1
    longest = max(layer.made for layer in again)
    assert kept + longest <= everything
