"""What a model is given: random tokens of a batch and a length, none of them special."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SPECIAL = ("pad", "bos", "eos", "sep", "cls", "mask", "decoder_start")


def longest_input(config: Any) -> int | None:
    """Return the most tokens of a row that a model takes, of its configuration; None without a limit."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None)
    if not isinstance(found, int):
        return None
    # Of RoBERTa, positions begin after that of the padding.
    offset = (text.pad_token_id or 0) + 1 if "roberta" in str(text.model_type) else 0
    return found - offset


def longest_of(folder: Path) -> int | None:
    """Return the most tokens of a row that the model of a folder takes; None without a limit.

    Raises:
        ValueError: if its configuration cannot be read.
        OSError: likewise.
    """
    from transformers import AutoConfig

    import mgpp.integrations.transformers  # noqa: F401  # which registers the packed format

    return longest_input(AutoConfig.from_pretrained(folder))


def random_inputs(config: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Return the arguments of a forward pass; the same for all variants.

    Args:
        config: of the model.
        batch: rows.
        length: tokens of each; an encoder-decoder has as many in its decoder.

    Raises:
        ValueError: if the model does not take tokens.
    """
    text = config.get_text_config()
    size = getattr(text, "vocab_size", None)
    if not size:
        raise ValueError(f"a {config.model_type} model takes no tokens; only text models do")
    special = {getattr(text, f"{name}_token_id", None) for name in _SPECIAL}
    words = torch.tensor([token for token in range(size) if token not in special])
    generator = torch.Generator().manual_seed(0)
    drawn = words[torch.randint(len(words), (2, batch, length), generator=generator)]
    inputs = {"input_ids": drawn[0], "attention_mask": torch.ones(batch, length, dtype=torch.int64)}
    if config.is_encoder_decoder:
        if isinstance(text.eos_token_id, int):  # BART's classifiers read there
            inputs["input_ids"][:, -1] = text.eos_token_id
        inputs["decoder_input_ids"] = drawn[1]
        if "Classification" in (config.architectures or [""])[0]:
            del inputs["decoder_input_ids"]  # made of the row itself
    return inputs


def result_of(outputs: Any) -> Tensor:
    """Return what a model computed, logits where it has a head, in float32."""
    return next(value for value in outputs.to_tuple() if isinstance(value, Tensor)).float()
