"""Prompt formats: the text and the token ids with which a question is put to a model.

A format is made of parts: an instruction, a suffix, the chat template or a text around the question, and the text that
opens the reasoning. `FORMATS` names the formats of the paper's released code. A model is saved with the format that it
was trained with, because it answers worse in any other.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers.utils import cached_file

from latent_grpo.config import PromptOptions
from latent_grpo.errors import ConfigError, DataError, ModelError, first_line, require

FORMAT_FILE = "prompt_format.json"  # beside the weights
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER_SUFFIX = "\nPlease provide the option letter (A, B, C, or D) as your final answer."
# Arguments of the chat template that a prompt sets itself.
_FIXED_ARGUMENTS = ("conversation", "messages", "tokenize", "add_generation_prompt", "return_dict", "return_tensors")
BATCH = 1000  # prompts that are tokenised in one call

Message = dict[str, str]
Prompt = str | Sequence[Mapping[str, str]]  # a question, or chat messages


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is put to the model. The fields are options of the same names, with what applies by default.

    Raises ConfigError for parts of another type, and for parts that do not go together.
    """

    instruction: str = ""
    instruction_role: Literal["user", "system"] = "user"
    prompt_suffix: str = ""
    opening_marker: str = ""
    end_marker: str = "</think>"
    chat_template: bool | None = None  # None: if the tokenizer has one
    prompt_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("instruction", "prompt_suffix", "opening_marker", "end_marker"):
            require(isinstance(getattr(self, name), str), name, getattr(self, name), "give a text")
        role, switch = self.instruction_role, self.chat_template
        require(role in ("user", "system"), "instruction_role", role, "choose from user, system")
        require(switch is None or isinstance(switch, bool), "chat_template", switch, "give true or false")
        require(isinstance(self.prompt_template, str | None), "prompt_template", self.prompt_template, "give a text")
        given = self.chat_template_kwargs
        require(isinstance(given, dict), "chat_template_kwargs", given, "give a mapping")
        self.check_template()

    def check_template(self) -> None:
        """Raise ConfigError if the text around a prompt and the options of the chat template do not go together."""
        template, arguments, off = self.prompt_template, self.chat_template_kwargs, self.chat_template is False
        require(template is None or off, "prompt_template", template, "it needs --chat_template false")
        fixed = [name for name in _FIXED_ARGUMENTS if name in arguments]
        require(not fixed, "chat_template_kwargs", arguments, f"leave out {', '.join(fixed)}, which is set already")
        require(not arguments or not off, "chat_template_kwargs", arguments, "give {} with --chat_template false")
        if template is not None:
            try:
                holds = "\0" in template.format(prompt="\0")
            except (KeyError, IndexError, ValueError):
                holds = False
            require(holds, "prompt_template", template, "give a Python format that holds {prompt} and no other field")

    def messages(self, prompt: Prompt) -> list[Message]:
        """Return the chat messages of a prompt: its own ones, or one user message, with instruction and suffix.

        Messages that hold the instruction, in whatever role, do not get it a second time.

        Raises:
            DataError: the messages have none that instruction or suffix could go to.
        """
        own = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        users = [message for message in own if message["role"] == "user"]
        if (self.instruction or self.prompt_suffix) and not users:
            raise DataError(f"the prompt {str(prompt)[:60]!r} has no user message; add one, or give no instruction")
        held = not isinstance(prompt, str) and any(self.instruction in message["content"] for message in own)
        if self.prompt_suffix and not users[-1]["content"].endswith(self.prompt_suffix):
            users[-1]["content"] += self.prompt_suffix
        if not self.instruction or held:
            return own
        if self.instruction_role == "system" and own[0]["role"] != "system":
            return [{"role": "system", "content": self.instruction}, *own]
        target = own[0] if self.instruction_role == "system" else users[-1]
        target["content"] = f"{self.instruction}\n{target['content']}"
        return own

    def render(self, tokenizer: Any, prompt: Prompt) -> str:
        """Return the text that the model continues.

        Raises:
            ModelError: the chat template is missing or refuses the messages.
        """
        messages = self.messages(prompt)
        if self.uses_chat_template(tokenizer):
            try:
                text: str = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
                )
            except Exception as error:  # a template is a program, which may raise anything
                raise ModelError(
                    f"the chat template refuses the prompt {str(prompt)[:60]!r}: {first_line(error)}; choose another "
                    "instruction_role, or --chat_template false"
                ) from error
        else:
            text = "\n".join(message["content"] for message in messages)
            text = text if self.prompt_template is None else self.prompt_template.format(prompt=text)
        # A template may end in "<think>\n". Neither its line break nor one of the option makes it another marker.
        opened = text.rstrip().endswith(self.opening_marker.rstrip() or self.opening_marker)
        return text if opened else text + self.opening_marker

    def uses_chat_template(self, tokenizer: Any) -> bool:
        """Return whether prompts go through the tokenizer's chat template. ModelError if it lacks one that it needs."""
        has_one = bool(getattr(tokenizer, "chat_template", None))
        if self.chat_template and not has_one:
            raise ModelError(
                "the tokenizer has no chat template, which the prompt format needs; give --prompt_template"
            )
        return has_one if self.chat_template is None else self.chat_template

    def ids(self, tokenizer: Any, prompts: Iterable[Prompt]) -> list[list[int]]:
        """Return the token ids of each prompt.

        Bare text gets what the tokenizer puts before a text, such as BOS, unless it begins with that. A template writes
        such tokens itself. What a tokenizer puts behind a text, such as EOS, would end the response before it begins.
        """
        texts = [self.render(tokenizer, prompt) for prompt in prompts]
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        bare = self.prompt_template is None and not self.uses_chat_template(tokenizer)
        start = leading_ids(tokenizer) if bare else []
        return [row if row[: len(start)] == start else start + row for row in ids]


