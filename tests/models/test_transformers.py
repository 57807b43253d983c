"""Models nobody here wrote: transformers architectures with 40 000 outputs, nothing downloaded.

Each is rewritten; loss, every gradient and the logits are eager's.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import elmo_compile as elmo
from elmo_compile.deferred import Deferred
from elmo_compile.errors import FusedUpdateError
from elmo_compile.report import store

L = 40_000
OPTIONS = {"lower": "eager"}
DECODER = {
    "vocab_size": L,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": L,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT = {"vocab_size": L, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
       "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1,
       "eos_token_id": 2}  # fmt: skip
FEW_WORDS = {**ENCODER, "vocab_size": 100, "num_labels": L}


def decoder(config: Any, **more: Any) -> Any:
    return config(**{**DECODER, **more})


MODELS: dict[str, Callable[[], Any]] = {
    "LlamaForCausalLM": lambda: T.LlamaForCausalLM(decoder(T.LlamaConfig)),
    "MistralForCausalLM": lambda: T.MistralForCausalLM(decoder(T.MistralConfig)),
    "Qwen2ForCausalLM": lambda: T.Qwen2ForCausalLM(decoder(T.Qwen2Config)),
    "Qwen3ForCausalLM": lambda: T.Qwen3ForCausalLM(decoder(T.Qwen3Config, head_dim=8)),
    "GemmaForCausalLM": lambda: T.GemmaForCausalLM(decoder(T.GemmaConfig, head_dim=8)),
    "Gemma2ForCausalLM": lambda: T.Gemma2ForCausalLM(decoder(T.Gemma2Config, head_dim=8)),
    "Gemma3ForCausalLM": lambda: T.Gemma3ForCausalLM(decoder(T.Gemma3TextConfig, head_dim=8)),
    "Phi3ForCausalLM": lambda: T.Phi3ForCausalLM(decoder(T.Phi3Config)),
    "GraniteForCausalLM": lambda: T.GraniteForCausalLM(
        decoder(T.GraniteConfig, logits_scaling=8.0)
    ),
    "CohereForCausalLM": lambda: T.CohereForCausalLM(decoder(T.CohereConfig)),
    "Olmo2ForCausalLM": lambda: T.Olmo2ForCausalLM(decoder(T.Olmo2Config)),
    "GPT2LMHeadModel": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT)),
    "GPTNeoXForCausalLM": lambda: T.GPTNeoXForCausalLM(decoder(T.GPTNeoXConfig)),
    "GPTJForCausalLM": lambda: T.GPTJForCausalLM(T.GPTJConfig(rotary_dim=8, **GPT)),
    "OPTForCausalLM": lambda: T.OPTForCausalLM(
        decoder(T.OPTConfig, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    ),
    "BloomForCausalLM": lambda: T.BloomForCausalLM(
        T.BloomConfig(vocab_size=L, hidden_size=32, n_layer=2, n_head=4)
    ),
    "MixtralForCausalLM": lambda: T.MixtralForCausalLM(
        decoder(T.MixtralConfig, num_local_experts=2)
    ),
    "DeepseekV3ForCausalLM": lambda: T.DeepseekV3ForCausalLM(
        decoder(
            T.DeepseekV3Config,
            moe_intermediate_size=16,
            num_key_value_heads=4,
            n_group=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        )
    ),
    "MambaForCausalLM": lambda: T.MambaForCausalLM(
        T.MambaConfig(vocab_size=L, hidden_size=32, state_size=4, num_hidden_layers=2)
    ),
    "BertForMaskedLM": lambda: T.BertForMaskedLM(T.BertConfig(**ENCODER)),
    "RobertaForMaskedLM": lambda: T.RobertaForMaskedLM(T.RobertaConfig(**ENCODER)),
    "DistilBertForMaskedLM": lambda: T.DistilBertForMaskedLM(
        T.DistilBertConfig(
            vocab_size=L,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            dropout=0.0,
            attention_dropout=0.0,
        )
    ),
    "ModernBertForMaskedLM": lambda: T.ModernBertForMaskedLM(
        T.ModernBertConfig(
            vocab_size=L,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
    "T5ForConditionalGeneration": lambda: T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=L,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    ),
    "BartForConditionalGeneration": lambda: T.BartForConditionalGeneration(
        T.BartConfig(
            vocab_size=L,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            decoder_ffn_dim=48,
            dropout=0.0,
            max_position_embeddings=64,
        )
    ),
    "BertForSequenceClassification, one label": lambda: T.BertForSequenceClassification(
        T.BertConfig(**FEW_WORDS, problem_type="single_label_classification")
    ),
    "BertForSequenceClassification, many labels": lambda: T.BertForSequenceClassification(
        T.BertConfig(**FEW_WORDS, problem_type="multi_label_classification")
    ),
}

GRAPH_BREAKS = {"GPT2LMHeadModel"}
"""transformers logs a warning between head and loss: the loss is in a graph of its own."""


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    store.clear()
    T.logging.set_verbosity_error()


def inputs(name: str) -> dict[str, Tensor]:
    labels = torch.randint(0, L, (2, 12))
    labels[0, :3] = -100
    if name.endswith("one label"):
        labels = torch.randint(0, L, (2,))
    elif name.endswith("many labels"):
        labels = (torch.rand(2, L) < 1e-3).float()
    return {"input_ids": torch.randint(3, 100, (2, 12)), "labels": labels}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(MODELS))
def test_architecture(name: str) -> None:
    model = MODELS[name]().train()
    twin, given = copy.deepcopy(model), inputs(name)
    theirs = twin(**given)
    theirs.loss.backward()
    mine = torch.compile(model, backend="elmo", options=OPTIONS)(**given)
    assert isinstance(mine.logits, Deferred)
    mine.loss.backward()
    losses = {match.loss for report in elmo.reports() for match in report.matches}
    expected = "binary_cross_entropy_with_logits" if "many" in name else "cross_entropy"
    assert expected in losses
    assert not [str(r) for report in elmo.reports() for r in report.refusals]
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=1e-5, atol=0)
    largest = max(float(p.grad.norm()) for p in twin.parameters() if p.grad is not None)
    for (label, one), other in zip(model.named_parameters(), twin.parameters()):
        assert (one.grad is None) == (other.grad is None), label
        if other.grad is not None:
            # Some are zero but for rounding: the bias of keys in an attention.
            error = float((one.grad - other.grad).norm())
            assert error <= 1e-4 * float(other.grad.norm()) + 1e-6 * largest, label
    assert (mine.logits._state.values is not None) == (name in GRAPH_BREAKS)
    torch.testing.assert_close(mine.logits + 0, theirs.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("remedy", [False, True])
def test_what_the_report_says_of_gpt2(remedy: bool) -> None:
    T.modeling_utils.logger.warning_once.cache_clear()
    model = MODELS["GPT2LMHeadModel"]().train()
    if remedy:
        model.loss_type = "ForCausalLM"
    given = inputs("GPT2LMHeadModel")
    (explained, *_) = elmo.explain(model, **given, options=OPTIONS).matches
    assert ("loss = self.loss_function(" in explained.graph_break) == (not remedy)
    run = torch.compile(model, backend="elmo", options=OPTIONS)
    for _ in range(2):
        run(**given).loss.backward()
    matches = [match for report in elmo.reports() for match in report.matches]
    assert sum(n for match in matches for n in match.made.values()) == (0 if remedy else 2)


def test_the_table_in_the_docs_is_this_grid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]+)` \| (yes|no) ", text, flags=re.MULTILINE)
    assert [name for name, _ in listed] == list(MODELS)
    for name, tied in listed:
        model = MODELS[name]()
        head = model.get_output_embeddings()
        shared = head is not None and head.weight is model.get_input_embeddings().weight
        assert shared == (tied == "yes"), name


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_with_a_fused_update() -> None:
    """Untied head, elmo_compile.optim: three steps as with torch.optim.SGD in eager."""
    model = MODELS["LlamaForCausalLM"]()
    twin, given = copy.deepcopy(model), inputs("")
    mine = elmo.optim.SGD(model.parameters(), lr=0.5)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.5)
    step: Any = torch.compile(model, backend="elmo", options=OPTIONS)
    for _ in range(3):
        results = []
        for run, opt in ((step, mine), (twin, theirs)):
            out = run(**given)
            out.loss.backward()
            opt.step()
            opt.zero_grad()
            results.append((out.loss.detach(), out.logits.argmax(-1)))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
        assert torch.equal(results[0][1], results[1][1])
    assert model.lm_head.weight.grad is None
    (match,) = elmo.last_report().matches
    assert match.fused_update
    torch.testing.assert_close(model.lm_head.weight, twin.lm_head.weight, rtol=1e-4, atol=1e-6)


def test_generate() -> None:
    """Each step reads the last row of the logits."""
    model = MODELS["LlamaForCausalLM"]().eval()
    prompt = torch.randint(3, 100, (1, 4))
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False)
    model.forward = torch.compile(model.forward, backend="elmo", options=OPTIONS)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)
    assert any(match.deferred for report in elmo.reports() for match in report.matches)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.tokens = torch.randint(3, 100, (8, 8))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@pytest.mark.filterwarnings("ignore")
def test_trainer(tmp_path: Path) -> None:
    """`torch_compile_backend="elmo"`: it trains, and its metrics get the logits."""
    seen: list[tuple[int, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        best = prediction.predictions[:, :-1].argmax(-1)
        return {"accuracy": float((best == prediction.label_ids[:, 1:]).mean())}

    arguments = T.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3,
        learning_rate=1e-2, torch_compile=True, torch_compile_backend="elmo", report_to=[],
        use_cpu=True, logging_steps=1, save_strategy="no", eval_strategy="epoch",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = T.Trainer(
        model=MODELS["LlamaForCausalLM"](), args=arguments, train_dataset=Rows(),
        eval_dataset=Rows(), compute_metrics=metrics,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert float(losses[-1]) < float(losses[0]) - 0.5
    assert seen[0] == (8, 8, L)
    assert {m.loss for r in elmo.reports() for m in r.matches} == {"cross_entropy"}


def test_trainer_under_bf16_autocast(tmp_path: Path) -> None:
    """accelerate casts what the model returns to float32, outside of its autocast."""
    arguments = T.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, bf16=True,
        torch_compile=True, torch_compile_backend="elmo", report_to=[], use_cpu=True,
        logging_steps=1, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
    )  # fmt: skip
    model = MODELS["LlamaForCausalLM"]()
    optimizer = elmo.optim.SGD(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = T.Trainer(
        model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, schedule)
    )
    trainer.train()
    (match,) = elmo.last_report().matches
    assert match.loss == "cross_entropy"
    assert match.fused_update
    assert match.deferred
    assert not match.made


@pytest.mark.parametrize("micro", [1, 2])
def test_trainer_with_our_optimizer(tmp_path: Path, micro: int) -> None:
    """`Trainer(optimizers=...)`: scheduler, gradient accumulation and clipping by `max_norm`."""
    finals = []
    for fused in (True, False):
        torch._dynamo.reset()
        arguments = T.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2,
            torch_compile=True, torch_compile_backend="elmo", report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=micro, seed=0,
            max_grad_norm=0.0,  # clipping is the optimizer's: it sees the head
        )  # fmt: skip
        torch.manual_seed(0)
        model = MODELS["LlamaForCausalLM"]()
        optimizer = elmo.optim.AdamW(
            model.parameters(), 1e-2, update_at="step", accumulate="stash", max_norm=0.5,
            fused=fused,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        trainer = T.Trainer(
            model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, schedule)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        assert bool(optimizer.fused_parameters()) == fused
        finals.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][name], rtol=1e-3, atol=2e-4, msg=name)


def test_trainer_s_own_clipping_says_what_to_do(tmp_path: Path) -> None:
    arguments = T.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1,
        torch_compile=True, torch_compile_backend="elmo", report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = MODELS["LlamaForCausalLM"]()
    optimizer = elmo.optim.SGD(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = T.Trainer(
        model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, schedule)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(FusedUpdateError, match="max_norm="):
            trainer.train()
