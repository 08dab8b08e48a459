"""All parts and what they use of libraries, imported at once."""

# ruff: noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer
import transformers.models.bert.modeling_bert
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama

from tests.bench.gpu import (
    batches,
    evaluation,
    kernels,
    layouts,
    pruning,
    steps,
    throughput,
)
