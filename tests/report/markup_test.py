"""Text as HTML: escaped, with what is hidden made visible."""

import json

from hypothesis import given
from hypothesis import strategies as st

from montessori_jax.report.markup import Cell, Column, escape, json_block, slug, table, visible


def test_hidden_characters_are_written_as_code_points():
    assert visible("a\u202eb\x00c\x1b\u200b\U000e0041\ufffe\uffff") == (
        "a<U+202E>b<U+0000>c<U+001B><U+200B><U+E0041><U+FFFE><U+FFFF>"
    )
    # Line ends, tabs and the joiners of Persian and emoji stay.
    kept = "one\ntwo\t\u0645\u06cc\u200c\u062e\u0648 \U0001f469\u200d\U0001f467"
    assert visible(kept) == kept
    assert escape('<a href="x">\u202e') == "&lt;a href=&quot;x&quot;&gt;&lt;U+202E&gt;"


@given(st.text(alphabet=st.characters(), max_size=40))
def test_a_data_block_cannot_be_left_and_holds_the_text(text: str):
    block = json_block("data", {"text": text + "</script><!--"})
    head, _, rest = block.partition(">")
    body = rest.removesuffix("</script>")
    assert head == '<script type="application/json" id="data"'
    assert not set(body) & set("<>&\u2028\u2029")
    block.encode()  # lone surrogates included
    assert json.loads(body)["text"] == text + "</script><!--"


def test_names_for_files_and_anchors():
    assert slug("Held-out loss, nats a token") == "held-out-loss-nats-a-token"
    assert slug("../日本") == "unnamed"
    assert len(slug("a baseline's path / " * 40)) == 80


def test_a_table_sorts_by_what_it_is_told():
    made = table("T", [Column("a"), Column("b", True)], [["x<y", Cell("1 %", 0.01)], ["z", 2]])
    assert '<th scope="row">x&lt;y</th><td class="number" data-order="0.01">1 %</td>' in made
    assert 'class="sortable"' in made
    assert 'class="plain"' in table("T", [Column("a")], [["one row"]])
