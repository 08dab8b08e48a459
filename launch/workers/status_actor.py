"""The actor that workers of a run post to: its progress, its restarts, and a failure that is final.

What is posted becomes Ray metrics too, which Prometheus scrapes from the actor's node.
The actor's process imports this file: so nothing heavy is imported here.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PREFIX = "ray_"  # Ray's own, before every name of a metric
WITH_STEPS = ("dense", "prune")  # stages whose unfinished work is kept
GAUGES = {
    "mgpp_step": "Optimizer steps done of the current stage.",
    "mgpp_num_steps": "Optimizer steps of the current stage.",
    "mgpp_loss": "Training loss, nats.",
    "mgpp_mask_sparsity": "Share of the prunable weights that the last mask prunes; they train on until "
    "the mask is fixed.",
    "mgpp_threshold": "Largest magnitude pruned at the last pruning.",
    "mgpp_tokens_per_second": "Tokens trained on per second, all workers together.",
    "mgpp_lr": "Learning rate.",
    "mgpp_grad_norm": "L2 norm of the gradient.",
}
RESTARTS = "mgpp_restarts"
RESTARTS_TEXT = "Restarts of a run's workers, by cause."
_TAGS = ("run", "stage")
_ANSWER_SECONDS = 10.0

Posted = tuple[dict[str, dict[str, Any] | None], list[str]]
"""The newest record of every started stage, in order, and all notes."""


class _StatusActor:
    """Holds what workers posted, and a failure that a restart cannot fix.

    Args:
        run: name of the run, in metrics.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._run = run
        self._records: dict[str, dict[str, Any] | None] = {}
        self._stage = ""
        self._notes: list[str] = []
        self._failure: tuple[str, Any] | None = None
        self._is_asked_to_stop = False
        self._gauges = {n: Gauge(n, text, tag_keys=_TAGS) for n, text in GAUGES.items()}
        self._restarts = Counter(RESTARTS, RESTARTS_TEXT, tag_keys=("run", "cause"))

    def post(self, record: dict[str, Any]) -> None:
        if record["event"] == "begin":
            self._stage = record["stage"]
            self._records[self._stage] = None
        elif record["event"] == "note":
            self._notes.append(record["text"])
        else:
            self._records[self._stage] = record
            if record["event"] not in ("write", "bench"):  # their rounds are no steps
                self._measure(record)

    def restart(self, cause: str, text: str) -> None:
        if self._failure is not None:
            return  # no restart follows: the run reports the failure
        self._notes.append(f"workers lost ({cause}): {text}")
        self._restarts.inc(1, tags={"run": self._run, "cause": cause})

    def fail(self, kind: str, detail: Any) -> None:
        self._failure = self._failure or (kind, detail)

    def failure(self) -> tuple[str, Any] | None:
        return self._failure

    def take_failure(self) -> tuple[str, Any] | None:
        failure, self._failure = self._failure, None
        return failure

    def ask_to_stop(self) -> bool:
        """Have the workers stop after the step under way; return whether they are at steps."""
        self._is_asked_to_stop = True
        return self._stage in WITH_STEPS and not self._failure

    def is_asked_to_stop(self) -> bool:
        return self._is_asked_to_stop

    def latest(self) -> Posted:
        return dict(self._records), list(self._notes)

    def _measure(self, record: dict[str, Any]) -> None:
        tags = {"run": self._run, "stage": self._stage}
        for name, gauge in self._gauges.items():
            value = record.get(name.removeprefix("mgpp_"))
            if isinstance(value, int | float):
                gauge.set(value + 1 if name == "mgpp_step" else value, tags=tags)


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Return the placement of what must live exactly as long as who starts it.

    Ray may put a task or an actor on any node, and the loss of that node would end the run.
    """
    here = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(node_id=here, soft=False)


def make_status_actor(run: str) -> Any:
    """Start the actor that workers of a run post to, on the node of who asks."""
    actor = ray.remote(num_cpus=0)(_StatusActor)
    return actor.options(scheduling_strategy=on_this_node()).remote(run)


def asked_to_stop(actors: Sequence[Any]) -> list[Any]:
    """Ask the workers of runs to stop after the step under way; return the actors of those at steps."""
    asked = {actor.ask_to_stop.remote(): actor for actor in actors}
    answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    found = []
    for answer in answers:
        with suppress(ray.exceptions.RayError):  # of a run that is lost
            if ray.get(answer):
                found.append(asked[answer])
    return found