def leading_ids(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts before every text."""
    for text in ("a", "1", "?"):  # a small vocabulary may drop one of them
        alone, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
        starts = range(len(whole) - len(alone) + 1 if alone else 0)
        for start in starts:
            if whole[start : start + len(alone)] == alone:
                return list(whole[:start])
    return []


# What the released scripts of training and evaluation write. Only the evaluation of GPQA has a suffix. The second stage
# of the LLaMA start was trained without a system message and without BOS.
FORMATS = {
    "latent-grpo-low": PromptFormat(INSTRUCTION, opening_marker="<think>", chat_template=True),
    "latent-grpo-high": PromptFormat(INSTRUCTION, "system", opening_marker="<think>", chat_template=True),
    "latent-grpo-gpqa": PromptFormat(INSTRUCTION, "system", LETTER_SUFFIX, "<think>", chat_template=True),
    "latent-sft-llama": PromptFormat(
        INSTRUCTION,
        opening_marker="<think>",
        chat_template=False,
        prompt_template="<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


def resolve_format(options: PromptOptions, model_path: str | None = None) -> PromptFormat:
    """Return the prompt format of a command or trainer.

    Given options override the named format, which overrides what is saved with the model of `model_path` (a folder or
    Hub name), which overrides the defaults. A named format leaves the end marker as it is saved.

    Raises:
        ConfigError: the options do not go together, or the saved format cannot be read.
    """
    saved = read_format(model_path) if model_path else PromptFormat()
    name = options.prompt_format
    require(name is None or name in FORMATS, "prompt_format", name, f"choose from {', '.join(FORMATS)}")
    base = saved if name is None else replace(FORMATS[name], end_marker=saved.end_marker)
    return replace(base, **options.given_prompt_options())


def read_format(model_path: str) -> PromptFormat:
    """Return the format that is saved with the model of a folder or Hub name, or the default if none is.

    Raises:
        ConfigError: the file is damaged.
    """
    path = _format_file(model_path)
    if path is None:
        return PromptFormat()
    known = [item.name for item in fields(PromptFormat)]
    try:
        values = json.loads(path.read_text("utf-8"))
        # A later version may write more parts; without them its prompts would be others.
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown part {unknown[0]!r}")
        return PromptFormat(**values)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{str(path)!r} is no prompt format ({first_line(error)}); correct or remove it") from error


def has_format(model_path: str) -> bool:
    """Return whether a format is saved with the model of a folder or Hub name."""
    return _format_file(model_path) is not None


def _format_file(model_path: str) -> Path | None:
    try:
        return Path(str(cached_file(model_path, FORMAT_FILE)))
    except OSError:  # the model was not trained by this package, or cannot be reached: loading it will say so
        return None


def write_format(folder: Path, prompt_format: PromptFormat) -> None:
    """Write a format beside the weights of a model."""
    text = json.dumps(asdict(prompt_format), indent=1, ensure_ascii=False)
    (folder / FORMAT_FILE).write_text(text, encoding="utf-8")


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    device: torch.device,
    prompt_format: PromptFormat | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the left-padded ids and the mask of P prompts, both int64 [P, L] on `device`.

    prompt_format: the default is the tokenizer's chat template, if it has one, around the bare question.
    """
    rows = (prompt_format or PromptFormat()).ids(tokenizer, prompts)
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def short_enough(lengths: Sequence[int], max_length: int | None, long_prompts: str) -> list[int]:
    """Return the indices of the prompts with at most `max_length` tokens; all of them without a limit.

    lengths: the tokens of each prompt. long_prompts: "drop" leaves longer ones out, with a warning of how many.

    Raises:
        DataError: a prompt is longer, unless they are dropped; or no prompt is short enough.
    """
    kept = [i for i, length in enumerate(lengths) if max_length is None or length <= max_length]
    if len(kept) == len(lengths):
        return kept
    count, first = len(lengths) - len(kept), next(i for i, length in enumerate(lengths) if length > (max_length or 0))
    if long_prompts != "drop":
        raise DataError(
            f"{count:,} of {len(lengths):,} prompts are over max_prompt_length {max_length}, the first in row "
            f"{first + 1} with {lengths[first]} tokens; raise it, or leave such rows out with --long_prompts drop"
        )
    if not kept:
        raise DataError(f"no prompt has {max_length} tokens or fewer; raise max_prompt_length")
    left_out = f"{count:,} of {len(lengths):,} rows are left out"
    warnings.warn(f"{left_out}: their prompts have more than {max_length} tokens", stacklevel=2)
    return kept


def longest_prompt(tokenizer: Any, rows: Sequence[Any], prompt_format: PromptFormat) -> int:
    """Return the number of tokens of the longest prompt of rows with the key "prompt"; 0 without rows."""
    return max((len(ids) for _, ids in _with_ids(tokenizer, rows, prompt_format)), default=0)


def with_short_prompts(rows: Any, lengths: Sequence[int], max_length: int | None, long_prompts: str) -> Any:
    """Return the rows of a data set, or None for none, that `short_enough` keeps."""
    kept = short_enough(lengths, max_length, long_prompts)
    return rows if len(kept) == len(lengths) else [rows[i] for i in kept]


def _with_ids(tokenizer: Any, rows: Sequence[Any], prompt_format: PromptFormat) -> Iterator[tuple[Any, list[int]]]:
    """Yield each row with the ids of its prompt. A tokenizer works faster on many prompts at a time.

    Raises:
        DataError: a row has no prompt, or one that is neither a text nor messages, or not what the first row has.
        ModelError: the chat template refuses a prompt. Both name the row.
    """
    for start in range(0, len(rows), BATCH):
        several = [rows[i] for i in range(start, min(start + BATCH, len(rows)))]
        prompts = [required_prompt(row, number) for number, row in enumerate(several, start + 1)]
        for number, prompt in enumerate(prompts, start + 1):
            same = isinstance(prompt, str) == isinstance(rows[0]["prompt"], str)
            require_row(same, number, "has messages and the first row a text, or the reverse; write all in one form")
        try:
            ids = prompt_format.ids(tokenizer, prompts)
        except (DataError, ModelError) as error:
            raise refused_prompt(tokenizer, prompts, prompt_format, start + 1) or error from error
        yield from zip(several, ids, strict=True)


def require_rows(name: str, rows: Any) -> None:
    """Raise DataError unless `rows` holds rows by number: a list of dicts, or a `datasets.Dataset`."""
    if isinstance(rows, Mapping):
        keys = ", ".join(map(repr, rows))
        raise DataError(f"{name} is a mapping with the keys {keys}; give one split of it, or a list of rows")
    if isinstance(rows, str) or hasattr(rows, "iloc") or not all(hasattr(rows, x) for x in ("__len__", "__getitem__")):
        remedy = "give a list of rows (dicts), or a datasets.Dataset"
        if isinstance(rows, str):
            remedy += f", as latent_grpo.load_rows({rows!r})"
        elif hasattr(rows, "take"):  # a streaming data set of the library datasets
            remedy += f": rows are drawn by number, so take some of the stream, as list({name}.take(10000))"
        raise DataError(f"{name} is a {type(rows).__name__}; {remedy}")
    if not len(rows):
        raise DataError(f"{name} is empty; give rows with a 'prompt' column")


def required_prompt(row: Any, number: int) -> Prompt:
    """Return the prompt of row `number`. DataError if it has none that is a text or messages with role and content."""
    has_prompt = isinstance(row, Mapping) and "prompt" in row
    require_row(has_prompt, number, f"is {row!r:.60}; give a mapping with the key 'prompt'")
    prompt = row["prompt"]
    messages = prompt if isinstance(prompt, list | tuple) else [{"role": "user", "content": prompt}]
    require_row(bool(messages), number, "has an empty list of messages as prompt; give at least one")
    for message in messages:
        parts = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        is_text = all(isinstance(part, str) for part in parts)
        require_row(is_text, number, f"has the prompt {prompt!r:.60}; give a text, or messages with role and content")
        try:
            "".join(map(str, parts)).encode("utf-8")
        except UnicodeEncodeError as error:
            half = str(error.object[error.start])
            raise DataError(
                f"row {number}: the prompt holds {half!r}, which is half a character; correct it"
            ) from error
    return cast(Prompt, prompt)


def require_row(holds: bool, number: int, fault: str) -> None:
    """Raise DataError that names a row and its fault unless `holds`."""
    if not holds:
        raise DataError(f"row {number} {fault}")


def refused_prompt(
    tokenizer: Any, prompts: Sequence[Prompt], prompt_format: PromptFormat, number: int
) -> DataError | ModelError | None:
    """Return the error of the first prompt that cannot be put into its form, with its row. number: of the first."""
    for place, prompt in enumerate(prompts, number):
        try:
            prompt_format.render(tokenizer, prompt)
        except (DataError, ModelError) as error:
            return type(error)(f"row {place}: {error}")
    return None


def fits_table(tokenizer: Any, table_rows: int) -> bool:
    """Return whether every entry of the tokenizer has a row in an embedding table of `table_rows` rows."""
    return bool(max(tokenizer.get_vocab().values()) < table_rows)


def check_ids(tokenizer: Any, ids: Iterable[int], table_rows: int, place: str) -> None:
    """Raise ModelError that names the first of `ids` without a row in the embedding table. place: where they are from.

    A tokenizer may have more entries than the table has rows. Only their use is an error.
    """
    for token in ids:
        if token >= table_rows:
            raise ModelError(
                f"{place}: id {token} ({tokenizer.convert_ids_to_tokens(token)!r}) has no row in the embedding table, "
                f"which has {table_rows}; remove the token from the text, choose another marker or tokenizer, or add a "
                "row with resize_token_embeddings"
            )


def check_prompts(tokenizer: Any, rows: Sequence[Any], prompt_format: PromptFormat, table_rows: int) -> list[int]:
    """Return the number of tokens of the prompt of each row. Every prompt is put into its form and tokenised once.

    Raises:
        DataError, ModelError: a prompt cannot be put to the model, has no token, or has one without a row in the
            embedding table. The message names the row.
    """
    lengths = []
    for number, (row, ids) in enumerate(_with_ids(tokenizer, rows, prompt_format), 1):
        place = f"row {number}, the prompt {str(row['prompt'])[:60]!r}"
        if not ids:
            raise ModelError(f"{place}: has no token; remove the row, or give an instruction or a template")
        check_ids(tokenizer, ids, table_rows, place)
        lengths.append(len(ids))
    return lengths
