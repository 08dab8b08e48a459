"""The pruning section: which settings go with which methods, and what results depend on."""

import pytest
from pydantic import ValidationError

from mgpp import METHODS, ONE_SHOT, SparseGPT
from pipeline.pruning.config import PruneSection


def test_a_one_shot_method_is_built_from_its_settings():
    method = {"name": "sparsegpt", "damping": 0.1, "block_size": 64}
    found = PruneSection(method=method, sparsity=0.5, pattern="2:4").one_shot
    assert isinstance(found, SparseGPT)
    assert (found.damping, found.block_size, found.pattern) == (0.1, 64, "2:4")
    assert PruneSection(sparsity=0.5).one_shot is None


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize(
    ("key", "value", "got"),
    [
        ("start_after", "1ep", "'1ep'"),
        ("finetune", 3, "'3'"),
        ("interval", 5, "5"),
        ("initial_sparsity", 0.1, "0.1"),
    ],
)
def test_what_only_training_needs_is_refused(name, key, value, got):
    with pytest.raises(ValidationError) as raised:
        PruneSection(method={"name": name}, sparsity=0.5, **{key: value})
    message = f"means nothing for {name}, which prunes once, untrained; got {got}, leave it out"
    assert message in str(raised.value)


def test_calibration_is_refused_where_there_is_none():
    with pytest.raises(
        ValidationError, match="means nothing for gmp, which needs no calibration, got 64"
    ):
        PruneSection(method={"name": "gmp"}, sparsity=0.5, calibration_rows=64)


@pytest.mark.parametrize("name", [*METHODS, *ONE_SHOT])
def test_settings_written_out_in_full_are_read_back(name):
    config = PruneSection(
        method={"name": name}, **({} if name == "sparse-transfer" else {"sparsity": 0.5})
    )
    assert PruneSection.model_validate(config.model_dump(mode="json")) == config


def test_what_means_nothing_for_the_method_does_not_count_when_it_is_written_out():
    gradual = PruneSection(sparsity=0.5, interval=5, calibration_rows=128)
    assert gradual.given() == {"method": {"name": "mgpp"}, "sparsity": 0.5, "interval": 5}
    wanda = PruneSection(method={"name": "wanda"}, sparsity=0.5, interval=10, calibration_rows=64)
    assert wanda.given() == {"method": {"name": "wanda"}, "sparsity": 0.5, "calibration_rows": 64}


def test_a_pattern_goes_with_one_sparsity():
    with pytest.raises(ValidationError, match=r"got 0\.5, but pattern 1:4 prunes 0\.75"):
        PruneSection(method={"name": "wanda"}, pattern="1:4", sparsity=0.5)
    with pytest.raises(ValidationError, match="got 'half'; allowed are N:M"):
        PruneSection(method={"name": "wanda"}, pattern="half", sparsity=0.5)


def test_lamp_is_of_single_magnitudes():
    assert PruneSection(sparsity=0.5, scope="lamp").settings.scope == "lamp"
    with pytest.raises(ValidationError, match="'lamp' is defined on magnitudes, and platon prunes"):
        PruneSection(method={"name": "platon"}, sparsity=0.5, scope="lamp")
    with pytest.raises(ValidationError, match="'lamp' scores single weights, and pattern is '2:4'"):
        PruneSection(sparsity=0.5, scope="lamp", pattern="2:4")
