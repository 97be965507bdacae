"""Tables of words, GRID's .align files, Praat's TextGrids: read, or refused for what is wrong with them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from avppc.data.words import Word, read_table, read_word_file

PAUSES = frozenset({"sil", "sp"})
GRID = Path(__file__).parents[3] / "shared" / "data" / "grid-s1"


def words_of(path: Path, content: str | bytes, read=read_table) -> list[tuple[str, float, float, str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = read(path, PAUSES)
    assert found.refused == []
    return [(word.clip, word.first, word.last, word.text) for word in found.words]


class TestTables:
    WORDS = (("a", 23.75, 29.5, "bin"), ("b/c.mp4", 0.0, 4.0, "at"))

    @pytest.mark.parametrize(
        "content",
        [
            "clip\tstart_frame\tend_frame\tword\na\t23.75\t29.5\tbin\na\t0\t1\tsil\nb/c.mp4\t0\t4\tat\n",
            "clip,start_frame,end_frame,word\na,23.75,29.5,bin\n\nb/c.mp4,0,4,at",
            "clip,start_seconds,end_seconds,word\na,0.95,1.18,bin\nb/c.mp4,0,0.16,at\n",
            "WORD, Note ,clip,end_frame,start_frame\r\nbin,x,a,29.5,23.75\r\nSIL,,a,2,1\r\nat,y,b/c.mp4,4,0\r\n",
            '"clip","start_frame","end_frame","word"\n"a","23.75","29.5","bin"\n"b/c.mp4","0","4"," at "\n',
            "\ufeffclip,start_frame,end_frame,word\na,23.75,29.5,bin\nb/c.mp4,0,4,at\n",
            "clip\tstart_frame\tend_frame\tword\na\t23.75\t29.5\tbin\nb/c.mp4\t0\t4\tat\n".encode("utf-16"),
        ],
        ids=["tab", "comma", "seconds", "other-order", "quoted", "byte-order-mark", "utf-16"],
    )
    def test_ways_to_write_one(self, tmp_path, content):
        assert words_of(tmp_path / "words.txt", content) == [*self.WORDS]

    def test_what_it_says_of_each_word(self, tmp_path):
        (tmp_path / "w.csv").write_text(
            "clip,start_frame,end_frame,word,split,speaker\n"
            "a,1,2,sp,test,ann\n"
            "a,2,3,gru\u0308n,test,ann\n"  # two characters that look like one
        )
        found = read_table(tmp_path / "w.csv", PAUSES)
        assert found.words == [Word("a", 2.0, 3.0, "gr\u00fcn", "w.csv, line 3", "test", "ann")]
        assert (found.ignored, found.has_splits) == (1, True)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "is empty"),
            ("\n \n", "is empty"),
            ("clip,start_frame,end_frame,word\n", "has a header and no rows"),
            ("a\t23.75\t29.5\tbin\n", "it is 'a.t23.75.t29.5.tbin': it lacks clip, word, start_frame and end_frame or"),
            ("clip,start,end,word\na,1,2,b\n", "it lacks start_frame and end_frame or start_seconds and end_seconds"),
            ("clip,start_frame,word\na,1,b\n", "it lacks start_frame and end_frame or"),
            ("clip;start_frame;end_frame;word\na;1;2;b\n", "columns are separated by tabs or commas"),
            ("clip,clip,start_frame,end_frame,word\na,a,1,2,b\n", "it has a column twice"),
            ("clip,start_frame,end_frame,start_seconds,end_seconds,word\n", "frames and seconds, of which one"),
            ("clip,start_frame,end_frame,word\na,1,2,\xe4\n".encode("latin-1"), "UTF-8.* it has byte 0xe4 in line 2"),
            (b"\xff\xfec", "UTF-16 with a byte order mark; it has byte"),
            (b"clip,start_frame,end_frame,word\na,1,2,b\0\n", "it has zero bytes"),
            ('clip,start_frame,end_frame,word\na,1,2,"b\n', "line 2: unexpected end of data"),
            (f"clip,start_frame,end_frame,word\n{'a' * 200_000},1,2,b\n", "line 2: field larger than field limit"),
        ],
    )
    def test_what_is_none(self, tmp_path, content, message):
        path = tmp_path / "words.tsv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message) as error:
            read_table(path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        ("row", "clip", "reason"),
        [
            ("a,5,5,b", "a", "word that does not end after it begins: 'b', w.csv, line 2"),
            ("a,5,4,b", "a", "word that does not end after it begins: 'b', w.csv, line 2"),
            ("a,-1,4,b", "a", "word outside any recording: 'b', w.csv, line 2"),
            ("a,1,1e9,b", "a", "word outside any recording: 'b', w.csv, line 2"),
            ("a,one,2,b", "a", "word whose time is no number: 'b', w.csv, line 2"),
            ("a,nan,2,b", "a", "word whose time is no number: 'b', w.csv, line 2"),
            ("a,1,inf,b", "a", "word whose time is no number: 'b', w.csv, line 2"),
            ("a,1,,b", "a", "word whose time is no number: 'b', w.csv, line 2"),
            ("a,1,2,", "a", "word without a text: '', w.csv, line 2"),
            ("a,1,2,b\x1b[31m", "a", "word with characters that cannot be printed: 'b\\x1b[31m', w.csv, line 2"),
            ("a,1,2,b\u200b", "a", "word with characters that cannot be printed: 'b\\u200b', w.csv, line 2"),
            (f"a,1,2,{'b' * 101}", "a", f"word of more than 100 characters: {'b' * 101!r}, w.csv, line 2"),
            ("a,1,2", "a", "row of 3 columns in a table of 4: w.csv, line 2"),
            ("a,1,2,b,c", "a", "row of 5 columns in a table of 4: w.csv, line 2"),
            (",1,2,b", "w.csv", "row without a clip: w.csv, line 2"),
        ],
    )
    def test_a_bad_row_is_refused_and_the_others_kept(self, tmp_path, row, clip, reason):
        (tmp_path / "w.csv").write_text(f"clip,start_frame,end_frame,word\n{row}\nz,1,2,good\n")
        found = read_table(tmp_path / "w.csv")
        assert found.refused == [(clip, reason)]
        assert [word.text for word in found.words] == ["good"]


class TestAlign:
    def test_its_times_are_in_1_25000_s(self, tmp_path):
        content = "0 23750 sil\n23750 29500 bin\r\n\n34000 35500 sp\n71250 74500 now\n"
        assert words_of(tmp_path / "a.align", content, read_word_file) == [
            ("a", 23.75, 29.5, "bin"),
            ("a", 71.25, 74.5, "now"),
        ]

    @pytest.mark.skipif(not GRID.is_dir(), reason=f"{GRID} is not there")
    def test_frames_of_grid_come_out_as_its_table_has_them(self, tmp_path):
        with (GRID / "words.tsv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file, delimiter="\t") if row["clip"] == "bbaf2n"]
        times = [(float(row["start_frame"]), float(row["end_frame"]), row["word"]) for row in rows]
        lines = (f"{round(first * 1000)} {round(last * 1000)} {word}\n" for first, last, word in times)
        found = words_of(tmp_path / "bbaf2n.align", "".join(lines), read_word_file)
        assert found == [("bbaf2n", *time) for time in times if time[2] not in PAUSES]
        assert len(found) == 6

    @pytest.mark.parametrize("content", ["0 23750\n", "0 23750 two words\n", "hello\n"])
    def test_what_is_none(self, tmp_path, content):
        (tmp_path / "a.align").write_text(content)
        with pytest.raises(ValueError, match=r"a.align, line 1: must be a start, an end and a word, got"):
            read_word_file(tmp_path / "a.align")


LONG = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2.4
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 2.4
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 2.4
            text = "b"
    item [2]:
        class = "TextTier" ! points, not intervals
        name = "clicks"
        xmin = 0
        xmax = 2.4
        points: size = 1
        points [1]:
            number = 1.5
            mark = "here"
    item [3]:
        class = "IntervalTier"
        name = "{name}"
        xmin = 0
        xmax = 2.4
        intervals: size = 4
        intervals [1]:
            xmin = 0
            xmax = 0.95
            text = ""
        intervals [2]:
            xmin = 0.95
            xmax = 1.18
            text = "bin"
        intervals [3]:
            xmin = 1.18
            xmax = 1.5
            text = "sil"
        intervals [4]:
            xmin = 1.5
            xmax = 1.76
            text = "say ""12"""
