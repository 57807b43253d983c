"""Recommend the next of 50 000 items: a softmax over all of them, with a bf16 head.

    python examples/recommender.py

Sessions are synthetic: items come in genres, a session stays in one. The mean of its items'
embeddings describes a session, the head scores every item (no negative sampling), and `elmo.topk`
recommends without a score matrix.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import elmo_compile as elmo
from elmo_compile.metrics import RankingMetrics, SparseTargets

ITEMS, GENRES, FEATURES = 50_000, 50, 64
BATCH, LENGTH = 128, 8
KS = (1, 10, 100)


class Recommender(nn.Module):
    """Mean of item embeddings -> one logit an item -> cross entropy with the item that followed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ITEMS, FEATURES)
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, ITEMS)

    def encode(self, sessions: Tensor) -> Tensor:
        """Features [N, D] of sessions, int64 [N, LENGTH]."""
        return self.norm(self.embedding(sessions).mean(1))

    def forward(self, sessions: Tensor, following: Tensor) -> Tensor:
        """Mean loss of the items that followed, int64 [N]."""
        return F.cross_entropy(self.head(self.encode(sessions)), following)


def sessions_of(genres: Tensor) -> tuple[Tensor, Tensor]:
    """Sessions of the given genres, int64 [N, LENGTH], and the item that follows each, [N].

    A genre's items are numbered together, and its first ten are drawn about every other time.
    """
    size = ITEMS // GENRES
    place = (torch.rand(len(genres), LENGTH + 1) ** 6 * size).long()
    items = genres[:, None] * size + place
    return items[:, :-1], items[:, -1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, then recommend for sessions that were not trained on."""
    options = parse(arguments)
    console = Console()
    torch.manual_seed(0)
    model = Recommender()
    elmo.convert_head(model, dtype=torch.bfloat16)
    body = [*model.embedding.parameters(), *model.norm.parameters()]
    optimizers = [
        elmo.optim.SGD(model.head.parameters(), lr=options.head_lr),
        torch.optim.Adam(body, lr=1e-2),
    ]
    compiled = torch.compile(model, backend="elmo")
    for number in track(range(options.steps), "training", console=console, transient=True):
        loss = compiled(*sessions_of(torch.randint(0, GENRES, (BATCH,))))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if number % 20 == 0 or number + 1 == options.steps:
            console.print(f"step {number:4d}  loss {loss.item():.3f}", highlight=False)

    genres = torch.arange(GENRES).repeat_interleave(10)
    sessions, following = sessions_of(genres)
    with torch.no_grad():
        features = model.encode(sessions)
        best = elmo.topk(features, model.head.weight, max(KS), bias=model.head.bias)
    metrics = RankingMetrics(ks=KS)
    metrics.update(best.indices, SparseTargets.from_rows(following[:, None].tolist()))
    recalls = "  ".join(f"R@{k} {100 * metrics.compute()[f'R@{k}']:.1f} %" for k in KS)
    same = (best.indices[:, :10] // (ITEMS // GENRES) == genres[:, None]).float()
    console.print(f"next item: {recalls}", highlight=False)
    console.print(f"of the genre: {100 * same.mean():.1f} % of the first 10", highlight=False)
    console.print(f"session {sessions[7].tolist()}", highlight=False)
    console.print(f"recommended {best.indices[7, :8].tolist()}", highlight=False)


def parse(arguments: Sequence[str] | None, description: str | None = __doc__) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=100, metavar="N", help="batches of 128 (default %(default)s)")
    add("--head-lr", type=float, default=4.0, metavar="RATE", help="SGD's (default %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
