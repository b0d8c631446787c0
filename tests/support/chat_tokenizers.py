"""Small tokenizers with chat templates of the structure that Qwen2.5-Math and Llama 3.2 have.

The templates are written for the tests. Qwen's puts in a system message of its own where there is none; Llama's always
writes a system part, and trims the messages. Each comes with and without the tag that opens the reasoning.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_QWEN = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}"
    "{%- endif -%}{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\nOPENING' -}}{%- endif -%}"
)
_LLAMA = (
    "{{- bos_token -}}{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] | trim -%}"
    "{%- set messages = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- endif -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n' + system + '<|eot_id|>' -}}"
    "{%- for message in messages -%}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}"
    "{{- message['content'] | trim + '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\nOPENING' -}}{%- endif -%}"
)
TEMPLATES = {
    "qwen": _QWEN.replace("OPENING", ""),
    "qwen-think": _QWEN.replace("OPENING", "<think>\\n"),
    "llama": _LLAMA.replace("OPENING", ""),
    "llama-think": _LLAMA.replace("OPENING", "<think>"),
}
SPECIAL = {
    "qwen": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|eot_id|>"),
}


def chat_tokenizer(name: str, *, extra: tuple[str, ...] = ()) -> Any:
    """Return a tokenizer of single bytes with the chat template `name` of TEMPLATES.

    extra: special tokens with the highest ids.
    """
    special = SPECIAL[name.partition("-")[0]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token=special[0],
        eos_token=special[-1],
        pad_token=special[-1],
        extra_special_tokens=[*special[1:-1], *extra],
    )
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer
