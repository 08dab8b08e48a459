"""What a model does, tried on a small copy of it: few and narrow layers, random weights.

Classes of transformers say in no common way whether they look ahead and which of their weights text
reaches; a copy answers in some 50 ms.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

_WIDTH = re.compile(
    r"hidden|intermediate|embed|embd|emb_dim|inner|ffn|(^|_)d?ff$|dim|_kv$|d_model|d_head|width|rank|state"
)
_NO_WIDTH = re.compile(
    r"^(num_|n_layer|n_head|max_|vocab)|layers$|heads$|token|index|position|theta|image|patch|kernel"
)
_HEAD = re.compile(r"head_dim|d_kv|d_head|rotary_dim|head_size")
_NUM_HEADS = ("num_attention_heads", "num_heads", "n_heads", "encoder_attention_heads")
_LAYERS = re.compile(r"^(num_.*layers|n_layers?|(encoder|decoder)_layers|depth)$")
_EXPERTS = re.compile(r"^(num_.*|n_.*|moe_num_)experts$")
_VOCABULARY = re.compile(r"(^|_)vocab_size|^n_words$")
_TOKEN = re.compile(r"token_ids?$|token_index$|^(pad|bos|eos|unk|mask)_index$")
_SIZES = ((2, None), (2, 16), (8, 16), (64, 16))
"""Layers and experts of the copies that are tried: some models are none without their eighth layer."""
_NUMBER = re.compile(r"(?<=[._])\d+(?=\.)")  # "expert_3" too
_NUM_TOKENS, _LEAST_HEAD = 512, 4
_LONGEST = 128  # tokens of the text; some models look at blocks of so many
_LARGEST = 4e7  # elements
_SAME = 1e-3  # of the largest logit; rounding is below 1e-5, what looks ahead above 1e-2


_Found = TypeVar("_Found")


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What was seen of a model.

    Attributes:
        looks_ahead: whether a token's logits depend on the tokens after it; None where a model has no
            logits of each of its inputs' tokens.
        unreached: patterns of the weights, with "*" for the numbers of layers, that texts do not reach:
            they have no gradient.
    """

    looks_ahead: bool | None
    unreached: frozenset[str]


@dataclass(frozen=True)
class _Asked:
    key: str
    settings: PretrainedConfig = field(compare=False)


def behaviour_of(
    settings: Any, auto_model: str, *, max_length: int, trust_remote_code: bool
) -> Behaviour | None:
    """Return what a model does with texts; None if no small copy of it could be built and run.

    Args:
        settings: the model's own configuration.
        auto_model: the transformers auto class that builds it.
        max_length: of the texts, in tokens.
        trust_remote_code: run code that comes with the model.
    """
    length = min(max_length, _LONGEST)
    return _try(_Asked(_key(settings), settings), auto_model, length, trust_remote_code)


def pattern_of(name: str) -> str:
    """Return a weight's name with "*" for the numbers of layers."""
    return _NUMBER.sub("*", name)


def predicts_next_token(settings: Any, auto_model: str, *, trust_remote_code: bool) -> bool | None:
    """Return whether the loss of a model of texts is that of the next token, given its inputs as labels.

    Most models shift labels by one; decoders such as BART's take them as they are, so that they would
    learn to copy their input. A loss of the next token does not depend on the first label.

    Args:
        settings: as of `behaviour_of`.
        auto_model: likewise.
        trust_remote_code: likewise.

    Returns:
        None where no small copy could be built and run.
    """
    return _predicts_next_token(_Asked(_key(settings), settings), auto_model, trust_remote_code)


def _key(settings: Any) -> str:
    return f"{type(settings).__name__} {settings.to_json_string(use_diff=False)}"


@lru_cache(maxsize=64)
def _try(asked: _Asked, auto_model: str, length: int, trust_remote_code: bool) -> Behaviour | None:
    def look(model: Any) -> Behaviour:
        return _seen(model, length)

    return on_a_copy(asked.settings, auto_model, trust_remote_code, look)


@lru_cache(maxsize=64)
def _predicts_next_token(asked: _Asked, auto_model: str, trust_remote_code: bool) -> bool | None:
    @torch.no_grad()
    def look(model: Any) -> bool:
        ids = draw(model, 4)
        other = ids.clone()
        other[0, 0] += 1
        losses = [model(input_ids=ids, labels=labels).loss for labels in (ids, other)]
        return losses[0] is not None and bool(losses[0] == losses[1])

    return on_a_copy(asked.settings, auto_model, trust_remote_code, look)


def on_a_copy(
    settings: Any, auto_model: str, trust_remote_code: bool, look: Callable[[Any], _Found]
) -> _Found | None:
    """Return what is seen of the first small copy that can be built and run, None if there is none.

    The generator of random numbers is left alone.

    Args:
        settings: the model's own configuration.
        auto_model: the transformers auto class that builds it.
        trust_remote_code: run code that comes with the model.
        look: given the copy, in evaluation mode, in float32 with random weights; where it raises, another
            copy is tried.

    Returns:
        None where no copy could be built and run.
    """
    auto = getattr(transformers, auto_model)
    for num_layers, num_experts in _SIZES:
        kwargs = {"trust_remote_code": trust_remote_code, "dtype": torch.float32}
        # A model's code may raise anything; then this copy is none.
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), suppress(Exception):
            torch.manual_seed(0)
            copy = small_copy(settings, num_layers, num_experts)
            copy._experts_implementation = "eager"  # the others ask for widths of multiples of 4
            with torch.device("meta"):
                empty = auto.from_config(deepcopy(copy), **kwargs)
            if sum(p.numel() for p in empty.parameters()) <= _LARGEST:
                return look(auto.from_config(copy, **kwargs).eval())
    return None


