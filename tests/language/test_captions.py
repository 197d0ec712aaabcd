"""Captions from files of three kinds, what counts as equal, and files of records that survive anything."""

import json

from cli import UserError

import pytest

from language.captions import Records, Unique, fingerprint, read_captions


def written(path, text):
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


def test_a_text_file_holds_a_caption_a_line(tmp_path):
    path = written(tmp_path / "c.txt", "\ufeffa cat \r\n\n  ein H\u00e4uschen\u2028am See\nlast")
    assert list(read_captions(path)) == [
        ("a cat", None),
        ("", None),
        ("ein H\u00e4uschen\u2028am See", None),
        ("last", None),
    ]


def test_a_json_file_holds_an_object_a_line(tmp_path):
    records = [{"caption": " a cat ", "url": "http://x/1"}, {"caption": "a dog", "url": None, "more": 1}]
    records += [{"TEXT": "a cow", "URL": "http://x/2"}, {"input": "a hen"}]  # LAION's and the authors' names
    path = written(tmp_path / "c.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    assert list(read_captions(path)) == [
        ("a cat", "http://x/1"),
        ("a dog", None),
        ("a cow", "http://x/2"),
        ("a hen", None),
    ]


def test_a_table_names_its_columns(tmp_path):
    path = written(tmp_path / "c.csv", 'url,size,caption\nhttp://x/1,3,"a cat, ""asleep""\non a mat"\n,4,a dog\n')
    assert list(read_captions(path)) == [('a cat, "asleep"\non a mat', "http://x/1"), ("a dog", None)]
    path = written(tmp_path / "laion.csv", "URL,TEXT\nhttp://x/2,a cow\n")
    assert list(read_captions(path)) == [("a cow", "http://x/2")]
    path = written(tmp_path / "d.csv", "caption\na cat\n")
    assert list(read_captions(path)) == [("a cat", None)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.parquet", "", "are read from .txt, .jsonl and .csv"),
        ("c.csv", "text,url\na,b\n", "one of them caption or TEXT"),
        ("c.jsonl", '{"caption": "a"}\n{"text": "b"}\n', "record 2: a caption, and perhaps a url, are needed"),
        ("c.jsonl", '{"caption": "a", "url": 3}\n', "record 1"),
        ("c.csv", b"caption\n\xff\n", "cannot be read"),
    ],
)
def test_files_that_hold_no_captions(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        list(read_captions(written(tmp_path / name, text)))


def test_duplicates_by_caption_or_url():
    given = [*zip(["a", "A.", "b", "", "!", "c"], ["1", "2", "1", "3", None, "2"], strict=True)]
    given += [("d", None), ("e", None), ("d", "9")]
    unique = Unique(given)
    assert list(unique) == [("a", "1"), ("d", None), ("e", None)]
    assert unique.skipped == 6


# ---- records ----


def test_records_are_kept_and_known_again(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    records = Records(path)
    assert records.keys == set()
    records.append({"caption": "a\u2028b", "edit": "\u591c"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"caption": "a\u2028b", "edit": "\u591c"}  # at once
    records.append({"caption": "C!"})
    again = Records(path)
    assert again.keys == {fingerprint("a\u2028b"), fingerprint("c")}
    again.append({"caption": "d"})
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("torn", [b'{"caption": "b', b'{"caption": "b"}', b"\xe5", b"{"])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    """Whatever lacks its end of line was being written: even one that reads well is written anew."""
    path = written(tmp_path / "out.jsonl", b'{"caption": "a"}\n' + torn)
    records = Records(path)
    assert records.keys == {fingerprint("a")}
    records.append({"caption": "b"})
    assert path.read_bytes() == b'{"caption": "a"}\n{"caption": "b"}\n'


def test_a_damaged_line_is_named(tmp_path):
    path = written(tmp_path / "out.jsonl", b'{"caption": "a"}\nnonsense\n{"caption": "b"}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        Records(path)
