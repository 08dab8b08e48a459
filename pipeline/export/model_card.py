"""The model card of an exported checkpoint."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write `README.md` with the metadata that the hub reads.

    Args:
        folder: of the checkpoint.
        card: what the template `model_card.md.jinja` names.
    """
    template = Environment(
        loader=PackageLoader("pipeline.export"),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  # Markdown, not HTML
    ).get_template("model_card.md.jinja")
    data = ModelCardData(library_name="transformers", tags=["pruned", "sparse", card["method"]])
    text = f"---\n{data.to_yaml()}\n---\n\n{template.render(**card)}"
    ModelCard(text, ignore_metadata_errors=False).save(folder / "README.md")