'''
SHORT = """File type = "ooTextFile"
"TextGrid"
0
2.4
<exists>
1
"IntervalTier"
"anything"
0
2.4
2
0.95
1.18
"bin"
1.5
1.76
"say ""12""\"
"""


class TestTextGrids:
    WORDS = (("a", 23.75, 29.5, "bin"), ("a", 37.5, 44.0, 'say "12"'))

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("content", [LONG.format(name="words"), LONG.format(name="ann - words"), SHORT])
    def test_long_and_short_ones(self, tmp_path, content, encoding):
        assert words_of(tmp_path / "a.TextGrid", content.encode(encoding), read_word_file) == [*self.WORDS]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (LONG.format(name="others"), "one tier of intervals, or one named 'words'; it has 'phones', 'others'"),
            (LONG.format(name="words")[:800], "is no TextGrid, or is cut off"),
            (LONG.format(name="words").replace("TextGrid", "PitchTier"), "is no TextGrid, or is cut off"),
            (SHORT.replace("\n2\n", "\n-2\n"), "is no TextGrid, or is cut off"),
            ("ooBinaryFile\x08TextGrid", "must begin with ooTextFile"),
        ],
    )
    def test_what_is_none(self, tmp_path, content, message):
        path = tmp_path / "a.TextGrid"
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"a.TextGrid .*{message}"):
            read_word_file(path)
