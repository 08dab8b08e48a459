"""Rows from files and functions, split, renamed and cut, and what names their content."""

import csv
import json
import sys
import textwrap
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets

from pipeline.data.files import FilesConfig
from pipeline.data.function import FunctionConfig, _rows_sha256
from pipeline.data.hub import HubConfig
from pipeline.data.joined import JoinedConfig
from pipeline.data.stage import data_identity, is_local, load_splits, prepare_data
from pipeline.errors import ConfigError
from pipeline.models.loading import load_tokenizer
from pipeline.models.source import ModelConfig
from pipeline.runs.config import parse_config
from pipeline.tasks import make_task
from pipeline.tasks.sequence import ClassificationConfig

pytestmark = pytest.mark.usefixtures("datasets_cache")

SST2 = Path(__file__).parents[4] / "shared" / "data" / "sst2"
ROWS = [
    {"text": "plain", "label": 0},
    {"text": "with, comma", "label": 1},
    {"text": 'with "quotes"', "label": 1},
    {"text": '"opens a quote', "label": 0},
    {"text": "é ü 漢", "label": 1},
]


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_tsv(path, rows):
    lines = ["\t".join(rows[0])] + ["\t".join(str(v) for v in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_json(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".json": write_json,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def load(**settings):
    return load_splits(FilesConfig(source="files", **settings))


def only_problem(function, *args, **kwargs):
    with pytest.raises(ConfigError) as raised:
        function(*args, **kwargs)
    (problem,) = map(str, raised.value.problems)
    return problem


@pytest.fixture
def numbers(tmp_path):
    """A CSV with a hundred numbered rows."""
    path = tmp_path / "numbers.csv"
    write_csv(path, [{"number": i, "label": i % 2} for i in range(100)])
    return str(path)


# Files.


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_rows_of_a_file_are_what_was_written(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    splits = load(train=str(path), validation=str(path))
    assert splits["train"].to_list() == ROWS
    assert splits["validation"].to_list() == ROWS


@pytest.mark.parametrize("suffix", [".txt", ".text", ".TXT"])
def test_a_text_file_is_a_row_a_line(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_text('one\n\n"two",\tthree\n', encoding="utf-8")
    splits = load(train=str(path), validation=str(path))
    assert splits["train"]["text"][:] == ["one", "", '"two",\tthree']


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_words_that_pandas_takes_for_nothing_stay_words(tmp_path, suffix):
    rows = [{"text": word, "label": 1} for word in ("null", "NA", "nan", "None", "n/a", "word")]
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, rows)
    assert load(train=str(path), validation=str(path))["train"].to_list() == rows


def test_several_files_are_joined_in_order(tmp_path):
    for name, rows in (("b", ROWS[:2]), ("a", ROWS[2:])):
        write_csv(tmp_path / f"{name}.csv", rows)
    paths = [str(tmp_path / "b.csv"), str(tmp_path / "a.csv")]
    assert load(train=paths, validation=paths[0])["train"].to_list() == ROWS


def test_files_of_several_kinds_in_one_split_are_refused(tmp_path):
    # One reader reads a split; another kind of file would be misread, or blamed on the first one.
    write_csv(tmp_path / "a.csv", ROWS)
    write_json(tmp_path / "b.json", ROWS)
    problem = only_problem(load, train=[str(tmp_path / "a.csv"), str(tmp_path / "b.json")])
    assert problem.startswith("data.train: ")
    assert "b.json" in problem


def test_options_go_to_the_reader(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("0;good day\n1;bad day\n", encoding="utf-8")
    options = {"delimiter": ";", "column_names": ["label", "text"]}
    splits = load(train=str(path), validation=str(path), options=options)
    assert splits["train"].to_list() == [
        {"label": 0, "text": "good day"},
        {"label": 1, "text": "bad day"},
    ]


def test_a_path_into_a_package(tmp_path, monkeypatch):
    package = tmp_path / "a_package_with_rows"
    package.mkdir()
    (package / "__init__.py").touch()
    write_csv(package / "rows.csv", ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    path = "package:a_package_with_rows/rows.csv"
    assert load(train=path, validation=path)["train"].to_list() == ROWS


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no.csv", "data.train: no.csv is not a file"),
        (".", "data.train: . is not a file"),
        ("package:no_such_package/x.csv", "data.train: package:no_such_package/x.csv: package"),
    ],
)
def test_a_missing_file_is_named(path, problem):
    assert only_problem(load, train=path).startswith(problem)


def test_a_missing_validation_file_is_named(numbers):
    problem = only_problem(load, train=numbers, validation="no.csv")
    assert problem == "data.validation: no.csv is not a file"


def test_a_wrong_suffix_lists_the_right_ones(tmp_path):
    path = tmp_path / "rows.xlsx"
    path.write_bytes(b"")
    problem = only_problem(load, train=str(path))
    assert problem == (
        f"data.train: {path} ends in '.xlsx'; allowed are "
        ".csv, .tsv, .json, .jsonl, .parquet, .txt, .text"
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", b""),
        ("rows.csv", b"\xff\xfe\x00\x01\x80"),
        ("rows.json", b"{nope"),
        ("rows.jsonl", b'{"text": "a"}\n{nope'),
        ("rows.parquet", b"PAR1 but not really"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, streaming):
    path = tmp_path / name
    path.write_bytes(content)
    config = FilesConfig(source="files", train=str(path))
    problem = only_problem(load_splits, config, streaming=streaming)
    assert problem.startswith(f"data.train: {path} cannot be read: ")
    assert "\n" not in problem


def test_an_option_the_reader_does_not_have(numbers):
    problem = only_problem(load, train=numbers, options={"nonsense": 1})
    assert problem.startswith(f"data.train: {numbers} cannot be read: TypeError")
    assert "nonsense" in problem


# Text and labels as they are written.

SENTIMENT = make_task(ClassificationConfig(type="classification", text=["text"], label="label"))


def load_for_a_task(**settings):
    return load_splits(FilesConfig(source="files", **settings), SENTIMENT)


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_text_stays_as_it_is_written(tmp_path, suffix):
    texts = ["007", "1e3", "true", "2024-01-02", "NA", "1,5", " a ", "0x10", "inf"]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, rows)
    assert load_for_a_task(train=str(path), validation=str(path))["train"].to_list() == rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_an_empty_field_is_the_empty_text(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [*ROWS, {"text": "", "label": 1}, {"text": " ", "label": 0}])
    splits = load_for_a_task(train=str(path), validation=str(path))
    assert splits["train"].to_list()[-2:] == [{"text": "", "label": 1}, {"text": " ", "label": 0}]
    as_json = tmp_path / "rows.jsonl"
    as_json.write_text("".join(json.dumps(row) + "\n" for row in splits["train"]))
    again = load_for_a_task(train=str(as_json), validation=str(path))
    assert again["train"].to_list() == splits["train"].to_list()


def test_empty_fields_are_empty_texts_however_they_are_written(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\nx,0\n,1\n"",0\nnull,1\n', encoding="utf-8")
    splits = load_for_a_task(train=str(path), validation=str(path))
    assert splits["train"]["text"][:] == ["x", "", "", "null"]
    path.write_text('text,label\n,1\n"",0\n', encoding="utf-8")
    splits = load_for_a_task(train=str(path), validation=str(path))
    assert splits["train"]["text"][:] == ["", ""]
    path.write_text("text,label\nx,0\ny,\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match="1 rows of the train data have no value in column 'label'"
    ):
        load_for_a_task(train=str(path), validation=str(path))


def test_text_of_a_json_field_stays_as_it_is_written(tmp_path):
    rows = [{"text": text, "label": i} for i, text in enumerate(["007", "2024-01-02"])]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": rows}), encoding="utf-8")
    splits = load_for_a_task(train=str(path), validation=str(path), options={"field": "data"})
    assert splits["train"].to_list() == rows


def test_text_that_is_renamed_in_one_file_alone_stays_as_it_is_written(tmp_path):
    write_csv(tmp_path / "train.csv", [{"text": "007", "label": 0}, {"text": "8", "label": 1}])
    write_csv(tmp_path / "dev.csv", [{"words": "009", "label": 1}])
    train, dev = str(tmp_path / "train.csv"), str(tmp_path / "dev.csv")
    splits = load_for_a_task(train=train, validation=dev, rename={"words": "text"})
    assert splits["train"]["text"][:] == ["007", "8"]
    assert splits["validation"]["text"][:] == ["009"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["0", "1", "10"], [0, 1, 10]),
        (["007", "7", "8"], ["007", "7", "8"]),
        (["1.0", "2.0", "1.0"], ["1.0", "2.0", "1.0"]),
        (["true", "false", "NA"], ["true", "false", "NA"]),
    ],
)
def test_labels_of_a_table_are_numbers_where_all_are_written_so(tmp_path, written, read):
    path = str(tmp_path / "rows.csv")
    write_csv(tmp_path / "rows.csv", [{"text": "a", "label": label} for label in written])
    assert load_for_a_task(train=path, validation=path)["train"]["label"][:] == read


def test_a_table_and_json_have_the_same_labels(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    write_csv(tmp_path / "train.csv", rows)
    write_jsonl(tmp_path / "dev.jsonl", rows)
    splits = load_for_a_task(
        train=str(tmp_path / "train.csv"), validation=str(tmp_path / "dev.jsonl")
    )
    assert splits["train"].to_list() == splits["validation"].to_list() == rows


# Names, splits and cuts.


def test_columns_are_renamed_wherever_they_occur(tmp_path):
    write_csv(tmp_path / "train.csv", [{"sentence": "a", "label": 0}])
    write_csv(tmp_path / "dev.csv", [{"content": "b", "label": 1}])
    splits = load(
        train=str(tmp_path / "train.csv"),
        validation=str(tmp_path / "dev.csv"),
        rename={"content": "sentence", "label": "answer"},
    )
    assert splits["train"].to_list() == [{"sentence": "a", "answer": 0}]
    assert splits["validation"].to_list() == [{"sentence": "b", "answer": 1}]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_rename_to_a_name_that_is_taken_is_refused(numbers, streaming):
    config = FilesConfig(source="files", train=numbers, rename={"number": "label"})
    problem = only_problem(load_splits, config, streaming=streaming)
    assert problem.startswith("data.rename")
    assert "'label'" in problem


def test_a_share_is_held_out_where_there_is_no_validation_split(numbers):
    splits = load(train=numbers, validation_share=0.2)
    train, validation = (splits[name]["number"][:] for name in ("train", "validation"))
    assert (len(train), len(validation)) == (80, 20)
    assert sorted(train + validation) == list(range(100))


def test_the_seed_chooses_what_is_held_out(numbers):
    held_out = [
        load(train=numbers, validation_share=0.2, split_seed=seed)["validation"]["number"][:]
        for seed in (0, 0, 1)
    ]
    assert held_out[0] == held_out[1]
    assert set(held_out[0]) != set(held_out[2])


def test_too_few_rows_to_hold_any_out(tmp_path):
    write_csv(tmp_path / "rows.csv", ROWS[:1])
    problem = only_problem(load, train=str(tmp_path / "rows.csv"))
    assert problem.startswith("data.")
    assert "validation" in problem


def test_max_rows(numbers):
    whole = load(train=numbers, validation=numbers)
    splits = load(train=numbers, validation=numbers, max_train_rows=7, max_validation_rows=5)
    assert splits["validation"]["number"][:] == [0, 1, 2, 3, 4]
    few = splits["train"]["number"][:]
    assert len(set(few)) == 7
    assert few != list(range(7))  # a file sorted by label must not give one label alone
    assert few == load(train=numbers, validation=numbers, max_train_rows=7)["train"]["number"][:]
    other = load(train=numbers, validation=numbers, max_train_rows=7, split_seed=1)
    assert set(other["train"]["number"]) != set(few)
    for limit in (100, 1000):
        splits = load(
            train=numbers, validation=numbers, max_train_rows=limit, max_validation_rows=limit
        )
        assert splits["train"].to_list() == whole["train"].to_list()
        assert splits["validation"].to_list() == whole["validation"].to_list()


def test_rows_held_out_are_not_trained_on_where_training_is_cut(numbers):
    splits = load(train=numbers, validation_share=0.3, max_train_rows=50)
    assert len(splits["train"]) == 50
    assert not set(splits["train"]["number"]) & set(splits["validation"]["number"])


def test_a_look_at_the_columns_reads_no_rows(numbers):
    config = FilesConfig(source="files", train=numbers, rename={"number": "n"}, max_train_rows=3)
    splits = load_splits(config, streaming=True)
    assert list(splits) == ["train"]
    assert isinstance(splits["train"], datasets.IterableDataset)
    assert sorted(splits["train"].column_names) == ["label", "n"]


# Further validation sets.


def test_further_sets_are_read_renamed_and_cut_like_the_first(tmp_path, numbers):
    write_csv(tmp_path / "other.csv", [{"number": -i} for i in range(5)])
    other = str(tmp_path / "other.csv")
    splits = load(
        train=numbers,
        extra_validation={"other": other, "both": [other, other]},
        rename={"number": "n"},
        max_train_rows=7,
        max_validation_rows=8,
    )
    assert list(splits) == ["train", "validation", "other", "both"]
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 7,
        "validation": 8,
        "other": 5,
        "both": 8,
    }
    assert splits["other"]["n"][:] == [0, -1, -2, -3, -4]
    streamed = load_splits(
        FilesConfig(source="files", train=numbers, extra_validation={"other": other}),
        streaming=True,
    )
    assert list(streamed) == ["train", "other"]


def test_a_further_split_of_a_local_copy_of_a_dataset(tmp_path):
    for name in ("train", "validation_matched", "validation_mismatched"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}] * 3)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(
            f"  - split: {name}\n    path: {name}.jsonl\n"
            for name in ("train", "validation_matched", "validation_mismatched")
        )
        + "---\n"
    )
    settings = {"source": "hub", "path": str(tmp_path), "validation_split": "validation_matched"}
    config = HubConfig(**settings, extra_validation={"mismatched": "validation_mismatched"})
    splits = load_splits(config)
    assert {name: split["text"][0] for name, split in splits.items()} == {
        "train": "train",
        "validation": "validation_matched",
        "mismatched": "validation_mismatched",
    }
    assert data_identity(config) != data_identity(HubConfig(**settings))
    wrong = HubConfig(**settings, extra_validation={"mismatched": "nothing"})
    problem = only_problem(load_splits, wrong)
    assert problem.startswith("data.extra_validation.mismatched: ")
    assert "(split 'nothing')" in problem


