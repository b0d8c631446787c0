"""The whole text of a response, reasoning included, as reward functions that check the format of a response read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from latent_grpo.prompts import PromptFormat
from latent_grpo.rollout.trajectory import Rollout, marker_span

_CLOSING_TAG = re.compile(r"</(\w+)>")
_PROMPT_TOKENS = 32  # so many at the end of a prompt hold the opening of the reasoning


def response_texts(
    tokenizer: Any, rollout: Rollout, prompt_format: PromptFormat, visible: Sequence[str], latent: bool
) -> list[str]:
    """Return the whole text of each response: its reasoning, the end marker if it was reached, the visible text.

    A latent step is written as its most probable token. The reasoning begins with its opening, such as ``<think>``, in
    latent mode, whose responses begin within the reasoning. A text response gets the opening only where the prompt ends
    in it, because it writes every other opening itself.

    Args:
        prompt_format: has the end marker. The opening is its ``opening_marker``, or else the tag that an end marker
            ``</NAME>`` closes.
        visible: the visible texts [R] of the rollout (`visible_text`).
        latent: whether responses begin with a latent run.
    """
    end_marker = prompt_format.end_marker.strip()
    tag = _CLOSING_TAG.fullmatch(end_marker)
    opening = prompt_format.opening_marker.strip() or (f"<{tag[1]}>" if tag else "")
    marker_ids = tokenizer.encode(prompt_format.end_marker, add_special_tokens=False)
    openings = [_opening(tokenizer, ids, opening, latent) for ids in rollout.prompt_ids[:, -_PROMPT_TOKENS:].tolist()]
    texts = []
    columns = (rollout.token, rollout.is_latent, rollout.mask, rollout.prompt_index)
    rows = zip(*(column.tolist() for column in columns), visible, strict=True)
    for token, is_latent, mask, prompt, text in rows:
        steps = [t for t, soft, used in zip(token, is_latent, mask, strict=True) if used and soft]
        hard = [t for t, soft, used in zip(token, is_latent, mask, strict=True) if used and not soft]
        reasoning = tokenizer.decode(steps, skip_special_tokens=True) if steps else ""
        span = marker_span(tokenizer, hard, prompt_format.end_marker, marker_ids)
        # The marker has left the visible text where a latent run came before it, or nothing.
        cut = span is not None and (steps or not tokenizer.decode(hard[: span[0]]).strip())
        begin = "" if reasoning.lstrip().startswith(opening) else openings[prompt]
        texts.append(f"{begin}{reasoning}{end_marker if cut else ''}{text}")
    return texts


def _opening(tokenizer: Any, prompt_end: list[int], opening: str, latent: bool) -> str:
    """Return the opening with which the response to a prompt begins, as the prompt writes it if it ends in it."""
    end = tokenizer.decode(prompt_end, skip_special_tokens=False)
    if opening and end.rstrip().endswith(opening):
        return opening + end[len(end.rstrip()) :]
    return opening if latent else ""
