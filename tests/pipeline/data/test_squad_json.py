"""SQuAD's own JSON files: a row a question, read by the data stage."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from pipeline.data.files import FilesConfig
from pipeline.data.squad_json import flatten_articles, has_articles
from pipeline.data.stage import load_splits
from pipeline.errors import ConfigError

XQUAD = Path(__file__).parents[4] / "shared/data/xquad/xquad.en.json"

pytestmark = pytest.mark.usefixtures("datasets_cache")


def question(name, answers, **more):
    pairs = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": f"{name}?", "answers": pairs, **more}


CONTENT = {
    "version": "v2.0",
    "data": [
        {
            "title": "Mills",
            "paragraphs": [
                {
                    "context": "a mill of stone",
                    "qas": [
                        question("q1", [("mill", 2), ("a mill", 0)], is_impossible=False),
                        question(
                            "q2",
                            [],
                            is_impossible=True,
                            plausible_answers=[{"text": "stone", "answer_start": 10}],
                        ),
                    ],
                },
                {"context": "unused", "qas": []},
            ],
        },
        {
            "title": "1893",
            "paragraphs": [{"context": "half the price", "qas": [question("q3", [("half", 0)])]}],
        },
    ],
}
ROWS = [
    ("q1", "Mills", "a mill of stone", ["mill", "a mill"], [2, 0]),
    ("q2", "Mills", "a mill of stone", [], []),
    ("q3", "1893", "half the price", ["half"], [0]),
]


def as_tuples(rows):
    for row in rows:
        assert row["question"] == row["id"] + "?"
        answers = row["answers"]
        yield row["id"], row["title"], row["context"], answers["text"], answers["answer_start"]


def config_of(path, **changes):
    return FilesConfig(source="files", train=str(path), options={"field": "data"}, **changes)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_is_read_as_questions(tmp_path, indent, streaming):
    path = tmp_path / "train-v2.0.json"
    path.write_text(json.dumps(CONTENT, indent=indent), encoding="utf-8")
    config = config_of(path, validation=str(path))
    splits = load_splits(config, streaming=streaming)
    for split in splits.values():
        assert split.column_names == ["id", "title", "context", "question", "answers"]
        assert list(as_tuples(split)) == ROWS


def test_version_1_has_no_impossible_questions_and_may_lack_titles():
    articles = [{"paragraphs": CONTENT["data"][1]["paragraphs"]}]
    rows = flatten_articles(Dataset.from_list(articles))
    assert [row[0] for row in as_tuples(rows)] == ["q3"]
    assert rows["title"][:] == [""]


def test_a_question_without_answers_is_refused(tmp_path):
    content = json.loads(json.dumps(CONTENT))
    del content["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    path = tmp_path / "test.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.train: .* question q1 has no answers"):
        load_splits(config_of(path))


def test_other_rows_are_left_alone():
    for rows in (
        [{"text": "a"}],
        [{"paragraphs": "a"}],
        [{"paragraphs": ["a", "b"]}],
        [{"paragraphs": [{"context": "a"}]}],
    ):
        assert not has_articles(Dataset.from_list(rows))


@pytest.mark.skipif(not XQUAD.exists(), reason=f"needs XQuAD in {XQUAD}")
def test_xquad_is_read_whole():
    rows = load_splits(config_of(XQUAD, validation=str(XQUAD)))["train"]
    assert len(rows) == 1190
    assert len(set(rows["title"])) == 48
    last = set(sorted(set(rows["title"]), key=rows["title"][:].index)[-8:])
    content = json.loads(XQUAD.read_text(encoding="utf-8"))["data"]
    expected = [
        (q["id"], q["question"], p["context"], q["answers"][0]["text"])
        for article in content[-8:]
        for p in article["paragraphs"]
        for q in p["qas"]
    ]
    found = [
        (row["id"], row["question"], row["context"], row["answers"]["text"][0])
        for row in rows
        if row["title"] in last
    ]
    assert found == expected
    for row in rows:
        answers = row["answers"]
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            assert row["context"][start:].startswith(text)


def test_the_reader_of_datasets_gives_articles(tmp_path):
    """What `flatten_articles` builds on."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(CONTENT), encoding="utf-8")
    assert has_articles(load_dataset("json", data_files=[str(path)], field="data", split="train"))