def test_a_missing_file_of_a_further_set_is_named(numbers):
    problem = only_problem(load, train=numbers, extra_validation={"other": "no.csv"})
    assert problem == "data.extra_validation.other: no.csv is not a file"


@pytest.mark.parametrize("name", ["train", "validation", "a/b", ""])
def test_a_further_set_needs_a_name_of_its_own(name):
    values = {"source": "files", "train": "t.csv", "extra_validation": {name: "v.csv"}}
    with pytest.raises(ConfigError, match=r"data\.extra_validation"):
        parse_config({"data": values})


# Joined sources.


def joined(*parts, **settings):
    return JoinedConfig(source="joined", parts=list(parts), **settings)


@pytest.fixture
def corpora(tmp_path):
    """Two corpora that call their texts differently, and have another column each."""
    write_jsonl(tmp_path / "wiki.jsonl", [{"text": f"w{i}", "title": "t"} for i in range(6)])
    write_jsonl(tmp_path / "books.jsonl", [{"page": i, "passage": f"b{i}"} for i in range(4)])
    wiki = {"source": "files", "train": str(tmp_path / "wiki.jsonl")}
    books = {"source": "files", "train": str(tmp_path / "books.jsonl")}
    return wiki, {**books, "rename": {"passage": "text"}}


def test_parts_follow_each_other_with_the_columns_all_have(corpora, tmp_path):
    wiki, books = corpora
    write_jsonl(tmp_path / "held.jsonl", [{"text": "held"}])
    splits = load_splits(joined({**wiki, "validation": str(tmp_path / "held.jsonl")}, books))
    assert splits["train"].to_list() == [
        *({"text": f"w{i}"} for i in range(6)),
        *({"text": f"b{i}"} for i in range(4)),
    ]
    assert splits["validation"].to_list() == [{"text": "held"}]  # a part without one only trains
    config = joined(*corpora, rename={"text": "document"})
    assert load_splits(config, streaming=True)["train"].column_names == ["document"]


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_several_kinds_of_files_join(tmp_path, streaming):
    rows = [{"text": "007", "label": i} for i in range(3)]
    for suffix, write in WRITERS.items():
        write(tmp_path / f"rows{suffix}", rows)
    parts = [{"source": "files", "train": str(tmp_path / f"rows{suffix}")} for suffix in WRITERS]
    splits = load_splits(joined(*parts), SENTIMENT, streaming=streaming)
    if streaming:
        assert sorted(splits["train"].column_names) == ["label", "text"]
    else:
        found = splits["train"].to_list() + splits["validation"].to_list()
        assert Counter(row["label"] for row in found) == dict.fromkeys(range(3), len(WRITERS))
        assert {row["text"] for row in found} == {"007"}


