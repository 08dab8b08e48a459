"""Spans of weights that lie on several ranks, and sums over what each holds of them."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mgpp.sharding.collectives import Collectives
from mgpp.sharding.shards import Shard

Span = tuple[int, int]  # a weight's index, and the number of the span in it


class Straddling:
    """The spans that the ranks' shards cut in two or more.

    Args:
        shards: this rank's shards.
        spans: elements of a span of each weight, by `Shard.index`; they divide it.
        collectives: the group over which the weights are sharded.
    """

    def __init__(
        self, shards: Sequence[Shard], spans: Sequence[int], collectives: Collectives
    ) -> None:
        self.collectives = collectives
        held = [0] * len(spans)
        for shard in shards:
            held[shard.index] = shard.numel
        self.spans: list[Span] = []
        for index, counts in enumerate(collectives.by_rank_all(held)):
            cuts = accumulate(counts[:-1])
            numbers = {cut // spans[index] for cut in cuts if cut % spans[index]}
            self.spans += [(index, number) for number in sorted(numbers)]
        self._known = set(self.spans)

    def of(self, shard: Shard, span: int) -> list[Span]:
        """Return the straddled spans of which a shard holds a part: its first, its last, or none."""
        if not shard.numel:
            return []
        first, last = shard.offset // span, (shard.offset + shard.numel - 1) // span
        return [(shard.index, n) for n in sorted({first, last}) if (shard.index, n) in self._known]

    def sum(
        self, parts: Mapping[Span, Tensor], sizes: Sequence[int], dtype: torch.dtype
    ) -> dict[Span, Tensor]:
        """Return the sum over all ranks of what each gives for straddled spans; all ranks must call.

        Args:
            parts: this rank's part, 1-D, by span. Of a type below int64 only one rank may give what is
                not zero at a place, and nothing negative.
            sizes: values of a span, by `Shard.index`.
            dtype: of the values.
        """
        if not self.spans:
            return {}
        ends = list(accumulate(sizes[index] for index, _ in self.spans))
        together = 8 // dtype.itemsize
        padded = -(-ends[-1] // together) * together
        values = torch.zeros(padded, dtype=dtype, device=self.collectives.device)
        places = {
            span: slice(end - sizes[span[0]], end)
            for span, end in zip(self.spans, ends, strict=True)
        }
        for span, part in parts.items():
            values[places[span]] = part.to(values.device)
        self.collectives.all_reduce(values.view(torch.int64))
        return {span: values[place] for span, place in places.items()}
