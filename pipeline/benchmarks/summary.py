"""What a benchmark found, in words and as tables of text: which variant is fastest where."""

from collections.abc import Mapping, Sequence
from typing import Any

ALIKE = 1.05
"""Times within 5% of each other count as the same."""
_ABSENT = "-"

Rows = list[list[str]]


def fastest(seconds: Mapping[str, float]) -> list[str]:
    """Return the fastest variant first, and those that are as fast within 5%."""
    best = min(seconds.values())
    return sorted((n for n, value in seconds.items() if value <= ALIKE * best), key=seconds.__getitem__)


def summary_of(
    variants: Mapping[str, Mapping[str, Any]], sizes: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return sentences: which variant is fastest over all, at each size, and which did not run."""
    titles = {name: variant["title"] for name, variant in variants.items()}
    first: dict[str, list[str]] = {}
    for size in sizes:
        names = " and ".join(titles[name] for name in size["fastest"])
        first.setdefault(names, []).append(size_text(size))
    said = "; ".join(f"{names} at {', '.join(where)}" for names, where in first.items())
    lines = [f"Fastest (batch x length): {said}."]
    for size in sizes:
        seconds = size["seconds"]
        best, *alike = size["fastest"]
        text = f"{size_text(size)}: {titles[best]} is fastest, {_milliseconds(seconds[best])}"
        if alike:
            text += f", with {' and '.join(titles[name] for name in alike)} within 5%"
        others = [
            f"{titles[name]} {seconds['fp32'] / seconds[name]:.2f}"
            for name in sorted(seconds, key=seconds.__getitem__)
            if name != "fp32"
        ]
        lines.append(f"{text}." + (f" Times as fast as dense fp32: {', '.join(others)}." if others else ""))
    lines += [
        f"{variant['title']} is not measured: {variant['reason']}."
        for variant in variants.values()
        if "reason" in variant
    ]
    return lines


def size_text(size: Mapping[str, Any]) -> str:
    """Return a batch and a length as text."""
    return f"{size['batch']} x {size['length']}"


def size_table(found: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Return the heading and the rows of latency and throughput: a row a size, a column a variant."""
    running = {name: v["title"] for name, v in found["variants"].items() if "reason" not in v}
    rows = []
    for size in found["sizes"]:
        texts = [
            f"{_milliseconds(size['seconds'][name])}, {size['rows_per_second'][name]:,.4g}/s"
            for name in running
        ]
        rows.append([size_text(size), *texts])
        made = size.get("generated_per_second")
        if made:
            rows.append(["  generate", *(f"{made[name]:,.4g} tokens/s" for name in running)])
    return ["batch x length", *running.values()], rows


def variant_table(found: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Return the heading and the rows of what each variant takes, or why it does not run."""
    head = ["variant", "weight file", "peak loading", "peak running", "difference", "note"]
    rows = []
    for variant in found["variants"].values():
        memory = variant.get("memory", {})
        sizes = [variant.get("file_bytes"), memory.get("load"), memory.get("run")]
        difference = variant.get("difference")
        rows.append(
            [
                variant["title"],
                *(_ABSENT if size is None else f"{size / 1e6:,.1f} MB" for size in sizes),
                _ABSENT if difference is None else f"{difference:.1e}",
                variant["reason"] if "reason" in variant else variant["note"],
            ]
        )
    return head, rows


def explanation(found: Mapping[str, Any]) -> str:
    """Return how the figures were measured."""
    machine, variants = found["machine"], found["variants"].values()
    idle = [v["memory"]["idle"] for v in variants if "memory" in v]
    text = (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}. Medians of "
        f"{found['rounds']} forward passes, the variants in turn, on random tokens; rows per second. "
        "Weight file: of safetensors in the variant's dtype; int8 as torch.save writes it; sparse packed. "
        "Difference: the largest from dense fp32, over its largest output."
    )
    if "sparse" in found["variants"]:
        tokens = ", ".join(f"{number:,}" for number in found["sparse_tokens"])
        text += f" Sparse layers are those that pay at {tokens} tokens."
    if found["new_tokens"]:
        text += f" generate: {found['new_tokens']} new tokens a row, greedy."
    if idle:
        text += (
            " Peak memory is the resident memory of a process for each variant at the largest size, of which "
            f"Python, torch and transformers are {max(idle) / 1e6:,.0f} MB."
        )
    return text


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.4g} ms"
