"""A TRL run small enough for a test; model, tokenizer and prompts are made in code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(96))]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w0"


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_prompts() -> list[str]:
    return [" ".join(f"w{(7 * i + j) % 96}" for j in range(2 + i % 4)) for i in range(12)]


def make_trainer(output_dir: Path, reward_funcs: Callable, **settings) -> GRPOTrainer:
    """Three steps of two groups of four; nothing is saved, reported or downloaded."""
    folder = output_dir / "model"  # on disk, because TRL loads the reference model from there
    make_model().save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = make_tokenizer()
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward_funcs(model, tokenizer),
        train_dataset=Dataset.from_list([{"prompt": p} for p in make_prompts()]),
        args=GRPOConfig(
            output_dir=str(output_dir), use_cpu=True, bf16=False, fp16=False, report_to="none",
            save_strategy="no", logging_steps=1, max_steps=3, seed=0, learning_rate=1e-2,
            per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
            beta=0.05, disable_tqdm=True, **settings,
        ),
    )  # fmt: skip


def train(output_dir: Path, reward_funcs: Callable, **settings) -> list[dict[str, float]]:
    """The log lines of the three steps."""
    trainer = make_trainer(output_dir, reward_funcs, **settings)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]
