"""The data stage: rows tokenized once, with the tokenizer beside them."""

from typing import Any

from pipeline.data.stage import data_identity, prepare_data
from pipeline.models.loading import load_tokenizer
from pipeline.models.source import model_identity
from pipeline.runs.config import RunConfig
from pipeline.runs.stage import Stage, StageContext, every, only
from pipeline.section import Section
from pipeline.tasks import TaskConfig, make_task
from pipeline.tasks.row_mapper import RowMapper

_TOKENIZER = ("path", "revision", "gguf_file")


def _for_rows(task: type[Section]) -> set[str]:
    assert issubclass(task, TaskConfig)
    return set(task.model_fields) - task.only_scoring


class DataStage(Stage):
    """Tokenizes the rows of all splits."""

    name = "data"
    version = 4
    settings = {"data": every, "task": _for_rows, "model": only(*_TOKENIZER)}

    def num_cpus(self, config: RunConfig) -> int | str:
        """Return the processes that tokenize."""
        return config.data.num_proc

    def inputs(self, config: RunConfig) -> tuple[str, ...]:
        """Return nothing: it is the first."""
        return ()

    def content(self, config: RunConfig) -> dict[str, Any]:
        """Return what names the rows and the tokenizer."""
        model = model_identity(config.model)
        return {
            "data": data_identity(config.data),
            "model": {name: model[name] for name in _TOKENIZER if name in model},
        }

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write `dataset/` and `tokenizer/`."""
        config = context.config
        tokenizer = load_tokenizer(config.model)
        task, identity = make_task(config.task), context.params["data"]
        mapper = RowMapper(num_proc=context.cores, folder=context.parts, progress=context.progress)
        return prepare_data(config.data, task, tokenizer, context.output, identity, mapper)


DATA = DataStage()
