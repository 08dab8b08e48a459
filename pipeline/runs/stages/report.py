"""The report stage: one page about the run."""

from typing import Any

from pipeline.runs.config import RunConfig
from pipeline.runs.stage import Stage, StageContext, every, model_sizes
from pipeline.runs.stages.dense import DENSE
from pipeline.runs.stages.export import (
    EXPORT,
    compressed_sizes,
    embedding_sizes,
    onnx_sizes,
    package_versions,
)
from pipeline.tasks import make_task
from pipeline.tracking.recorder import METRICS_FILE, parse_records


class ReportStage(Stage):
    """Draws what the run did."""

    name = "report"
    version = 2
    settings = {"name": every}
    for_pruned = True

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return all stages of the run."""
        models = ("dense", "prune") if config.dense.enabled else ("prune",)
        return ("data", *models, "evaluate", "export")

    def content(self, config: RunConfig) -> dict[str, Any]:
        """Return the metric that leads, which a task may choose by itself."""
        return {"metric": make_task(config.task).headline}

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write `report.html`."""
        from pipeline.benchmarks.page import speed_of  # with it comes plotly, slow to import
        from pipeline.reports.run import ReportData, render_report

        config, artifacts = context.config, context.artifacts
        figures, exported = artifacts["prune"].metrics, artifacts["export"].metrics
        task, metrics = make_task(config.task), artifacts["evaluate"].metrics
        records = parse_records(artifacts["prune"].read_text(METRICS_FILE))
        dense_steps: list[dict[str, Any]] = []
        if DENSE.name in artifacts:
            of_dense = parse_records(artifacts[DENSE.name].read_text(METRICS_FILE))
            dense_steps = of_dense.get("step", [])
        page = render_report(
            ReportData(
                name=config.name,
                model=config.model.path,
                method=config.prune.method.name,
                metric=task.headline,
                kinds={name: task.metric(name) for name in metrics["pruned"]},
                metrics=metrics,
                sparsity=exported["sparsity"],
                num_pruned=exported["num_zeros"],
                num_prunable=exported["num_prunable"],
                num_parameters=exported["num_parameters"],
                model_zeros=exported["model_zeros"],
                left_out=exported["left_out"],
                warnings=[*figures.get("warnings", []), *exported["warnings"]],
                sizes=model_sizes((DENSE, EXPORT), artifacts) | onnx_sizes(exported),
                embeddings=embedding_sizes(exported),
                compressed=compressed_sizes(exported),
                seconds={name: artifact.seconds for name, artifact in artifacts.items()},
                steps=records.get("step", []),
                dense_steps=dense_steps,
                prunings=records.get("prune", []),
                layers=records.get("layers", []),
                phases={k: figures[k] for k in ("prune_start", "prune_end", "num_steps")},
                config=config.to_yaml(),
                versions=package_versions(),
                speed=speed_of(exported["bench"]) if "bench" in exported else None,
            )
        )
        (context.output / "report.html").write_text(page, encoding="utf-8")
        return {"bytes": len(page.encode())}


REPORT = ReportStage()
