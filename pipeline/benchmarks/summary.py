"""What a benchmark found, in words and as tables of text: which variant is fastest where."""

from collections.abc import Mapping, Sequence
from typing import Any

ALIKE = 1.05
"""Times within 5% of each other count as the same."""
_ABSENT = "-"
_PER_SECOND, _GENERATED = "  rows/s", "  generated tokens/s"

Rows = list[list[str]]


def fastest(times_as_fast: Mapping[str, float]) -> list[str]:
    """Return the fastest variant first, and those that are as fast within 5%."""
    least = max(times_as_fast.values()) / ALIKE
    names = [name for name, ratio in times_as_fast.items() if ratio >= least]
    return sorted(names, key=times_as_fast.__getitem__, reverse=True)


def summary_of(
    variants: Mapping[str, Mapping[str, Any]], sizes: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return sentences: which variant is fastest over all, at each size, and which did not run."""
    titles = {name: variant["title"] for name, variant in variants.items()}
    first: dict[str, list[str]] = {}
    for size in sizes:
        names = " and ".join(titles[name] for name in size["fastest"])
        names = "not known, times vary too much," if size["disturbed"] else names
        first.setdefault(names, []).append(size_text(size))
    said = "; ".join(f"{names} at {', '.join(where)}" for names, where in first.items())
    lines = [f"Fastest (batch x length): {said}."]
    for size in sizes:
        ratios = size["times_as_fast"]
        best, *alike = size["fastest"]
        text = (
            f"{size_text(size)}: {titles[best]} is fastest, {milliseconds(size['seconds'][best])}"
        )
        if size["disturbed"]:
            text = f"{size_text(size)}: times vary too much to name the fastest"
        elif alike:
            text += f", with {' and '.join(titles[name] for name in alike)} within 5%"
        others = [
            f"{titles[name]} {ratios[name]:.2f}"
            for name in sorted(ratios, key=ratios.__getitem__, reverse=True)
            if name != "fp32"
        ]
        against = f" Times as fast as dense fp32: {', '.join(others)}." if others else ""
        lines.append(f"{text}.{against}")
    lines += [
        f"{variant['title']} is not measured: {variant['reason']}."
        for variant in variants.values()
        if "reason" in variant
    ]
    return lines


def size_text(size: Mapping[str, Any]) -> str:
    """Return a batch and a length as text."""
    return f"{size['batch']} x {size['length']}"


def running(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the titles of the variants that run, by name."""
    return {name: v["title"] for name, v in found["variants"].items() if "reason" not in v}


def size_table(found: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Return the heading and the rows of latency and throughput: a row a size, a column a variant."""
    titles, rows = running(found), []
    for size in found["sizes"]:
        seconds, rates = size["seconds"], size["rows_per_second"]
        rows.append([size_text(size), *(milliseconds(seconds[name]) for name in titles)])
        rows.append([_PER_SECOND, *(_digits(rates[name]) for name in titles)])
        made = size.get("generated_per_second")
        if made:
            rows.append([_GENERATED, *(_digits(made[name]) for name in titles)])
    return ["batch x length", *titles.values()], rows


def variant_table(found: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Return the heading and the rows of what each variant takes."""
    head = ["variant", "weight file", "peak loading", "peak running", "difference"]
    rows = []
    for variant in found["variants"].values():
        memory = variant.get("memory", {})
        sizes = [variant.get("file_bytes"), memory.get("load"), memory.get("run")]
        difference = variant.get("difference")
        texts = [_ABSENT if size is None else f"{size / 1e6:,.1f} MB" for size in sizes]
        rows.append(
            [variant["title"], *texts, _ABSENT if difference is None else f"{difference:.1e}"]
        )
    return head, rows


def notes(found: Mapping[str, Any]) -> list[str]:
    """Return what to know of each variant that runs."""
    variants = found["variants"].values()
    return [f"{v['title']}: {v['note']}." for v in variants if v.get("note")]


def explanation(found: Mapping[str, Any]) -> str:
    """Return how the figures were measured."""
    machine, variants = found["machine"], found["variants"].values()
    idle = [v["memory"]["idle"] for v in variants if "memory" in v]
    text = (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}. Medians of "
        f"{found['rounds']} forward passes, the variants in turn, on random tokens. "
        "Weight file: safetensors in the variant's dtype; int8 as torch.save writes it; sparse packed. "
        "Difference: the largest from dense fp32, over its largest output."
    )
    if "sparse" in found["variants"]:
        tokens = ", ".join(f"{number:,}" for number in found["sparse_tokens"])
        text += f" Sparse layers are those that pay at {tokens} tokens."
    if found["new_tokens"]:
        text += f" generate: {found['new_tokens']} new tokens a row, greedy."
    if idle:
        text += (
            " Peak memory is the resident memory of a process for each variant at the largest size, of "
            f"which Python, torch and transformers are {max(idle) / 1e6:,.0f} MB."
        )
    return text


def milliseconds(seconds: float) -> str:
    """Return a time as text."""
    return f"{_digits(seconds * 1e3)} ms"


def _digits(value: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
