"""What a pruning method may add to the shared schedule, shards and threshold."""

from mgpp.schedule import PruningSchedule
from mgpp.shards import Shard


class Method:
    """Magnitude pruning with nothing added; methods override what they change.

    Attributes:
        name: the registry's name of the method.
    """

    name = "gmp"

    def adjust_grad(self, shard: Shard, step: int, schedule: PruningSchedule) -> None:
        """Change the shard's gradient in place before the optimizer uses it.

        Called at every step up to prune_end, after reduction, averaging and clipping.
        """

    def log_values(self, step: int, schedule: PruningSchedule) -> dict[str, float]:
        """Return the method's own quantities at this step, for logs."""
        return {}