def small_copy(settings: Any, num_layers: int, num_experts: int | None) -> Any:
    """Return a configuration with few narrow layers, few words, and all else as it was.

    Widths are divided by one number, so that what must be equal, or a multiple, stays so.

    Args:
        settings: the configuration; what lies nested in it is made small too.
        num_layers: at most.
        num_experts: about so many at most; None leaves them.
    """
    copy = deepcopy(settings)
    _make_small(copy, num_layers, num_experts)
    return copy


def _make_small(settings: Any, num_layers: int, num_experts: int | None) -> None:
    values = dict(vars(settings))
    numbers = {n: v for n, v in values.items() if isinstance(v, int) and not isinstance(v, bool)}
    divisor = _divisor(settings, numbers)
    for name, value in numbers.items():
        if _LAYERS.match(name):
            setattr(settings, name, min(value, num_layers))
        elif _EXPERTS.match(name):
            setattr(settings, name, _few(value, num_experts))
        elif _VOCABULARY.search(name):
            setattr(settings, name, min(value, _NUM_TOKENS))
        elif _TOKEN.search(name):
            setattr(settings, name, _token(value))
        elif _WIDTH.search(name) and not _NO_WIDTH.search(name) and value % divisor == 0:
            setattr(settings, name, value // divisor)
    depths = {value for name, value in numbers.items() if _LAYERS.match(name)}
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            _make_small(value, num_layers, num_experts)
        elif isinstance(value, list) and _TOKEN.search(name):
            setattr(settings, name, [_token(v) if isinstance(v, int) else v for v in value])
        elif isinstance(value, list) and len(value) in depths:  # an entry for each layer
            setattr(settings, name, value[:num_layers])


def _divisor(settings: Any, numbers: dict[str, int]) -> int:
    """Return the power of two that leaves the smallest size of a head even, and 4 at least."""
    heads = [size for name, size in numbers.items() if _HEAD.search(name) and size > 0]
    width = getattr(settings, "hidden_size", None)
    if not heads and isinstance(width, int):
        counts = (getattr(settings, name, None) for name in _NUM_HEADS)
        heads = [width // next((n for n in counts if isinstance(n, int) and n > 0), 1)]
    divisor = 1
    while heads and all(
        size % (2 * divisor) == 0 and (size // (2 * divisor)) % 2 == 0 for size in heads
    ):
        divisor *= 2
        if min(heads) // divisor <= _LEAST_HEAD:
            break
    return divisor


def _few(number: int, most: int | None) -> int:
    while most is not None and number > most and number % 2 == 0:
        number //= 2
    return number


def _token(number: int) -> int:
    return number if number < _NUM_TOKENS - 32 else _NUM_TOKENS - 1 - number % 32


def _seen(model: Any, length: int) -> Behaviour:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # as drawn, attention hardly tells tokens apart
    ids = draw(model, length)
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    if model.get_output_embeddings() is None and isinstance(end, int):
        ids[0, -1] = end  # where some models read what they classify
    logits = _logits(model, ids)
    sum(value.float().square().sum() for value in logits).backward()  # type: ignore[union-attr]
    reached: dict[str, bool] = defaultdict(bool)
    for name, parameter in model.named_parameters():
        reached[pattern_of(name)] |= parameter.grad is not None
    return Behaviour(
        looks_ahead=_looks_ahead(model, ids, logits[0]),
        unreached=frozenset(pattern for pattern, is_reached in reached.items() if not is_reached),
    )


def draw(model: Any, length: int) -> Tensor:
    """Draw a row of token ids that are no special ones, but for the last of them."""
    return torch.randint(8, _num_tokens(model), (1, length))


def _num_tokens(model: Any) -> int:
    try:
        rows = int(model.get_input_embeddings().weight.shape[0])
    except (
        NotImplementedError,
        AttributeError,
    ):  # CANINE hashes characters, Perceiver embeds bytes
        rows = _NUM_TOKENS // 2
    return min(rows, _NUM_TOKENS - 32) - 1


def _logits(model: Any, ids: Tensor) -> list[Tensor]:
    extra: dict[str, Any] = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    if model.config.is_encoder_decoder and model.get_output_embeddings() is not None:
        extra["decoder_input_ids"] = ids
    outputs = model(input_ids=ids, **extra)
    return list(_of_outputs(outputs))


def _of_outputs(outputs: Any) -> Iterator[Tensor]:
    for name in ("logits", "start_logits", "end_logits"):
        if outputs.get(name) is not None:
            yield outputs[name]


@torch.no_grad()
def _looks_ahead(model: Any, ids: Tensor, logits: Tensor) -> bool | None:
    """Change the last token, and see whether what the others predict changes."""
    if model.config.is_encoder_decoder or logits.shape[:2] != ids.shape:
        return None
    other = ids.clone()
    other[0, -1] = 8 + (ids[0, -1] - 7) % (_num_tokens(model) - 8)
    changed = (_logits(model, other)[0] - logits)[0, :-1].abs().max()
    return bool(changed > _SAME * logits.abs().max())
