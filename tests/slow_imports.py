"""What libraries import only at their first use, and slowly: for processes that fork ranks afterwards."""

# ruff: noqa: F401
import torch.utils.tensorboard
import transformers.models.bert.modeling_bert
import transformers.models.bert.tokenization_bert

from pipeline.training.deepspeed import import_muon

import_muon()
