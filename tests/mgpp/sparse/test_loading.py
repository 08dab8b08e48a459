"""A folder, plain or packed, as a model with sparse layers."""

import json
import sys

import pytest
import torch
from transformers import BertForSequenceClassification

import mgpp.sparse
from mgpp.sparse.checkpoint import pack_checkpoint
from mgpp.sparse.linear import SparseLinear
from tests import tiny
from tests.mgpp.sparse.test_sparsify import Table


@pytest.fixture
def folder(tmp_path):
    model = tiny.model(BertForSequenceClassification, hidden_size=64, intermediate_size=128)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data[torch.rand(parameter.shape) < 0.9] = 0
    model.bfloat16().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL")
@pytest.mark.parametrize("packed", [False, True])
def test_it_computes_what_the_plain_model_does(folder, packed):
    dense = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    if packed:
        pack_checkpoint(folder, folder.parent / "packed")
        folder = folder.parent / "packed"
    model = mgpp.sparse.load(folder, table=Table(2.0, 2.0, 2.0))
    assert any(isinstance(module, SparseLinear) for module in model.modules())
    ids = torch.randint(4, 30, (2, 9))
    with torch.inference_mode():
        expected, found = dense(ids).logits, model(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_model_that_stays_dense_says_why(folder):
    with pytest.warns(UserWarning, match="all layers stay dense: not faster: 0.50 times at worst"):
        mgpp.sparse.load(folder, table=Table(2.0, 0.5, 2.0))


def test_a_class_that_transformers_lacks_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Mine"]}))
    with pytest.raises(ValueError, match=r"names no model class of transformers \(.*'Mine'\)"):
        mgpp.sparse.load(folder)


def test_without_transformers_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mgpp\[pipeline\]'"):
        mgpp.sparse.load(folder)
