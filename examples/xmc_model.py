"""The classifier that train_xmc.py and compare_precision.py train, and one training step of it.

Hashed words -> EmbeddingBag -> a linear head with one output a label -> binary cross entropy,
summed over labels. The head is the part that grows with the number of labels: it is what the
`elmo` backend rewrites, and the only part that is stored in bf16 or fp8.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from xmc_data import Batch, Dataset, Part, batches, log_odds

import elmo_compile as elmo
from elmo_compile.metrics import RankingMetrics, inverse_propensity

HeadDtype = Literal["float32", "bfloat16", "float8_e4m3fn"]
Rounding = Literal["stochastic", "nearest"]
Backend = Literal["elmo", "inductor", "eager"]
LossValue = Literal["exact", "deferred"]

KS = (1, 3, 5)
EVALUATION_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the outcome of a run on given data."""

    head_dtype: HeadDtype = "float8_e4m3fn"
    """How the head's weight is stored; there is no other copy of it."""
    rounding: Rounding = "stochastic"
    """How an updated weight is rounded to a bf16 or fp8 head."""
    backend: Backend = "elmo"
    loss_value: LossValue = "deferred"
    """When the elmo backend computes the loss: in forward, or for less work in backward."""
    epochs: int = 4
    batch_size: int = 256
    dim: int = 256
    """Features of a point: columns of the head's weight."""
    head_lr: float = 1.0
    encoder_lr: float = 0.05
    """Both rates fall linearly to 0. An encoder rate of 0 leaves the encoder as it is."""
    seed: int = 0


class TextClassifier(nn.Module):
    """An embedding of each hashed word, summed over a text, and one logit a label."""

    def __init__(self, num_features: int, dim: int, bias_L: Tensor) -> None:
        super().__init__()
        self.encoder = nn.EmbeddingBag(num_features, dim, mode="sum", sparse=True)
        self.head = nn.Linear(dim, len(bias_L))
        nn.init.normal_(self.encoder.weight, std=0.2)
        nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            self.head.bias.copy_(bias_L)

    @torch.compiler.disable  # torch.compile has no sparse gradients: these stay eager
    def encode(self, batch: Batch) -> Tensor:
        """Features [N, D] of a batch."""
        x_ND = self.encoder(batch.words, batch.offsets, per_sample_weights=batch.weights)
        # Only N varies. Unsaid, torch.compile takes two equal sizes (N = D = 256) for one symbol
        # and compiles again for the last, smaller batch.
        torch._dynamo.mark_static(x_ND, 1)
        return x_ND

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a batch: binary cross entropy, summed over labels, mean over points."""
        features_ND = self.encode(batch)
        logits_NL = self.head(features_ND)
        target_NL = elmo.multi_hot(
            batch.labels, self.head.out_features, offsets=batch.label_offsets
        )
        loss = F.binary_cross_entropy_with_logits(logits_NL, target_NL, reduction="sum")
        return loss / logits_NL.shape[0]


class Trainer:
    """A model, its compiled form, its two optimizers and their falling learning rates."""

    def __init__(self, settings: Settings, data: Dataset, *, total_steps: int) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        bias_L = torch.from_numpy(log_odds(data.label_counts(), len(data.train)))
        self.model = TextClassifier(data.num_features, settings.dim, bias_L)
        dtype = getattr(torch, settings.head_dtype)
        if dtype != torch.float32:
            elmo.convert_head(self.model, dtype=dtype, name="head")
        self.optimizers = [self.head_optimizer()]
        if settings.encoder_lr > 0:
            encoder = list(self.model.encoder.parameters())
            self.optimizers.append(torch.optim.SparseAdam(encoder, lr=settings.encoder_lr))
        else:
            self.model.encoder.requires_grad_(False)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda step: max(0.0, 1 - step / total_steps))
            for o in self.optimizers
        ]
        self.compiled_model = self._compiled()

    def head_optimizer(self) -> torch.optim.Optimizer:
        """Plain SGD. With the elmo backend the head's update happens inside `backward()`."""
        s, parameters = self.settings, self.model.head.parameters()
        if s.backend != "elmo" and s.head_dtype == "float32":
            return torch.optim.SGD(parameters, lr=s.head_lr)
        fused = s.backend == "elmo"
        return elmo.optim.SGD(
            parameters, lr=s.head_lr, rounding=s.rounding, seed=s.seed, fused=fused
        )

    def _compiled(self) -> nn.Module:
        """The model as it trains; `dynamic`, since each batch has another number of labels."""
        if self.settings.backend == "eager":
            return self.model
        options = None
        if self.settings.backend == "elmo":
            num_labels = self.model.head.out_features
            options = {"loss_value": self.settings.loss_value, "min_outputs": num_labels}
        return torch.compile(
            self.model, backend=self.settings.backend, options=options, dynamic=True
        )

    def step(self, batch: Batch) -> float:
        """Train on one batch; its loss, before the update."""
        loss = self.compiled_model(batch)
        loss.backward()
        for optimizer, schedule in zip(self.optimizers, self.schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, for `torch.save`."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedules": [s.state_dict() for s in self.schedules],
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        for name in ("optimizers", "schedules"):
            for mine, saved in zip(getattr(self, name), state[name], strict=True):
                mine.load_state_dict(saved)
        torch.set_rng_state(state["rng"])


def data_order(settings: Settings, epoch: int, num_points: int) -> np.ndarray:
    """The order of the training points in an epoch: a function of seed and epoch alone."""
    return np.random.default_rng([settings.seed, epoch]).permutation(num_points)


def steps_per_epoch(settings: Settings, num_points: int) -> int:
    """Batches in an epoch, the last one perhaps smaller."""
    return -(-num_points // settings.batch_size)


@torch.no_grad()
def rank(model: TextClassifier, part: Part, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best labels of each point, best first, and their probabilities; [N, k] each."""
    labels, probabilities = [], []
    for batch in batches(part, np.arange(len(part)), EVALUATION_BATCH):
        top = elmo.topk(model.encode(batch), model.head.weight, k, bias=model.head.bias)
        labels.append(top.indices.numpy())
        probabilities.append(top.values.sigmoid().numpy())
    return np.concatenate(labels), np.concatenate(probabilities)


def score(topk_indices: np.ndarray, part: Part, data: Dataset) -> dict[str, float]:
    """P@k, nDCG@k, R@k and PSP@k of a ranking, propensities from the training part."""
    inverse_L = inverse_propensity(data.label_counts(), len(data.train))
    metrics = RankingMetrics(ks=KS, inverse_propensity=inverse_L)
    metrics.update(topk_indices, part.targets())
    return metrics.compute()


def peak_memory_bytes() -> int:
    """The most memory this process ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