def test_a_share_of_all_parts_is_held_out_where_none_has_a_validation_split(corpora):
    wiki, books = corpora
    splits = load_splits(joined(wiki, {**books, "max_train_rows": 2}, validation_share=0.25))
    texts = {name: split["text"][:] for name, split in splits.items()}
    assert [len(texts[name]) for name in ("train", "validation")] == [6, 2]
    assert len({text for text in texts["train"] + texts["validation"] if text[0] == "b"}) == 2


def test_what_is_wrong_with_a_part_names_the_part(corpora, tmp_path):
    wiki, books = corpora
    with pytest.raises(ConfigError) as raised:
        load_splits(joined(wiki, {**books, "train": "no.csv"}, {**wiki, "validation": "no.txt"}))
    assert [str(p) for p in raised.value.problems] == [
        "data.parts.1.train: no.csv is not a file",
        "data.parts.2.validation: no.txt is not a file",
    ]
    with pytest.raises(ConfigError) as raised:
        data_identity(joined(wiki, {**books, "train": "no.csv"}))
    assert [str(p) for p in raised.value.problems] == ["data.parts.1.train: no.csv is not a file"]
    write_jsonl(tmp_path / "numbers.jsonl", [{"text": 3}])
    number = {"source": "files", "train": str(tmp_path / "numbers.jsonl")}
    assert only_problem(load_splits, joined(wiki, number)).startswith(
        "data.parts: the train rows of all parts cannot be joined"
    )


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"source": "files"}, "data.parts.0.train: missing"),
        ({"source": "files", "train": "t", "trian": 1}, "data.parts.0.trian: unknown key"),
        ({"source": "joined", "parts": []}, "data.parts.0.source: got 'joined'; allowed are"),
        ({"source": "files", "train": "t", "split_seed": 1}, "data.parts.0.split_seed: is of all"),
    ],
)
def test_settings_of_a_part_are_checked_as_such(part, problem):
    with pytest.raises(ConfigError) as raised:
        parse_config({"data": {"source": "joined", "parts": [part]}})
    assert any(str(found).startswith(problem) for found in raised.value.problems), (
        raised.value.problems
    )


