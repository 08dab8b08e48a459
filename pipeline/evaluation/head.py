"""Scores of predicted tokens without the logits of a whole batch: the head runs on a slice at a time.

Logits of 128,256 tokens take 513 kB a prediction in float32: those of a batch of 32 rows of 2,048 are
34 GB, and a cross-entropy over them takes as much again. Here the layers run once and the model's own
code after them (head, bias, scale, cap) once for each slice of the predictions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.trial import draw, on_a_copy
from pipeline.tasks.base import UNLABELLED, TokenTask, without_labels

SLICE_BYTES = 256 * 2**20
"""Most that a slice's logits take in float32."""
_SAME = 1e-4  # of the largest logit; rounding is below 1e-5


def num_slices(num_predictions: int, vocab_size: int) -> int:
    """Return in how many slices logits of so many predictions are made; at least one."""
    most = max(SLICE_BYTES // (4 * vocab_size), 1)
    return max(-(-num_predictions // most), 1)


def find_layers_output(settings: Any, auto_model: str, *, trust_remote_code: bool) -> str | None:
    """Return the module of a model that predicts tokens whose output the head takes position by position.

    Tried on a small copy: the logits made in slices of its output must be those of the whole.

    Args:
        settings: the model's own configuration.
        auto_model: the transformers auto class that builds it.
        trust_remote_code: run code that comes with the model.

    Returns:
        The module's name; None where there is none, or no copy could be built: logits are whole then.
    """
    return on_a_copy(settings, auto_model, trust_remote_code, _layers_of)


@dataclass(frozen=True, kw_only=True)
class TokenScorer:
    """Scores the tokens that a model predicts.

    Attributes:
        task: says which tokens, and by what.
        model: the model, or its DeepSpeed engine, in evaluation mode.
        layers: name of the module whose output the head takes position by position; None makes the logits
            of a batch whole.
        least_slices: slices of each batch, at least: under ZeRO 3 as many as the largest batch of any
            worker takes, for the workers gather the head together, and in the same order in every batch.
    """

    task: TokenTask
    model: Any
    layers: str | None
    least_slices: int = 1

    def infer(self, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Return each row's sums of scores, in the CPU's memory.

        Args:
            batch: the inputs and labels, in the CPU's memory.
            device: of the model.
        """
        targets = self.task.targets(batch)
        predicted = targets != UNLABELLED
        rows, places = predicted.nonzero(as_tuple=True)
        positions = rows * batch["input_ids"].shape[1] + places
        inputs = {name: values.to(device) for name, values in without_labels(batch).items()}
        scores = self.scores(inputs, positions.to(device), targets[predicted].to(device))
        return self.task.row_sums({k: v.cpu() for k, v in scores.items()}, predicted)

    def scores(
        self, inputs: dict[str, Tensor], positions: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """Return the score of each prediction.

        Args:
            inputs: of the model, without labels; [rows, length] each.
            positions: int64 [predictions], row x length + place of each.
            targets: int64 [predictions], the tokens to be predicted.
        """
        number = len(positions)
        slices = max(num_slices(number, vocabulary_of(self.model)), self.least_slices)
        # A slice may not be empty: what is added is scored and left out.
        missing = torch.zeros(max(slices - number, 0), dtype=torch.int64, device=positions.device)
        positions, targets = torch.cat([positions, missing]), torch.cat([targets, missing])
        of_slices: list[dict[str, Tensor]] = []
        wanted = iter(targets.tensor_split(slices))

        def score(logits: Tensor) -> None:
            of_slices.append(self.task.score_tokens(logits.float(), next(wanted)))

        logits_by_slices(self.model, self.layers, inputs, positions.tensor_split(slices), score)
        return {n: torch.cat([one[n] for one in of_slices])[:number] for n in of_slices[0]}


def logits_by_slices(
    model: Any,
    layers: str | None,
    inputs: Mapping[str, Tensor],
    slices: tuple[Tensor, ...],
    use: Callable[[Tensor], None],
) -> None:
    """Run a model's layers once and its head on one slice of their output after another.

    All of it happens in one call of the model: DeepSpeed sees the same modules run in the same order in
    every batch of as many slices, fetches ahead, and keeps the head gathered from slice to slice.

    Args:
        model: the model, or its DeepSpeed engine.
        layers: name of the module before the head; None runs both at once.
        inputs: of the model, [rows, length] each.
        slices: positions of each slice, int64 [number]: row x length + place.
        use: called with the logits of each slice, [number, vocabulary].

    Raises:
        ValueError: if the module's output is not of the inputs' rows and length.
    """
    if layers is None:
        logits = model(**inputs).logits.flatten(0, 1)
        for positions in slices:
            use(logits[positions])
        return
    module = _module(model)
    inner = module.get_submodule(layers)
    run_model, run_layers = module.forward, inner.forward
    outputs: Any = None
    positions = slices[0]

    def give_slice(*args: Any, **kwargs: Any) -> Any:
        nonlocal outputs
        if outputs is None:
            outputs = run_layers(*args, **kwargs)
        states = outputs[0]
        if states.shape[:2] != inputs["input_ids"].shape:
            raise ValueError(
                f"{layers} returns {tuple(states.shape)} for inputs of "
                f"{tuple(inputs['input_ids'].shape)}"
            )
        return _with_states(outputs, states.flatten(0, 1)[positions].unsqueeze(0))

    def run_by_slices(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal positions
        for chosen in slices:
            positions = chosen
            use(run_model(*args, **kwargs).logits[0])
        return positions

    with _runs(module, run_by_slices), _runs(inner, give_slice):
        model(**inputs)


def vocabulary_of(model: Any) -> int:
    """Return how many tokens a model, or its DeepSpeed engine, chooses from."""
    return int(_module(model).config.get_text_config().vocab_size)


def _module(model: Any) -> Any:
    return getattr(model, "module", model)  # of a DeepSpeed engine


def _with_states(outputs: Any, states: Tensor) -> Any:
    """Return the outputs of a model's layers with others in the place of the hidden states."""
    if isinstance(outputs, tuple):
        return (states, *outputs[1:])
    first = next(iter(outputs))
    return type(outputs)(**{**outputs, first: states})


@contextmanager
def _runs(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a module run something else when it is called; its hooks stay."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@torch.no_grad()
def _layers_of(model: Any) -> str | None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)  # as drawn, positions differ too little to be told apart
    ids = draw(model, 14).view(2, 7)
    whole = model(input_ids=ids).logits.flatten(0, 1)
    order = torch.tensor([9, 2, 13, 0, 5, 11, 6])
    names = {id(module): name for name, module in model.named_modules()}
    for candidate in _candidates(model):
        name: str = names.get(id(candidate), "")
        if name and _is_same(model, name, ids, whole, order.split([3, 1, 3])):
            return name
    return None


def _candidates(model: Any) -> Iterator[nn.Module]:
    yield model.base_model
    yield model.get_decoder()  # where the model calls a part of its base


def _is_same(model: Any, name: str, ids: Tensor, whole: Tensor, slices: tuple[Tensor, ...]) -> bool:
    found: list[Tensor] = []
    try:
        logits_by_slices(model, name, {"input_ids": ids}, slices, found.append)
    except Exception:  # noqa: BLE001  # a model's code may raise anything for states of other shape
        return False
    expected = whole[torch.cat(slices)]
    if [part.shape for part in found] != [part.shape for part in expected.split([3, 1, 3])]:
        return False
    return bool((torch.cat(found) - expected).abs().max() <= _SAME * expected.abs().max())
