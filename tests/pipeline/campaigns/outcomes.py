"""What came of runs that nobody ran, for tests of tables and pages."""

from pipeline.campaigns.summary import Outcome
from pipeline.metric import share


def outcome(run, value, *, metric=None, failure="", **changes):
    """Return the outcome of a run whose headline metric, accuracy unless given, has a value."""
    metric = metric or share("accuracy")
    values = {
        "run": run,
        "metric": metric,
        "metrics": {} if failure else {metric.name: value},
        "seconds": {"data": 1.0, "dense": 10.0, "prune": 20.0, "evaluate": 3.0},
        "num_workers": 4,
        "url": "" if failure else f"runs/evaluate-{run.title.replace(' ', '-')}/a-0",
        "failure": failure,
        **changes,
    }
    return Outcome(**values)
