"""Packed checkpoints (`mgpp.sparse`) in `from_pretrained`: a quantizer that loads them dense.

transformers maps names of a checkpoint to the model's by a list of transforms: renamings, which all
apply, then one converter at most, which makes parameters of the tensors it collects. Here positions get
their weight's name before any renaming, so that both go the same way; each converter then unpacks before
it converts, and a last one takes the packed weights that no other does. Cast to another dtype are the
values, before they are unpacked, which is the same. The loaded model knows nothing of this.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mgpp.sparse.reading import QUANT_METHOD, PackedError, packed_weights, unpacked

_PACKED = "mgpp packed weight"  # stands for a pattern; no name of a weight has spaces


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a packed checkpoint.

    Args:
        version: of the format.
        tensors: shape and encoding of each packed weight, by its name in the checkpoint.

    Raises:
        PackedError: if this version is not known, or the entries are damaged.
    """

    dequantize = True  # by which transformers knows that the loaded model is an ordinary one

    def __init__(
        self, version: int | None = None, tensors: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.version = version
        found = {"quant_method": QUANT_METHOD, "version": version, "tensors": tensors}
        self.tensors = packed_weights({"quantization_config": found})


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Unpacks weights while transformers loads them."""

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._weights = _PackedWeights(quantization_config.tensors or {})

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to pack a plain checkpoint.

        Raises:
            PackedError: if the checkpoint is not packed.
        """
        if not self.pre_quantized:
            raise PackedError(
                "the checkpoint is not packed, and loading does not pack: `mgpp pack`"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Refuse weights that are left on disk: they would be read from the packed files.

        Raises:
            PackedError: if the map has any.
        """
        if isinstance(device_map, Mapping) and "disk" in map(str, device_map.values()):
            raise PackedError(
                "device_map leaves weights on disk: `mgpp unpack` the checkpoint first"
            )
        return device_map

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the transforms, of which the converters unpack."""
        weights = self._weights
        return [
            _WeightNames(weights),
            *(
                _Unpacker(weights, found) if isinstance(found, WeightConverter) else found
                for found in weight_conversions
            ),
            _PackedOnly(weights),
        ]

    def is_serializable(self) -> bool:
        """Return True: what was loaded is saved as any other model, plain."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether what was loaded can be trained."""
        return True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Leave the transforms by which transformers would have saved a plain checkpoint."""
        self._weights.check_seen()
        used = (plain(found) for found in model._weight_conversions or [])
        model._weight_conversions = [found for found in used if found is not None]
        return model


class _PackedWeights:
    """The packed weights of one checkpoint; the transforms of a load share it.

    Attributes:
        current: name of the tensor that transformers is asking about.
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self._entries = entries
        self._weights = {f"{n}_{entry['encoding']}": n for n, entry in entries.items()}
        self._seen: set[str] = set()
        self.current = ""

    def __deepcopy__(self, memo: Any) -> "_PackedWeights":
        return self

    def weight_of(self, name: str) -> str:
        """Return the name of the weight that a tensor belongs to."""
        self.current = name
        self._seen.add(name)
        return self._weights.get(name, name)

    def is_packed(self) -> bool:
        """Tell whether the current tensor is one of a packed weight's two."""
        return self.current in self._entries or self.current in self._weights

    def unpacked(self, names: Iterable[str], tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the weights of which these are the tensors, in the same order.

        Raises:
            PackedError: if values and positions do not belong together.
        """
        found = dict(zip(names, tensors, strict=True))
        return [self._whole(name, found) for name in found if name not in self._weights]

    def check_seen(self) -> None:
        """Make sure that every packed weight was in the files.

        Raises:
            PackedError: naming the first one that was not.
        """
        lacking = sorted((self._entries.keys() | self._weights.keys()) - self._seen)
        if lacking:
            raise PackedError(
                f"no file has {lacking[0]}, which config.json names: is it of another model?"
            )

    def _whole(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if name not in self._entries:
            return tensors[name]
        encoding, shape = (self._entries[name][key] for key in ("encoding", "shape"))
        positions = tensors.get(f"{name}_{encoding}")
        if positions is None:
            raise PackedError(f"no file has {name}_{encoding}, which config.json names")
        if positions.is_meta:
            return positions.new_empty(shape, dtype=tensors[name].dtype)
        return unpacked(name, tensors[name], positions, encoding, tuple(shape))


class _WeightNames(WeightRenaming):  # type: ignore[misc]
    """The first renaming: positions get the name of their weight."""

    __slots__ = ("_weights",)

    def __init__(self, weights: _PackedWeights) -> None:
        super().__init__(_PACKED, _PACKED)
        self._weights = weights

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self._weights.weight_of(source_key), None


class _Unpacker(WeightConverter):  # type: ignore[misc]
    """A converter that is handed whole weights where it would be handed packed ones."""

    __slots__ = ("_names", "_weights", "converter")

    def __init__(self, weights: _PackedWeights, converter: WeightConverter) -> None:
        super().__init__(
            list(converter._original_source_patterns),
            list(converter._original_target_patterns),
            converter.operations,
            converter.force_cpu,
        )
        self._weights, self.converter = weights, converter
        self._names: dict[str, list[str]] = defaultdict(list)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = self.converter.rename_source_key(source_key)
        return renamed

    def was_used(self) -> bool:
        return bool(self.converter.was_used())

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: Any
    ) -> None:
        super().add_tensor(target_key, source_key, source_pattern, future)
        self._names[source_pattern].append(source_key)

    def convert(self, layer_name: str, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        self.converter.collected_tensors.update(self._collected(layer_name, model))
        converted: dict[str, Any] = self.converter.convert(layer_name, model=model, **kwargs)
        return converted

    def _collected(self, layer_name: str, model: Any) -> dict[str, list[Tensor]]:
        """Return what was collected, unpacked, by pattern."""
        if hasattr(model.get_parameter_or_buffer(layer_name), "device_mesh"):
            raise PackedError("packed weights cannot be cut among devices: `mgpp unpack` first")
        return {
            pattern: self._weights.unpacked(self._names[pattern], tensors)
            for pattern, tensors in self.materialize_tensors().items()
        }


class _PackedOnly(_Unpacker):
    """The last converter: takes the packed weights that no other took, and only unpacks them."""

    __slots__ = ()

    def __init__(self, weights: _PackedWeights) -> None:
        super().__init__(weights, WeightConverter(_PACKED, _PACKED, [_Nothing()]))

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, _PACKED if self._weights.is_packed() else None

    def convert(self, layer_name: str, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        return {layer_name: self._collected(layer_name, model)[_PACKED][0]}


class _Nothing(ConversionOps):  # type: ignore[misc]
    """An operation that does nothing; a converter must have one."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict


def plain(transform: Any) -> Any | None:
    """Return the transform that a load of a plain checkpoint would have had; None if none."""
    if isinstance(transform, _WeightNames | _PackedOnly):
        return None
    return transform.converter if isinstance(transform, _Unpacker) else transform


def register() -> None:
    """Make `from_pretrained` load packed checkpoints; again is no harm."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = PackedConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PackedQuantizer
