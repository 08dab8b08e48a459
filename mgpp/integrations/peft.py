"""LoRA on a pruned model: adapters that leave its zeros alone, in training and at the merge.

A LoRA adapter adds scale B A to a weight W, and that product has no zeros: merged as it is, the model is
dense. `merge` leaves it out where W is zero, and says how much of it that is. `keep_zeros` trains with it
left out already, y = x (W + mask * scale B A)^T, so that nothing is lost at the merge.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mgpp.sparse.sparsify import is_conv1d

try:
    from peft import PeftModel
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"mgpp.integrations.peft needs {error.name}: pip install 'mgpp[peft]'", name=error.name
    ) from error

# Ways to begin an adapter that change the base weights; the names of some go on.
_REWRITES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged model, and what of the adapter the mask left out.

    Attributes:
        model: the base model with the adapter in its weights; it has no adapter any more.
        norms: Frobenius norm of what the adapter was to add to each weight, by the weight's name.
        lost: of that, the norm of what was left out because the weight is zero there; 0 for a model that
            was trained under `keep_zeros`.
    """

    model: nn.Module
    norms: Mapping[str, float]
    lost: Mapping[str, float]

    @property
    def norm(self) -> float:
        """The norm of all that the adapter was to add."""
        return math.hypot(*self.norms.values())

    @property
    def lost_norm(self) -> float:
        """The norm of all that was left out."""
        return math.hypot(*self.lost.values())


def merge(model: Any) -> Merged:
    """Merge the active LoRA adapters of a pruned model and keep its zeros.

    Where a base weight is zero, it stays the very same zero; elsewhere the sum of scale B A over the
    active adapters is added in float32 and rounded to the weight's dtype once. Adapters that are not
    active are dropped, as by PEFT's own `merge_and_unload`; modules that were trained whole
    (`modules_to_save`) and biases of adapters are taken over.

    Args:
        model: a PeftModel with LoRA over `nn.Linear` or GPT-2's `Conv1D`; used up by the merge.

    Raises:
        TypeError: if it is no PeftModel, as a model whose adapter was merged is none.
        ValueError: if it has no such adapter, it is merged already, a layer is quantized or of another
            kind, an adapter is a variant of LoRA (DoRA, ...), weights are not whole here, not finite
            or those of another layer too, an adapter began by rewriting them, or no matrix has a zero.
            Nothing is changed then.
    """
    layers = _checked_layers(model, "merge")
    norms, lost = {}, {}
    for name, layer in layers.items():
        norms[name], lost[name] = _merge_layer(layer)
    with warnings.catch_warnings():
        # What PEFT is to do is to put the layers back; it notes that they are merged.
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        plain = model.merge_and_unload()
    return Merged(model=plain, norms=norms, lost=lost)


def keep_zeros(model: Any) -> tuple[str, ...]:
    """Let a pruned model's adapters leave its zeros alone from now on: y = x (W + mask * scale B A)^T.

    Gradients are those of the masked product, so that what is trained is what `merge` merges. Parameters
    stay as they are: an adapter is saved, and loads, as any other; call this again after loading one. To
    call it twice changes nothing. Each layer makes its product of the size of W in every forward pass,
    and keeps it for the backward pass.

    Args:
        model: as of `merge`; changed in place.

    Returns:
        The names of the weights whose zeros are kept: of all adapters there are, active or not.

    Raises:
        TypeError: as `merge`.
        ValueError: as `merge`, and if something has wrapped the forward pass of a layer.
    """
    layers = _checked_layers(model, "keep_zeros")
    layers |= {
        f"{name}.weight": layer
        for name, layer in _inner(model).named_modules()
        if isinstance(layer, LoraLinear)  # of adapters that are not active yet
    }
    for name, layer in layers.items():
        if "forward" in vars(layer):  # of the instance: that of the class would not be called
            raise ValueError(
                f"keep_zeros: the forward pass of {name.removesuffix('.weight')} is wrapped, as by a "
                "device_map: load the model without one, or call keep_zeros before"
            )
    for layer in layers.values():
        layer.__class__ = _KeptLinear  # parameters, hooks and names stay those of the layer
    return tuple(layers)