def test_identity_of_joined_sources_follows_each_part(corpora, tmp_path):
    original = data_identity(joined(*corpora))
    assert data_identity(joined(*corpora)) == original
    assert data_identity(joined(*corpora[::-1])) != original
    assert data_identity(joined(*corpora, validation_share=0.2)) != original
    write_jsonl(tmp_path / "books.jsonl", [{"page": 0, "passage": "another"}])
    assert data_identity(joined(*corpora)) != original
    json.dumps(original)


def test_a_part_on_the_hub_is_not_local(corpora, tmp_path):
    assert is_local(joined(*corpora))
    assert is_local(joined(*corpora, {"source": "hub", "path": str(tmp_path)}))
    assert not is_local(joined(*corpora, {"source": "hub", "path": "wikimedia/wikipedia"}))


# Functions.


@pytest.fixture
def module(tmp_path, monkeypatch):
    """An importable module with functions that make data, right and wrong."""
    source = """
        from datasets import Dataset, DatasetDict

        def rows(number=3, only=None):
            made = Dataset.from_dict({"text": ["x"] * number, "label": [0] * number})
            splits = {"train": made, "validation": made.select(range(1))}
            return DatasetDict({only: made} if only else splits)

        def of_a_file(path):
            with open(path, encoding="utf-8") as file:
                return DatasetDict(train=Dataset.from_dict({"text": list(file)}))

        calls = []

        def shuffled(number=8):
            calls.append(None)
            order = [(3 * i + len(calls)) % number for i in range(number)]
            return DatasetDict(train=rows(number)["train"].add_column("i", order))

        def counted_once(number=8):
            calls.append(None)
            return rows(number + (len(calls) > 1))

        def as_before(number=8):
            calls.append(None)
            return rows(number)

        def named(*names):
            made = rows()["train"]
            return DatasetDict({name: made for name in ["train", *names]})

        def dev():
            return named("dev", "test")

        def of_glue():
            return named("validation_matched", "validation_mismatched")

        def capital():
            return named("Validation")

        def with_test():
            return named("test", "unsupervised")

        def both():
            return named("validation", "dev")

        def no_dataset():
            return [{"text": "x"}]

        value = 3
    """
    path = tmp_path / "functions_of_a_test.py"
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    sys.modules.pop("functions_of_a_test", None)


