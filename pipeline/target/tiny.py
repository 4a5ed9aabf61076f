"""A tiny random target, the same bit for bit everywhere, for tests and the smoke experiment.

Its weights are larger than a usual initialisation, so that its greedy text wanders instead of repeating a token, and
its distributions are neither flat nor certain (about 3 of 6 nats).
"""

from __future__ import annotations

import math
from pathlib import Path

VERSION = 3
VOCABULARY = 384
_EMBEDDING_STD = 0.35
_LINEAR_STD = 0.16

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = (
    "A draft proposes a block of tokens and the target verifies them all in one step. "
    "What is the sum of twelve and seven? The answer is nineteen. "
    "Write a short list of three fruits: apples, pears and plums. "
    "def add(a, b): return a + b. Explain why the sky is blue in one sentence. "
    "user assistant system please thank you hello world the of and to in is that it for on with as was "
)


def make_tiny(out: Path) -> None:
    """Writes a 4-layer Llama with a byte-level BPE tokenizer and a ChatML template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([_TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(20261)
    for name, weight in sorted(model.named_parameters()):
        if weight.dim() == 2:
            # Uniform from integers: torch's normal_ gives other bits on other CPU instruction sets.
            steps = torch.randint(-(1 << 23), 1 << 23, weight.shape, generator=generator)
            std = _EMBEDDING_STD if "embed" in name else _LINEAR_STD
            weight.data.copy_(steps.float() * (std * math.sqrt(3) / (1 << 23)))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
