"""One reader of text files: kinds by content, encodings, line ends, columns, and what is no such file."""

import json

from cli import UserError

import pytest

from formats.tables import read_rows, text_of

ROWS = [{"caption": "a “cat”, asleep", "url": "http://x/1"}, {"caption": "a dog", "url": ""}]
CSV = '\ncaption{d}url\n\n"a “cat”, asleep"{d}http://x/1\n {d} \na dog\n'
KINDS = {
    "lines.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n\n",
    "list.json": json.dumps(ROWS, indent=1),
    "table.csv": CSV.format(d=","),
    "excel.csv": CSV.format(d=";"),
    "TABLE.TSV": CSV.format(d="\t"),
    "table.txt": CSV.format(d=",").replace("caption", " Caption "),  # Excel's "Unicode text", or a wrong suffix
    "nosuffix": "\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", KINDS)
def test_one_table_in_all_its_forms(tmp_path, name, end, encoding):
    (tmp_path / name).write_bytes(KINDS[name].replace("\n", end).encode(encoding))
    assert [row for _, row in read_rows(tmp_path / name, ["caption"])] == ROWS


def test_a_text_a_line_with_the_places_of_the_lines(tmp_path):
    path = tmp_path / "T.TXT"
    path.write_bytes("\ufeff\r\n  a\u2028cat, and; more\r\n\n[a] {dog}".encode())
    expected = [(f"{path}, line 2", {"": "a\u2028cat, and; more"}), (f"{path}, line 4", {"": "[a] {dog}"})]
    assert list(read_rows(path, ["caption"])) == expected
    path.write_text('\n["a cat",\n"a dog"]')
    assert [row for _, row in read_rows(path)] == [{"": "a cat"}, {"": "a dog"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9\n", "cannot be read .text in UTF-8, CSV or JSON is expected.: 'utf-8' codec"),
        ("a cat".encode("utf-16-le"), "it is a binary file"),
        (b"\n<!DOCTYPE html>\n<title>login", "a web page or a git-lfs pointer"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a web page or a git-lfs pointer"),
        (b'{"a": 1}\n\n{"a": \n', "line 3: this is no JSON"),
        (b'{"a": 1}\n3\n', "line 2: a JSON object is needed, not 3"),
        (b'[{"a": 1}, 3]', "record 2: a JSON object is needed, not 3"),
        (b'[{"a": 1},', "cannot be read .*: Expecting value"),
        (b"caption,url\n\na cat, asleep,u\n", "line 3: 3 cells, but the header has 2; texts with a ',' need quotes"),
        (b'caption,url\n"a cat,u\na dog,u\n', "unexpected end of data"),
    ],
)
def test_what_is_no_such_file(tmp_path, data, message):
    (tmp_path / "file.txt").write_bytes(data)
    with pytest.raises(UserError, match=f"file.txt.* {message}"):
        list(read_rows(tmp_path / "file.txt", ["caption"]))


def test_the_text_of_a_row():
    assert text_of({"b": " x ", "a": None}, ["a", "b"]) == "x"
    assert text_of({"c": 1}, ["a"], needed=False) == ""
    for row, message in [({"c": "x"}, "a text named a or b is needed, but there is c"), ({"a": 3}, "3 is not a text")]:
        with pytest.raises(ValueError, match=message):
            text_of(row, ["a", "b"])
    with pytest.raises(UnicodeEncodeError):
        text_of({"a": "\ud800"}, ["a"])