def function_config(name, **arguments):
    return FunctionConfig(
        source="function", function=f"functions_of_a_test:{name}", arguments=arguments
    )


@pytest.mark.usefixtures("module")
def test_rows_of_a_function():
    splits = load_splits(function_config("rows", number=5))
    assert splits["train"].to_list() == [{"text": "x", "label": 0}] * 5
    assert len(splits["validation"]) == 1
    held_out = load_splits(function_config("rows", number=10, only="train"))
    assert {name: len(split) for name, split in held_out.items()} == {"train": 9, "validation": 1}
    config = function_config("rows", number=5)
    named = config.model_copy(update={"extra_validation": {"again": "validation"}})
    assert list(load_splits(named)) == ["train", "validation", "again"]
    wrong = config.model_copy(update={"extra_validation": {"again": "test"}})
    assert only_problem(load_splits, wrong).startswith("data.extra_validation.again: functions_")


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["nothing", "no_dataset", "value"])
def test_a_function_that_gives_no_data(name):
    problem = only_problem(load_splits, function_config(name))
    assert problem.startswith(f"data.function: functions_of_a_test:{name} ")


@pytest.mark.usefixtures("module")
def test_a_function_without_a_train_split():
    problem = only_problem(load_splits, function_config("rows", only="test"))
    assert problem == (
        "data.function: functions_of_a_test:rows must return a DatasetDict with a 'train' split, "
        "got \"DatasetDict of ['test']\""
    )


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "unused"),
    [("dev", "dev"), ("of_glue", "validation_matched"), ("capital", "Validation")],
)
def test_a_split_that_is_meant_for_validation_is_not_passed_over(name, unused):
    assert only_problem(load_splits, function_config(name)) == (
        f"data.function: functions_of_a_test:{name} returns no split 'validation' but {unused!r}; "
        "call it 'validation', name it in data.extra_validation, or leave it out: a share of the "
        "training rows is held out then"
    )