class _KeptLinear(LoraLinear):
    """A LoRA layer whose product is zero where the base weight is."""

    _zero: Tensor | None = None  # while PEFT has merged it: a sum may be zero where no weight was

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does, and note for `unmerge` where the base weight was zero."""
        if not self.merged:
            self._zero = _base_weight(self) == 0
        super().merge(*args, **kwargs)
        if not self.merged:
            self._zero = None

    def unmerge(self) -> None:
        """Take away what was merged."""
        super().unmerge()
        self._zero = None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return mask * scale B A, as the base weight is stored; PEFT's own merge takes it from here."""
        zero = _base_weight(self) == 0 if self._zero is None else self._zero
        product: Tensor = super().get_delta_weight(adapter)
        return product.masked_fill(zero.to(product.device), 0.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x (W + sum of mask * scale B A)^T + b; [..., inputs] to [..., outputs]."""
        if self.disable_adapters or self.merged:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names: under keep_zeros all rows of a batch have the same adapters"
            )
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in _adapters(self, "keep_zeros"):
            product = self.get_delta_weight(adapter)
            bias = self.lora_B[adapter].bias
            result = result + functional.linear(
                self.lora_dropout[adapter](self._cast_input_dtype(x, product.dtype)),
                product.t() if self.fan_in_fan_out else product,
                None if bias is None else bias * self.scaling[adapter],
            )
        return result.to(dtype)


@torch.no_grad()
def _merge_layer(layer: Any) -> tuple[float, float]:
    """Add the adapters to a layer's base weight; return the norm of the product and of what was lost."""
    weight, base = _base_weight(layer), layer.get_base_layer()
    adapters = _adapters(layer, "merge")
    product = torch.zeros_like(weight, dtype=torch.float32)
    for adapter in adapters:
        product += layer.get_delta_weight(adapter).to(weight.device)
        bias = layer.lora_B[adapter].bias
        if bias is not None:
            base.bias += (bias * layer.scaling[adapter]).to(base.bias)
    zero = weight == 0
    lost = float(product[zero].double().norm())
    norm = float(product.double().norm())
    weight.copy_(torch.where(zero, weight, (weight.float() + product).to(weight.dtype)))
    layer.merged_adapters.extend(adapters)
    return norm, lost


def _checked_layers(model: Any, doing: str) -> dict[str, Any]:
    """Return the LoRA layers of a model, by the names of their weights in the plain model.

    Raises:
        TypeError: as `merge`.
        ValueError: as `merge`.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"{doing} needs a PeftModel, got {type(model).__name__}; a model whose adapter was merged is "
            "plain already"
        )
    layers = dict(_lora_layers(model, doing))
    if not layers:
        raise ValueError(
            f"{doing}: the model has no LoRA layer that is active ({_kinds(model)}): there is nothing "
            "whose product could meet a zero"
        )
    if not any(bool((_base_weight(layer) == 0).any()) for layer in layers.values()):
        raise ValueError(
            f"{doing}: none of the {len(layers)} adapted matrices has a zero: the base model is not "
            "pruned, or its zeros are lost; PEFT's own merge, and init_lora_weights such as pissa or "
            "olora, change base weights"
        )
    for adapter, config in model.peft_config.items():
        init = str(getattr(config, "init_lora_weights", "")).lower()
        if init.startswith(_REWRITES):  # some zeros may be left, as in rows that were zero
            raise ValueError(
                f"{doing}: adapter {adapter!r} was made by init_lora_weights {init!r}, which rewrites "
                "the base weights, zeros included: load the base model anew and take another"
            )
    shared = _shared(_inner(model))
    for name, layer in layers.items():
        if _base_weight(layer).data_ptr() in shared:
            raise ValueError(
                f"{doing}: {name} is the weight of another layer too, as by tie_word_embeddings or "
                "layer_replication, and what is merged into it would change that one: untie it, or "
                "target other modules"
            )
    return layers


def _inner(model: Any) -> nn.Module:
    """Return the model that has the adapters in it."""
    inner: Any = model.base_model
    plain: nn.Module = (
        inner.model if isinstance(inner, BaseTuner) else inner
    )  # as it is for prompts
    return plain


def _shared(model: nn.Module) -> set[int]:
    """Return where the parameters lie that several modules have."""
    places = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False) if p.numel()]
    return {place for place, count in Counter(places).items() if count > 1}


def _lora_layers(model: Any, doing: str) -> Iterator[tuple[str, Any]]:
    """Yield the adapted layers with their weights' names; none that could not be merged passes."""
    for name, layer in _inner(model).named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        is_plain = type(base) is nn.Linear or is_conv1d(base)
        if type(layer) not in (LoraLinear, _KeptLinear) or not is_plain:
            raise ValueError(
                f"{doing}: {name} is {type(layer).__module__}.{type(layer).__name__} over "
                f"{type(base).__name__}; only LoRA over plain Linear and Conv1D layers that are not "
                "quantized keeps zeros: target other modules, or load the base model unquantized"
            )
        if layer.merged:
            raise ValueError(
                f"{doing}: {name} is merged already, its zeros are lost: load the base model anew, then "
                "the adapter"
            )
        adapters = _adapters(layer, doing)
        weight = _base_weight(layer)
        if not weight.is_floating_point() or weight.is_meta:
            what = "on the meta device" if weight.is_meta else f"of dtype {weight.dtype}"
            raise ValueError(f"{doing}: the weight of {name} is {what}; load it in floating point")
        for adapter in adapters:
            _check_adapter(layer, name, adapter, doing)
        if adapters:
            yield f"{name}.weight", layer


def _adapters(layer: Any, doing: str) -> list[str]:
    """Return the active adapters of a layer.

    Raises:
        ValueError: if one adds something else than scale B A.
    """
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    for adapter in adapters:
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
            raise ValueError(
                f"{doing}: adapter {adapter!r} is a variant of LoRA, {kind}, which adds more than a "
                "product of two matrices; train it as plain LoRA (use_rslora is plain)"
            )
    return adapters


def _check_adapter(layer: Any, name: str, adapter: str, doing: str) -> None:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        raise ValueError(f"{doing}: adapter {adapter!r} has weights at {name} that are not finite")
    if layer.lora_B[adapter].bias is not None and layer.get_base_layer().bias is None:
        raise ValueError(
            f"{doing}: adapter {adapter!r} has a bias (lora_bias) at {name}, which has none to add it to"
        )


def _base_weight(layer: Any) -> Tensor:
    """Return the base weight of a layer: [outputs, inputs], of `Conv1D` [inputs, outputs].

    Raises:
        ValueError: if ZeRO 3 has sharded it.
    """
    weight: Tensor = layer.get_base_layer().weight
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "ZeRO 3 shards the base weights, and where they are zero is to be seen in whole ones: use "
            "ZeRO 2, or merge after training"
        )
    return weight


def _kinds(model: Any) -> str:
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}
    return ", ".join(sorted(kinds)) or "no adapter"
