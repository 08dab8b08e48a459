"""Linear layers on CPUs that pass over zeros: torch's CSR matrices, multiplied by Intel's MKL.

For inference in float32. With many tokens the product would fall out of cache, so it is made by blocks.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_FEW = 16


class SparseLinear(nn.Module):
    """A linear layer whose weight is kept as a CSR matrix with 32-bit indices.

    Its state is that of the layer it replaces: `state_dict` gives the dense weight and takes it.

    Args:
        weight: float32 [out, in], dense, on a CPU.
        bias: float32 [out], or None.
        block: tokens that are multiplied at a time.
        transposed: the replaced layer keeps its weight as [in, out] (GPT-2's Conv1D).
    """

    _rows: Tensor
    _columns: Tensor
    _values: Tensor
    _matrix: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, block: int, transposed: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block, self.transposed = block, transposed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._set(weight)

    @property
    def weight(self) -> Tensor:
        """The weight as a CSR matrix [out, in]."""
        if self._matrix is None:
            self._matrix = torch.sparse_csr_tensor(
                self._rows,
                self._columns,
                self._values,
                (self.out_features, self.in_features),
                check_invariants=False,
            )
        return self._matrix

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b.

        Args:
            x: float32 [..., in].

        Raises:
            RuntimeError: if a gradient is asked for.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "SparseLinear is for inference: use torch.inference_mode(), or train the dense model"
            )
        rows = x.reshape(-1, self.in_features)
        out = rows.new_empty(len(rows), self.out_features)
        for given, made in zip(rows.split(self.block), out.split(self.block), strict=True):
            product = self._product(given)
            if self.bias is None:
                made.copy_(product)
            else:
                torch.add(product, self.bias, out=made)
        return out.view(*x.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor:
        if len(rows) == 1:
            return torch.mv(self.weight, rows[0]).unsqueeze(0)
        columns = rows.t()
        if len(rows) > _FEW:  # for so many, a transposed copy costs less than columns read across
            columns = columns.contiguous()
        product: Tensor = torch.sparse.mm(self.weight, columns)
        return product.t()

    def extra_repr(self) -> str:
        """Return sizes and sparsity."""
        size = self.out_features * self.in_features
        sparsity = 1 - self._values.numel() / max(size, 1)
        return f"in_features={self.in_features}, out_features={self.out_features}, {sparsity:.1%} zeros"

    def _set(self, weight: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            found = weight.detach().to_sparse_csr()
        # MKL takes 32-bit indices as they are.
        self.register_buffer("_rows", found.crow_indices().to(torch.int32), persistent=False)
        self.register_buffer("_columns", found.col_indices().to(torch.int32), persistent=False)
        self.register_buffer("_values", found.values(), persistent=False)
        self._matrix = None

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLinear":
        self._matrix = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the matrix: torch cannot copy one, and it is made of the buffers again."""
        return {**self.__dict__, "_matrix": None}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        dense = self.weight.to_dense()
        destination[f"{prefix}weight"] = dense.t().contiguous() if self.transposed else dense

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state = dict(state_dict)
        weight = state.pop(f"{prefix}weight", None)
        missing, unexpected, errors = args[-3:]
        if weight is None:
            missing.append(f"{prefix}weight")
        else:
            dense = weight.t() if self.transposed else weight
            if dense.shape == self.weight.shape:
                self._set(dense.to(self._values.dtype))
            else:
                errors.append(
                    f"size mismatch for {prefix}weight: {list(weight.shape)} in the state, "
                    f"{list(self.weight.shape)} (out, in) in the model"
                )
        found: list[str] = []
        super()._load_from_state_dict(state, prefix, *args[:-2], found, errors)  # type: ignore[call-arg]
        unexpected += found
