"""How a method's settings are chosen: by runs whose validation rows are a part of the training rows.

Every method has as many candidates, and the rows that the table is about are seen by its own runs alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from statistics import mean

from pipeline.campaigns.config import CampaignConfig
from pipeline.campaigns.grid import (
    NOTHING_CHOSEN,
    CampaignRun,
    Chosen,
    Place,
    make_run,
    pruned_points,
)
from pipeline.metric import Metric

Scores = Mapping[CampaignRun, float]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen and why.

    Attributes:
        scores: the metric of each run that candidates were chosen by; none where there was no choice.
        chosen: the candidate at each place.
    """

    scores: Scores
    chosen: Chosen


NO_CHOICE = Choice(scores={}, chosen=NOTHING_CHOSEN)


def selection_runs(config: CampaignConfig) -> list[CampaignRun]:
    """Return the runs that candidates are chosen by; none where there is no choice."""
    selection = config.selection
    if selection is None or not config.has_choice:
        return []
    places = dict.fromkeys(
        place._replace(sparsity=sparsity)
        for place, _, _ in pruned_points(config)
        for sparsity in selection.sparsities or [place.sparsity]
    )
    return [
        make_run(config, place, seed, candidate=candidate, selecting=True)
        for seed in dict.fromkeys(selection.seeds)
        for place in places
        for candidate in range(len(config.methods[place.method].candidates))
    ]


def choose(config: CampaignConfig, scores: Scores, metrics: Mapping[str, Metric]) -> Chosen:
    """Choose each place's candidate: the best mean over the selection's runs; the first of equals.

    A mean that is not finite, as of training that diverged, is worse than any other.

    Args:
        config: the campaign.
        scores: the metric of each selection run.
        metrics: what it is, by task.
    """
    chosen = {}
    for place, _, _ in pruned_points(config):
        if not config.has_choice or place in chosen:
            continue
        sign = 1 if metrics[place.task].higher_is_better else -1
        means = [
            mean(
                sign * score
                for run, score in scores.items()
                if run.candidate == candidate and _decides(config, run, place)
            )
            for candidate in range(len(config.methods[place.method].candidates))
        ]
        means = [value if isfinite(value) else -inf for value in means]
        chosen[place] = means.index(max(means))
    return chosen


def was_chosen(config: CampaignConfig, run: CampaignRun, chosen: Chosen) -> bool:
    """Tell whether the candidate of a selection run was chosen at a place that the run decides on."""
    return any(
        candidate == run.candidate and _decides(config, run, place)
        for place, candidate in chosen.items()
    )


def _decides(config: CampaignConfig, run: CampaignRun, place: Place) -> bool:
    assert config.selection is not None
    together = config.selection.sparsities is not None
    return run.place[:3] == place[:3] and (together or run.place.sparsity == place.sparsity)