@pytest.mark.usefixtures("module")
def test_splits_that_are_not_used():
    assert list(load_splits(function_config("with_test"))) == ["train", "validation"]
    assert list(load_splits(function_config("both"))) == ["train", "validation"]
    config = function_config("dev").model_copy(update={"extra_validation": {"d": "dev"}})
    assert list(load_splits(config)) == ["train", "validation", "d"]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["shuffled", "counted_once"])
def test_rows_that_differ_at_each_call_are_refused(name):
    config = function_config(name)
    identity = data_identity(config)
    problem = only_problem(lambda: load_splits(config, identity=identity))
    assert problem == (
        f"data.function: functions_of_a_test:{name} returned other rows than when the run's keys were "
        "made; let it return the same rows at each call and in each process: seed what it draws"
    )
    part = JoinedConfig(source="joined", parts=[function_config("rows"), config])
    sys.modules["functions_of_a_test"].calls.clear()
    identity = data_identity(part)
    problem = only_problem(lambda: load_splits(part, identity=identity))
    assert problem.startswith(f"data.parts.1.function: functions_of_a_test:{name} returned other")


@pytest.mark.usefixtures("module")
def test_rows_that_are_the_same_at_each_call_are_taken():
    for config in (
        function_config("as_before"),
        JoinedConfig(
            source="joined", parts=[function_config("as_before"), function_config("rows")]
        ),
    ):
        assert load_splits(config, identity=data_identity(config)) is not None


