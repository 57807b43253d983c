"""Train a small Llama with a large vocabulary: its logits never exist.

    python examples/language_model.py                        # 64 000 words, head updated in place
    python examples/language_model.py --optimizer torch      # any optimizer: chunked only

The model is built from a configuration (nothing is downloaded) and learns to copy: the second half
of a sequence repeats the first. Its forward returns loss and logits, as every Hugging Face model's
does; the compiled step returns the loss alone, so that nobody needs the logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import elmo_compile as elmo

BATCH, HALF = 8, 16
USED_WORDS = 50
"""Words that occur in the sequences, so that a short run has something to learn."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, printing the loss, and compare the head's memory with that of its logits."""
    options = parse(arguments)
    console = Console()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2 * HALF,
            tie_word_embeddings=False,  # a tied head has a second reader and cannot be fused
        )
    )

    def loss_of(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    step = torch.compile(loss_of, backend="elmo")
    optimizers = make_optimizers(model, fused=options.optimizer == "elmo")
    first = last = float("nan")
    for number in track(range(options.steps), "training", console=console, transient=True):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = step(copying_task())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        last = loss.item()
        first = last if number == 0 else first
    console.print(f"loss {first:.3f} -> {last:.3f}", highlight=False)
    weight, logits = model.lm_head.weight, 4 * BATCH * 2 * HALF * options.vocabulary
    console.print(f"head: fused update {elmo.is_fused(weight)}", highlight=False)
    console.print(f"      weight {weight.nbytes / 2**20:.0f} MiB, gradient {gradient(weight)}")
    console.print(f"      logits that were not made {logits / 2**20:.0f} MiB", highlight=False)


def make_optimizers(model: LlamaForCausalLM, *, fused: bool) -> list[torch.optim.Optimizer]:
    """AdamW for the body; for the head plain SGD with a rate of its own, or AdamW as well."""
    if not fused:
        return [torch.optim.AdamW(model.parameters(), lr=3e-3)]
    head = list(model.lm_head.parameters())
    return [
        elmo.optim.SGD(head, lr=2.0),
        torch.optim.AdamW(model.model.parameters(), lr=3e-3),
    ]


def copying_task() -> Tensor:
    """int64 [BATCH, 2 HALF]: random words, twice."""
    half = torch.randint(0, USED_WORDS, (BATCH, HALF))
    return torch.cat([half, half], dim=1)


def gradient(weight: Tensor) -> str:
    return "none" if weight.grad is None else f"{weight.grad.nbytes / 2**20:.0f} MiB"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vocabulary", type=int, default=64_000, metavar="L", help="words (default %(default)s)")
    add("--steps", type=int, default=40, metavar="N", help="batches of 8 (default %(default)s)")
    add("--optimizer", choices=("elmo", "torch"), default="elmo", help="of the head")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
