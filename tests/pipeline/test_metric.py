"""How each metric is written: as papers do, whatever unit it is computed in."""

import math

import pytest

from pipeline import metric
from pipeline.tasks import TASKS


@pytest.mark.parametrize(
    ("made", "value", "text", "title"),
    [
        (metric.share("accuracy"), 0.95987, "95.99%", "accuracy (%)"),
        (metric.percentage("rouge2"), 21.2789, "21.28%", "rouge2 (%)"),
        (metric.correlation("matthews"), -0.58923, "-0.5892", "matthews"),
        (metric.perplexity("perplexity"), 12.0, "12.00", "perplexity"),
        (metric.perplexity("perplexity"), 54321.987, "54,321.99", "perplexity"),
        (metric.perplexity("perplexity"), math.exp(700), "1.01e+304", "perplexity"),
        (metric.error("loss"), 2.48491, "2.4849", "loss"),
        (metric.count("num_tokens"), 245569.0, "245,569", "num_tokens"),
        (metric.count("generated_length", digits=1), 21.26, "21.3", "generated_length"),
        (metric.share("accuracy"), math.nan, "n/a", "accuracy (%)"),
        (metric.share("accuracy"), None, "n/a", "accuracy (%)"),
    ],
)
def test_values_are_written_in_the_metric_s_own_way(made, value, text, title):
    assert (made.text(value), made.title) == (text, title)


@pytest.mark.parametrize(
    ("made", "difference", "text"),
    [
        (metric.share("accuracy"), -0.0103, "-1.03 points"),
        (metric.percentage("f1"), 0.25, "+0.25 points"),
        (metric.perplexity("perplexity"), 1.7, "+1.70"),
        (metric.share("accuracy"), -1e-9, "+0.00 points"),
        (metric.share("accuracy"), None, "n/a"),
    ],
)
def test_differences_have_a_sign_and_those_of_percents_are_points(made, difference, text):
    assert made.difference(difference) == text


def test_a_spread_is_written_like_its_mean():
    assert metric.share("accuracy").mean_and_spread(0.9599, 0.0037) == "95.99 ± 0.37"
    assert metric.perplexity("perplexity").mean_and_spread(12.0, None) == "12.00"


@pytest.mark.parametrize("name", TASKS)
def test_no_task_declares_a_metric_twice(name):
    names = [made.name for made in TASKS[name].metrics]
    assert len(set(names)) == len(names)