def test_a_file_that_changed_since_the_keys_were_made_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(path, ROWS)
    config = FilesConfig(source="files", train=str(path))
    identity = data_identity(config)
    assert len(load_splits(config, identity=identity)["train"])
    write_csv(path, ROWS[:-1])
    assert only_problem(lambda: load_splits(config, identity=identity)) == (
        "data: its files changed after the run's keys were made; run again"
    )
    part = JoinedConfig(source="joined", parts=[config])
    identity = data_identity(part)
    write_csv(path, ROWS)
    assert only_problem(lambda: load_splits(part, identity=identity)).startswith(
        "data.parts.0: its"
    )


@pytest.mark.usefixtures("module")
def test_an_argument_the_function_does_not_have():
    problem = only_problem(load_splits, function_config("rows", nonsense=1))
    assert problem.startswith("data.")
    assert "nonsense" in problem


def test_a_missing_module_is_named():
    config = FunctionConfig(source="function", function="no_such_module:rows")
    problem = only_problem(load_splits, config)
    assert problem.startswith("data.function: no_such_module:rows cannot be imported: ")


# What names the content.


def test_identity_is_the_content_and_not_how_it_is_read(tmp_path):
    def identity(path, **settings):
        return data_identity(FilesConfig(source="files", train=str(path), **settings))

    first, moved = tmp_path / "a.csv", tmp_path / "b.csv"
    write_csv(first, ROWS)
    write_csv(moved, ROWS)
    original = identity(first)
    assert identity(first) == original
    assert identity(first, num_proc=4) == original
    assert identity(moved) == original
    assert identity(first, split_seed=1) != original
    assert identity(first, max_train_rows=3) != original
    assert identity(first, validation=str(moved)) != original
    write_csv(first, ROWS[:-1])
    assert identity(first) != original
    json.dumps(original)  # it goes into a key


def test_identity_tells_kinds_of_files_apart(tmp_path):
    # A quote is literal in one and not in the other: the rows differ, the bytes do not.
    as_text, as_csv = tmp_path / "a.tsv", tmp_path / "a.csv"
    for path in (as_text, as_csv):
        path.write_text('text\n"quoted"\n', encoding="utf-8")
    rows = [load(train=str(p), validation=str(p))["train"].to_list() for p in (as_text, as_csv)]
    assert rows[0] != rows[1]
    identities = [
        data_identity(FilesConfig(source="files", train=str(path))) for path in (as_text, as_csv)
    ]
    assert identities[0] != identities[1]


def test_identity_of_a_function_follows_its_rows(module, tmp_path):
    original = data_identity(function_config("rows"))
    assert data_identity(function_config("rows")) == original
    assert data_identity(function_config("rows", number=4)) != original
    # Of the same settings and the same source, but the file behind it was cut.
    file = tmp_path / "behind.csv"
    write_csv(file, ROWS)
    whole = data_identity(function_config("of_a_file", path=str(file)))
    write_csv(file, ROWS[:-1])
    assert data_identity(function_config("of_a_file", path=str(file))) != whole
    write_csv(file, ROWS)
    assert data_identity(function_config("of_a_file", path=str(file))) == whole


