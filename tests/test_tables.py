import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.tables import Table

cells = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none())
tables = st.integers(1, 4).flatmap(
    lambda n: st.builds(
        Table,
        st.lists(st.text(min_size=1), min_size=n, max_size=n),
        st.lists(st.lists(cells, min_size=n, max_size=n), max_size=4),
    )
)


def test_numbers_stand_right_and_text_left():
    table = Table(("tensor", "count"), [("a", 5), ("longer name", 1234567)])
    assert table.text().splitlines() == [
        "tensor           count",
        "-----------  ---------",
        "a                    5",
        "longer name  1,234,567",
    ]


def test_an_absent_number_is_a_dash_and_keeps_its_column_right():
    assert Table(("x",), [(12.5,), (None,)]).text().splitlines() == ["   x", "----", "12.5", "   –"]


def test_a_column_with_any_text_stands_left():
    assert Table(("x", "y"), [(1, ""), ("ab", "")]).text().splitlines()[2] == "1"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (1e-9, "1e-09"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        (0, "0"),
        (-1000, "-1,000"),
        (True, "yes"),
        (False, "no"),
        (None, "–"),
        ("", ""),
    ],
)
def test_a_cell_is_shown_as(value, shown):
    assert Table(("a column",), [(value,)]).text().split("\n")[2].strip() == shown


def test_wide_characters_take_two_columns():
    assert Table(("name", "n"), [("層", 1), ("ab", 2)]).text().splitlines()[2:] == ["層    1", "ab    2"]


def test_a_name_cannot_steer_the_terminal():
    text = Table(("name",), [("a\nb\x1b[31m",)]).text()
    assert text.splitlines()[2] == r"a\nb\x1b[31m"


def test_empty_headers_are_not_shown():
    table = Table(("", ""), [("model", "m.onnx"), ("samples", "5")])
    assert table.text() == "model    m.onnx\nsamples  5"
    assert "<thead>" not in table.html()


def test_a_table_without_rows_shows_its_headers():
    assert Table(("a", "bc"), []).text() == "a  bc\n-  --"


def test_html_is_escaped():
    html = Table(("<b>",), [("<script>alert('&')</script>",)]).html()
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in html


def test_a_notebook_shows_the_html():
    table = Table(("a",), [(1,)])
    assert table._repr_html_() == table.html()
    assert str(table) == table.text()


class TagCounter(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@given(tables)
def test_any_table_gives_one_line_a_row_and_well_formed_html(table):
    assert len(table.text().split("\n")) == len(table.rows) + 2
    # Not even by the separators that only splitlines() knows, such as U+2028.
    assert len((table.text() + ".").splitlines()) == len(table.rows) + 2
    counter = TagCounter()
    counter.feed(table.html())
    assert counter.open == []
    assert counter.seen.count("td") == len(table.rows) * len(table.headers)
    assert set(counter.seen) <= {"table", "thead", "tbody", "tr", "th", "td"}


@given(tables)
def test_a_rule_spans_every_column(table):
    rule = table.text().split("\n")[1]
    assert len(re.findall("-+", rule)) <= len(table.headers)
    assert set(rule) <= {"-", " "}
