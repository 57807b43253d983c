"""See what the elmo backend would do to a model, and what it did: report and graphs.

python examples/inspect_graph.py                    # a model whose head is rewritten
python examples/inspect_graph.py --dump inspected   # ... and its graphs as files
python examples/inspect_graph.py --refused          # one whose head is left alone, and why
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.syntax import Syntax
from torch import Tensor, nn

import elmo_compile as elmo

BATCH, FEATURES, LABELS = 32, 64, 100_000


class Classifier(nn.Module):
    """A small encoder, a head of 100 000 labels, and the loss in forward."""

    def __init__(self, *, reads_logits: bool) -> None:
        super().__init__()
        self.reads_logits = reads_logits
        self.encoder = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(FEATURES, LABELS)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean binary cross entropy; a median needs all logits at once."""
        logits = self.head(self.encoder(x))
        loss = F.binary_cross_entropy_with_logits(logits, elmo.multi_hot(labels, LABELS))
        return loss + 1e-3 * logits.median() if self.reads_logits else loss


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain the model without running it, then train a step of it and look again."""
    options = parse(arguments)
    console = Console()
    torch.manual_seed(0)
    model = Classifier(reads_logits=options.refused)
    batch = torch.randn(BATCH, FEATURES), torch.randint(0, LABELS, (BATCH, 3))

    console.rule("before anything runs: elmo.explain")
    report = elmo.explain(model, *batch)
    console.print(str(report), highlight=False, markup=False)
    for name, graph in (("before", report.graph_before), ("after", report.graph_after)):
        if graph is not None:
            console.rule(f"graph {name}")
            code = graph.print_readable(print_output=False)
            console.print(Syntax(code, "python", word_wrap=True))
    if options.dump:
        console.print(f"wrote {report.dump(options.dump)}", highlight=False)

    console.rule("after a step: elmo.last_report")
    optimizer = elmo.optim.SGD(model.parameters(), lr=0.1, fused=not options.refused)
    loss = torch.compile(model, backend="elmo")(*batch)
    loss.backward()
    optimizer.step()
    console.print(str(elmo.last_report()), highlight=False, markup=False)
    gradient = "has a gradient" if model.head.weight.grad is not None else "has no gradient"
    console.print(f"loss {loss.item():.4f}; the head's weight {gradient}", highlight=False)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write report and graphs there")
    parser.add_argument("--refused", action="store_true", help="let something else read the logits")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