def test_identity_of_a_function_does_not_depend_on_how_rows_lie_in_memory():
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 0]}
    whole = DatasetDict(train=Dataset.from_dict(rows))
    pieces = [Dataset.from_dict({k: v[i : i + 1] for k, v in rows.items()}) for i in range(3)]
    shuffled = concatenate_datasets(pieces[::-1]).select([2, 1, 0])
    assert _rows_sha256(DatasetDict(train=shuffled)) == _rows_sha256(whole)
    swapped = DatasetDict(train=whole["train"].select([1, 0, 2]))
    assert _rows_sha256(swapped) != _rows_sha256(whole)


def test_identity_of_missing_files_and_functions():
    config = FilesConfig(source="files", train="no.csv")
    assert only_problem(data_identity, config) == "data.train: no.csv is not a file"
    config = FunctionConfig(source="function", function="no_such_module:rows")
    assert only_problem(data_identity, config).startswith("data.function: no_such_module:rows")


# The stage.


SENTENCES = {"type": "classification", "text": ["text"], "label": "label"}


def test_the_tokenizer_is_written_as_it_was_loaded(tiny_bert, words_csv, tmp_path):
    """Not with the length that rows are cut to, which whoever loads the model would not expect."""
    config = FilesConfig(source="files", train=str(words_csv), validation_share=0.25)
    task = make_task(ClassificationConfig(**SENTENCES, max_length=4))
    written = []
    for name in ("first", "from-what-datasets-remembers"):
        tokenizer = load_tokenizer(ModelConfig(path=str(tiny_bert)))
        prepare_data(config, task, tokenizer, tmp_path / name)
        files = (tmp_path / name / "tokenizer").iterdir()
        written.append({path.name: path.read_bytes() for path in files})
        found = load_tokenizer(ModelConfig(path=str(tmp_path / name / "tokenizer")))
        assert len(found("a good day is a good day")["input_ids"]) == 9
    assert written[0] == written[1]


def test_prepared_data_is_on_disk_and_counted(tmp_path, tiny_bert, words_csv):
    task = make_task(ClassificationConfig(type="classification", text=["text"], label="label"))
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_bert)))
    config = FilesConfig(source="files", train=str(words_csv), validation_share=0.25)
    figures = prepare_data(config, task, tokenizer, tmp_path)
    assert figures["num_rows"] == {"train": 36, "validation": 12}
    assert figures["num_tokens"] == {
        "train": 36 * 5,
        "validation": 12 * 5,
    }  # [CLS] a good day [SEP]
    assert figures["model_kwargs"]["num_labels"] == 2
    saved = datasets.load_from_disk(str(tmp_path / "dataset"))
    assert {name: len(split) for name, split in saved.items()} == figures["num_rows"]
    again = load_tokenizer(ModelConfig(path=str(tmp_path / "tokenizer")))
    assert again("a good day")["input_ids"] == tokenizer("a good day")["input_ids"]


def test_prepared_data_needs_its_columns(tmp_path, tiny_bert, words_csv):
    task = make_task(ClassificationConfig(type="classification", text=["text"], label="answer"))
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_bert)))
    config = FilesConfig(source="files", train=str(words_csv))
    with pytest.raises(ConfigError) as raised:
        prepare_data(config, task, tokenizer, tmp_path)
    assert [str(p) for p in raised.value.problems] == [
        "task.label: column 'answer' is not in the train data; there are: ['label', 'text']"
    ]
    assert list(tmp_path.iterdir()) == []


# Real data.


@pytest.mark.skipif(not SST2.is_dir(), reason=f"SST-2 is not there: {SST2}")
def test_sst2_is_read_row_for_row():
    splits = load(
        train=str(SST2 / "train.tsv"),
        validation=str(SST2 / "dev.tsv"),
        rename={"content": "sentence"},
    )
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 67_349,
        "validation": 872,
    }
    for name, file in (("train", "train.tsv"), ("validation", "dev.tsv")):
        lines = (SST2 / file).read_text(encoding="utf-8").split("\n")[1:]
        expected = [line.split("\t") for line in lines if line]
        assert splits[name].column_names == ["label", "sentence"]
        assert splits[name]["sentence"][:] == [sentence for _, sentence in expected]
        assert Counter(splits[name]["label"]) == Counter(int(label) for label, _ in expected)
