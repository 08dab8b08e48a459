"""The model card of an exported checkpoint."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader

# What the hub calls what a model is for.
_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
}


def write_card(folder: Path, card: dict[str, Any], auto_model: str) -> None:
    """Write `README.md` with the metadata that the hub reads.

    Args:
        folder: of the checkpoint.
        card: what the template `model_card.md.jinja` names.
        auto_model: the transformers auto class that loads it.
    """
    template = Environment(
        loader=PackageLoader("pipeline.export"),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  # Markdown, not HTML
    ).get_template("model_card.md.jinja")
    data = ModelCardData(
        library_name="transformers",
        base_model=card["model"] if _is_on_the_hub(card["model"]) else None,
        pipeline_tag=_PIPELINES.get(auto_model),
        tags=list(dict.fromkeys(["pruned", "sparse", "mgpp", card["method"]])),
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{template.render(**card)}"
    ModelCard(text, ignore_metadata_errors=False).save(folder / "README.md")


def _is_on_the_hub(path: str) -> bool:
    """Return whether a model's path names a repository of the hub, and nothing on this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not Path(path).exists()
