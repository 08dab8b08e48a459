"""Imports between packages run downward only, and no package grows beyond a dozen modules."""

MAX_MODULES = 12
# Each package, and those it may import from: itself and what stands below it. Top first.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("launch.cli",),
    ("launch.driver",),
    ("launch.workers",),
    ("launch.cluster",),
    ("pipeline.campaigns",),
    ("pipeline.runs",),
    ("pipeline.evaluation", "pipeline.export"),
    ("pipeline.training",),
    ("pipeline.pruning",),
    ("pipeline.data", "pipeline.models"),
    ("pipeline.reports", "pipeline.store", "pipeline.tasks", "pipeline.tracking"),
    ("pipeline",),  # its modules: the ground that the packages above stand on
    ("mgpp.integrations",),
    ("mgpp",),
    ("mgpp.backends",),
    ("mgpp.masking",),
    ("mgpp.methods",),
    ("mgpp.sharding",),
)
