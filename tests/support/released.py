"""Stand-ins of the released checkpoints and files: the same schema, tiny sizes, made on the spot.

As in the released LLaMA checkpoint, the tokenizer has one entry more than the embedding table has rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
COMPRESS_TOKEN = "<|compress_token|>"
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def problems(count: int) -> list[dict[str, str]]:
    """Return sums with a worked chain, in the columns of the released jsonl files."""
    rows = []
    for number in range(count):
        a, b, c = 2 + number % 7, 3 + number % 5, 1 + number % 3
        rows.append(
            {
                "problem": f"A box {number} has {a} red and {b} blue balls. {c} are added. How many balls are there?",
                "cot": f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}.",
                "cot_answer": f"The answer is \\boxed{{{a + b + c}}}.",
                "solution": f"{a + b + c}",
                "answer": f"{a + b + c}",
            }
        )
    return rows


def make_tokenizer(kind: str) -> Any:
    """Return a byte-level BPE tokenizer with the special tokens and the chat template of `kind`, "llama" or "qwen"."""
    special, template = (LLAMA_TOKENS, LLAMA_TEMPLATE) if kind == "llama" else (QWEN_TOKENS, QWEN_TEMPLATE)
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [INSTRUCTION, "</", "<think>", *(" ".join(row.values()) for row in problems(40))]
    bare.train_from_iterator(texts, trainer)
    eos = "<|eot_id|>" if kind == "llama" else "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=eos, pad_token=special[-1])
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": [COMPRESS_TOKEN]})
    return tokenizer


def save_checkpoint(folder: Path, kind: str) -> Path:
    """Write a random model of `kind` whose table lacks a row for the tokenizer's last entry. Return the folder."""
    tokenizer = make_tokenizer(kind)
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=len(tokenizer) - 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=6000,
        tie_word_embeddings=kind == "llama",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rl_file(path: Path, kind: str, count: int) -> Path:
    """Write the parquet file of an RL setting: the instruction in the user message (llama) or as system message."""
    records = []
    for index, row in enumerate(problems(count)):
        user = {"role": "user", "content": row["problem"]}
        messages = [{"role": "system", "content": INSTRUCTION}, user]
        if kind == "llama":
            messages = [{"role": "user", "content": f"{INSTRUCTION}\n{row['problem']}"}]
        extra = {"split": "train", "index": index, "answer": row["answer"], "question": row["problem"]}
        reward = {"style": "rule", "ground_truth": row["answer"]}
        records.append(
            {
                "data_source": "lighteval/MATH",
                "prompt": messages,
                "ability": "math",
                "reward_model": reward,
                "extra_info": extra,
            }
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write_jsonl(path: Path, rows: list[dict[str, str]], *names: str) -> Path:
    """Write the columns `names` of rows as JSON lines."""
    path.write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows))
    return path


def write_soft_labels(folder: Path, lengths: list[int], vocab: int, chunk: int = 5) -> Path:
    """Write random soft labels of 10 components as the released chunks `batch_START_END.pt`."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    labels = []
    for steps in lengths:
        probs = torch.rand(steps, 10, generator=generator).softmax(-1)
        ids = torch.stack([torch.randperm(vocab, generator=generator)[:10] for _ in range(steps)])
        labels.append((probs, ids))
    for start in range(0, len(labels), chunk):
        torch.save(labels[start : start + chunk], folder / f"batch_{start}_{min(start + chunk, len(labels))}.pt")
    return folder
