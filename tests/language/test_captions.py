"""Captions and triplets from files of any kind, what counts as equal, and files of records that survive anything."""

import json
from collections import Counter

from cli import UserError

import pytest

from language.captions import read_captions, read_done, read_edits, unique


def written(path, text):
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


JSON = [{"caption": " a cat ", "url": "http://x/1"}, {"caption": "a dog", "url": None, "more": 1}]
JSON += [{"TEXT": "a cow", "URL": "http://x/2"}, {"input": "a hen"}]  # LAION's and the authors' names


@pytest.mark.parametrize(
    ("name", "text", "captions"),
    [
        ("C.TXT", "\ufeffa cat \r\n\n  a\u2028b\nb", [("a cat", None), ("a\u2028b", None), ("b", None)]),
        ("c.jsonl", "".join(json.dumps(record) + "\n\n" for record in JSON),
         [("a cat", "http://x/1"), ("a dog", None), ("a cow", "http://x/2"), ("a hen", None)]),
        ("c.csv", 'url,size,caption\nhttp://x/1,3,"a cat, ""asleep""\non a mat"\n,4,a dog\n',
         [('a cat, "asleep"\non a mat', "http://x/1"), ("a dog", None)]),
        ("laion.csv", "URL,TEXT\nhttp://x/2,a cow\n", [("a cow", "http://x/2")]),
    ],
)  # fmt: skip
def test_captions_of_a_file(tmp_path, name, text, captions):
    assert list(read_captions(written(tmp_path / name, text))) == captions


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "name,url\na,b\n", "c.csv, line 2: a text named caption or .* is needed, but there is name, url"),
        ("c.jsonl", '{"caption": "a"}\n\n{"name": "b"}\n', "line 3: a text named"),
        ("c.jsonl", '{"caption": "a", "url": 3}\n', "line 1: 3 is not a text"),
        ("c.csv", b"caption\n\xff\n", "cannot be read"),
    ],
)
def test_files_that_hold_no_captions(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        list(read_captions(written(tmp_path / name, text)))


def test_duplicates_by_caption_or_url():
    given = [*zip(["a", "A.", "b", "", "!", "c"], ["1", "2", "1", "3", None, "2"], strict=True)]
    given += [("d", None), ("e", None), ("d", "9")]
    counts = Counter()
    assert list(unique(given, counts)) == [("a", "1"), ("d", None), ("e", None)]
    assert counts == {"duplicates": 6}


@pytest.mark.parametrize("torn", [b"", b'{"caption": "b', b'{"caption": "b"}', b"\xe5"])
def test_records_are_known_again_and_a_torn_last_line_is_cut_off(tmp_path, torn):
    """Whatever lacks its end of line was being written: even one that reads well is written anew."""
    path = tmp_path / "out.jsonl"
    assert read_done(path) == set()
    first = '{"caption": "A\u2028b!", "edit": "\u591c"}\n'.encode()
    written(path, first + torn)
    assert read_done(path) == {hash("a\u2028b")}
    assert path.read_bytes() == first


def test_a_damaged_file_is_named(tmp_path):
    with pytest.raises(UserError, match="out.jsonl cannot be read"):
        read_done(written(tmp_path / "out.jsonl", b'{"caption": "a"}\nnonsense\n'))


@pytest.mark.parametrize("names", ["caption edit output url", "input edit output url"])
@pytest.mark.parametrize("change", [lambda s: "\ufeff" + s, lambda s: s + "\n\n", lambda s: s.replace("\n", "\r\n")])
def test_edits_of_several_files(tmp_path, names, change):
    edits = [{"caption": text, "edit": "b", "output": "c", "url": None} for text in "aé"]
    lines = (json.dumps(dict(zip(names.split(), edit.values(), strict=True))) for edit in edits)
    files = [written(tmp_path / f"{number}.jsonl", change(line + "\n")) for number, line in enumerate(lines)]
    assert read_edits(*files) == edits


@pytest.mark.parametrize("line", ['{"caption": "a", "edit": " ", "output": "c"}', "[]", '{"caption": "a"', "{}"])
def test_damaged_edits_are_named(tmp_path, line):
    good = json.dumps({"caption": "a", "edit": "b", "output": "c"})
    with pytest.raises(UserError, match="edits.jsonl, line 2"):
        read_edits(written(tmp_path / "edits.jsonl", f"{good}\n{line}\n"))
