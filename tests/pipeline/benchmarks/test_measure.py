"""What a benchmark says of small models: outputs, sizes of files, which variant is fastest."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BartForConditionalGeneration,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)

from launch.driver.progress import describe
from mgpp.sparse.checkpoint import pack_checkpoint
from pipeline.benchmarks import variants
from pipeline.benchmarks.inputs import longest_input, random_inputs
from pipeline.benchmarks.measure import NotMeasurableError, Workload, measure
from pipeline.benchmarks.page import speed_of
from pipeline.benchmarks.summary import fastest, summary_of
from pipeline.benchmarks.variants import VARIANTS
from pipeline.reports.run import render_report
from pipeline.runs.stages.export import with_bench
from tests import tiny
from tests.html_page import Page
from tests.pipeline.reports.test_run import report_data

SMALL = {"batches": (1, 2), "lengths": (5,), "rounds": 2, "memory": False}


def write(folder, head=BertForSequenceClassification, sparsity=0.98, **sizes):
    torch.manual_seed(0)
    model = tiny.model(head, **{"hidden_size": 64, "intermediate_size": 1024, **sizes}).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data[torch.rand(parameter.shape) < sparsity] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def always_sparse(monkeypatch):
    """Say of each layer that it is faster when sparse: here it is too small to be."""
    speeds = "mgpp.sparse.speed.SpeedTable.speedups"
    monkeypatch.setattr(speeds, lambda self, weight, tokens: (32, [2.0] * len(tokens)))


needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL")


@needs_mkl
@pytest.mark.parametrize(
    "head",
    [
        BertForSequenceClassification,
        RobertaForMaskedLM,
        GPT2LMHeadModel,
        LlamaForCausalLM,
        BartForConditionalGeneration,
    ],
)
def test_all_variants_of_an_architecture_run(tmp_path, head, always_sparse):
    found = measure(
        write(tmp_path / "m", head, num_hidden_layers=1), Workload(**SMALL, new_tokens=2)
    )
    assert [*found["variants"]] == ["fp32", "bf16", "int8", "sparse"]
    assert not any("reason" in variant for variant in found["variants"].values())
    far = {name: variant["difference"] for name, variant in found["variants"].items()}
    assert far["fp32"] == 0
    assert 0 <= far["sparse"] <= 1e-5
    assert far["sparse"] < far["bf16"] < 0.1
    assert far["sparse"] < far["int8"] < 1
    assert not any("sparse outputs" in warning for warning in found["warnings"])
    generates = ("LM" in head.__name__ and head is not RobertaForMaskedLM) or "Gen" in head.__name__
    for size in found["sizes"]:
        assert set(size["seconds"]) == set(found["variants"])
        assert all(
            low <= size["seconds"][n] <= high for n, (low, high) in size["quartiles"].items()
        )
        assert ("generated_per_second" in size) == generates


def test_the_sizes_of_files_are_those_of_files(tmp_path, always_sparse):
    folder = write(tmp_path / "plain")
    found = measure(folder, Workload(**SMALL))["variants"]
    packed = pack_checkpoint(folder, tmp_path / "packed").packed_bytes
    model = BertForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    save_file(model.state_dict(), tmp_path / "bf16.safetensors")
    header = 10_000  # names and shapes, which are not counted
    for name, size in {
        "fp32": (folder / "model.safetensors").stat().st_size,
        "bf16": (tmp_path / "bf16.safetensors").stat().st_size,
        "sparse": packed,
    }.items():
        assert 0 <= size - found[name]["file_bytes"] <= header, name
    assert found["bf16"]["file_bytes"] < found["fp32"]["file_bytes"]
    assert found["int8"]["file_bytes"] < found["fp32"]["file_bytes"]


def test_a_packed_folder_gives_the_same_outputs(tmp_path, always_sparse):
    plain = write(tmp_path / "plain")
    pack_checkpoint(plain, tmp_path / "packed")
    work = Workload(**SMALL, variants=("sparse",))
    first, second = (measure(folder, work)["variants"] for folder in (plain, tmp_path / "packed"))
    assert first == second
    assert "reason" not in first["sparse"]


def test_what_does_not_run_is_listed_with_the_reason(tmp_path, monkeypatch):
    folder = write(tmp_path / "dense", sparsity=0.0)
    monkeypatch.setattr(variants, "_has_bf16", lambda: False)
    found = measure(folder, Workload(**SMALL))
    assert found["variants"]["sparse"] == {
        "title": "sparse fp32",
        "reason": "all layers stay dense: 0% zeros",
    }
    assert "has no bf16 instructions" in found["variants"]["bf16"]["note"]
    assert found["summary"][-1] == ("sparse fp32 is not measured: all layers stay dense: 0% zeros.")
    assert set(found["sizes"][0]["seconds"]) == {"fp32", "bf16", "int8"}


@pytest.mark.parametrize(
    ("name", "patched", "value", "reason"),
    [
        ("sparse", "torch.backends.mkl.is_available", lambda: False, "this torch has no MKL"),
        ("int8", "torch.ao.quantization.quantize_dynamic", None, "TypeError"),
    ],
)
def test_a_torch_that_lacks_something_says_so(tmp_path, monkeypatch, name, patched, value, reason):
    monkeypatch.setattr(patched, value)
    found = measure(write(tmp_path / "m"), Workload(**SMALL, variants=(name,)))
    assert found["variants"][name]["reason"].startswith(reason)
    assert [*found["sizes"][0]["seconds"]] == ["fp32"]


def test_a_variant_that_fails_as_it_runs_is_listed(tmp_path):
    """T5 reads the dtype of a weight that, quantized, has none."""
    found = measure(
        write(tmp_path / "t5", T5ForConditionalGeneration, num_hidden_layers=1),
        Workload(**SMALL, variants=("int8",), new_tokens=0),
    )
    int8 = found["variants"]["int8"]
    assert "reason" not in int8 or int8["reason"].startswith("it does not run: ")


def test_outputs_that_differ_are_a_warning(tmp_path, always_sparse, monkeypatch):
    folder = write(tmp_path / "m", LlamaForCausalLM)
    monkeypatch.setattr("pipeline.benchmarks.measure.TOLERANCE", 1e-12)
    found = measure(folder, Workload(**SMALL, variants=("sparse",), new_tokens=0))
    assert found["warnings"][0].startswith("sparse outputs differ from dense ones by ")


def test_what_is_no_text_model_is_refused(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    ResNetForImageClassification(config).save_pretrained(tmp_path / "m")
    with pytest.raises(NotMeasurableError, match="a resnet model takes no tokens"):
        measure(tmp_path / "m", Workload(**SMALL))


def test_lengths_end_where_the_model_s_positions_do(tmp_path):
    config = tiny.model(RobertaForMaskedLM, max_position_embeddings=34).config
    longest = longest_input(config)
    model = RobertaForMaskedLM(config).eval()
    with torch.inference_mode():
        assert model(**random_inputs(config, 1, longest)).logits.shape[1] == longest
        with pytest.raises((IndexError, RuntimeError)):
            model(**random_inputs(config, 1, longest + 1))
    write(tmp_path / "m", max_position_embeddings=32)
    found = measure(
        tmp_path / "m", Workload(batches=(1,), rounds=1, memory=False, variants=("fp32",))
    )
    assert [size["length"] for size in found["sizes"]] == [16]


def test_threads_are_as_before_afterwards(tmp_path):
    before = torch.get_num_threads()
    found = measure(
        write(tmp_path / "m"), Workload(**SMALL, variants=("fp32",), threads=before + 1)
    )
    assert found["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def size_of(batch, ratios, disturbed=False):
    seconds = {name: 4e-3 / ratio for name, ratio in ratios.items()}
    return {
        "batch": batch,
        "length": 16,
        "seconds": seconds,
        "times_as_fast": ratios,
        "fastest": fastest(ratios),
        "disturbed": disturbed,
    }


def test_the_words_name_the_fastest_also_where_it_is_not_sparse():
    sizes = [
        size_of(1, {"fp32": 1.0, "int8": 4.0, "sparse": 2.0}),
        size_of(8, {"fp32": 1.0, "int8": 1.96, "sparse": 2.0}),
        size_of(9, {"fp32": 1.0, "int8": 0.5, "sparse": 0.7}),
        size_of(10, {"fp32": 1.0, "int8": 2.3, "sparse": 7.5}, disturbed=True),
    ]
    titles = {name: {"title": VARIANTS[name].title} for name in sizes[0]["seconds"]}
    assert summary_of(titles, sizes) == [
        "Fastest (batch x length): int8 dynamic at 1 x 16; sparse fp32 and int8 dynamic at 8 x 16; "
        "dense fp32 at 9 x 16; not known, times vary too much, at 10 x 16.",
        "1 x 16: int8 dynamic is fastest, 1 ms. "
        "Times as fast as dense fp32: int8 dynamic 4.00, sparse fp32 2.00.",
        "8 x 16: sparse fp32 is fastest, 2 ms, with int8 dynamic within 5%. "
        "Times as fast as dense fp32: sparse fp32 2.00, int8 dynamic 1.96.",
        "9 x 16: dense fp32 is fastest, 4 ms. "
        "Times as fast as dense fp32: sparse fp32 0.70, int8 dynamic 0.50.",
        "10 x 16: times vary too much to name the fastest. "
        "Times as fast as dense fp32: sparse fp32 7.50, int8 dynamic 2.30.",
    ]


def test_ratios_are_of_each_round_and_a_disturbance_is_seen(tmp_path, monkeypatch):
    """The machine becomes ten times slower half way, for all alike."""
    rounds = [[2.0, 1.0]] * 5 + [[20.0, 10.0]] * 6
    monkeypatch.setattr(
        "pipeline.benchmarks.measure.interleaved", lambda works, count: iter(rounds)
    )
    found = measure(write(tmp_path / "m"), Workload(**SMALL, variants=("bf16",)))
    for size in found["sizes"]:
        assert size["times_as_fast"] == {"fp32": 1.0, "bf16": 2.0}
        assert size["disturbed"]
    assert found["warnings"][0].startswith("times at 1 x 5 vary by more than 50% between rounds")
    assert len(found["warnings"]) == 2


def test_an_export_s_figures_get_those_of_a_benchmark_and_the_report_shows_them(tmp_path):
    records = []
    folder = write(tmp_path / "m", max_position_embeddings=16)
    # Memory takes processes of their own, which are tested with the command.
    found = with_bench(
        {"warnings": ["x"]}, folder, threads=1, progress=records.append, memory=False
    )
    assert [*found["bench"]["variants"]] == [*VARIANTS]
    assert found["warnings"][0] == "x"
    assert records[0] == {**records[0], "event": "bench", "step": 0, "text": "load dense fp32"}
    assert records[-1]["step"] < records[-1]["num_steps"]
    assert describe(records[0]).startswith("measuring the exported model: load dense fp32, 1/")
    kept = json.loads(json.dumps(found["bench"], sort_keys=True))  # as an artifact's record has it
    page = Page(render_report(report_data(speed=speed_of(kept))))
    (bars,) = (f["data"] for f in page.figures if f["data"][0].get("name") == "dense fp32")
    titles = [v["title"] for v in found["bench"]["variants"].values() if "reason" not in v]
    assert [trace["name"] for trace in bars] == titles
    assert "Speed on a CPU" in page.titles
    assert "Latency and throughput" in page.titles
    assert found["bench"]["summary"][0] in page.text


def test_an_export_that_cannot_be_measured_is_a_warning(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    ResNetForImageClassification(config).save_pretrained(tmp_path / "m")
    found = with_bench({"warnings": []}, tmp_path / "m", threads=1, progress=lambda record: None)
    (warning,) = found["warnings"]
    assert warning.startswith("export.bench: not measured: it does not run: ")
    assert "bench" not in found
