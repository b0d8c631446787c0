"""Small tokenizers with chat templates of the structure that Qwen2.5-Math and Llama 3.2 have.

The templates are written for the tests. Qwen's puts in a system message of its own where there is none; Llama's always
writes a system part, and trims the messages. Each comes with and without the tag that opens the reasoning.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
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


def word_tokenizer(
    kind: str, *, words: tuple[str, ...] = (), added: tuple[str, ...] = (), special: tuple[str, ...] = ()
) -> Any:
    """Return a tokenizer without a chat template whose merges depend on the context, as those of real models do.

    kind: "bytes" is byte-level, as GPT-2 and Llama 3; "metaspace" puts a space before a text and drops it when it
    decodes, as Llama 2 and Gemma. words: texts that are one token each wherever they occur, longest first.
    added, special: added tokens, ordinary ones and special ones, which `skip_special_tokens` drops.
    """
    base = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
    space = "\u2581" if kind == "metaspace" else "\u0120"
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), space})
    vocabulary = {**base, **{character: i for i, character in enumerate(alphabet, len(base))}}
    merges = []
    for word in words:
        pieces = word.replace(" ", space).replace("\n", "\u010a" if kind == "bytes" else "\n")
        for character in pieces:
            vocabulary.setdefault(character, len(vocabulary))
        for end in range(2, len(pieces) + 1):
            pair = (pieces[: end - 1], pieces[end - 1])
            if pair not in merges:
                merges.append(pair)
            vocabulary.setdefault(pieces[:end], len(vocabulary))
    bare = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if kind == "metaspace":
        bare.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="always", split=False)
        bare.decoder = decoders.Metaspace(replacement=space, prepend_scheme="always", split=False)
    else:
        bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bare.decoder = decoders.ByteLevel()
    bare.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    bare.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*base, *special)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def with_affixes(tokenizer: Any, template: str) -> Any:
    """Return the tokenizer with a post-processor, such as `<s> $A </s>` of one with `add_eos_token`."""
    named = [(word, tokenizer.convert_tokens_to_ids(word)) for word in set(template.split()) - {"$A"}]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return tokenizer
