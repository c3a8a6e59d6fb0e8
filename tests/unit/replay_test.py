"""The page that replays texts: what it holds, read as a browser reads it."""

import html.parser
import json
import pathlib
import re
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from aoarm_jax.data import tokenizers
from aoarm_jax.generation import replay, texts

_BYTE = tokenizers.get("byte")
_CHAR27 = tokenizers.get("char27")
# Tokens that begin and end within characters, as those of BPE do.
_PIECES = tokenizers.Tokenizer(
  "bpe", (b"a", b"\xe2\x80", b"\x9c b", b"\xff", b"\n\n", "é".encode())
)
_HOSTILE = "</script><script>alert(1)</script><!-- & \" ' \u2028 \\u003c"


class _Page(html.parser.HTMLParser):
  """The tags of a page with their attributes, and the contents of scripts."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.scripts = [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag == "script":
      self.scripts.append("")

  def handle_data(self, data):
    if self.tags and self.tags[-1][0] == "script":
      self.scripts[-1] += data


def text_of(tokens, tokenizer, order=None, known=0, width=1):
  """A Text of tokens, `width` of them a step after the known ones."""
  n = len(tokens)
  order = list(order or range(1, n + 1))
  steps, token_log_p = [0] * n, [0.0] * n
  for rank, position in enumerate(order[known:]):
    steps[position - 1] = 1 + rank // width
    token_log_p[position - 1] = -0.5 * (rank + 1)
  return texts.Text(
    text=tokenizer.decode(tokens),
    tokens=list(tokens),
    order=order,
    log_p=sum(token_log_p),
    calls=max(steps),
    steps=steps,
    token_log_p=token_log_p,
  )


class PageTest(parameterized.TestCase):
  def write(self, panels, tokenizer=_BYTE, **options):
    """The page, and the data in it."""
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / "made" / "x.html"
    replay.write(path, panels, tokenizer, **{"title": "t"} | options)
    self.assertEqual([path], [*path.parent.iterdir()])  # Nothing else is left.
    page = _Page(path.read_text("utf-8"))
    return page, json.loads(page.scripts[0])

  def cells(self, tokens, tokenizer=_BYTE, **options):
    text = text_of(tokens, tokenizer, **options)
    return self.write({"x": text}, tokenizer)[1]["panels"][0]["cells"]

  def test_texts_cannot_leave_their_place(self):
    """A text, a label, a title and a fact that look like parts of a page."""
    plain, _ = self.write({"x": text_of(_BYTE.encode("ab").tolist(), _BYTE)})
    hostile = text_of(_BYTE.encode(_HOSTILE).tolist(), _BYTE)
    page, data = self.write(
      {_HOSTILE: hostile}, title=_HOSTILE, facts={_HOSTILE: _HOSTILE}
    )
    self.assertEqual(page.tags, plain.tags)
    self.assertLen(page.scripts, 2)
    self.assertEqual(page.scripts[1], plain.scripts[1])
    self.assertEqual(data["title"], _HOSTILE)
    self.assertEqual(data["facts"], {_HOSTILE: _HOSTILE})
    self.assertEqual(data["panels"][0]["label"], _HOSTILE)
    shown = "".join(cell["text"] for cell in data["panels"][0]["cells"])
    self.assertEqual(shown, _HOSTILE.replace("\u2028", "\\u2028"))

  def test_nothing_comes_from_outside(self):
    page, _ = self.write({"x": text_of([97], _BYTE)})
    for tag, attributes in page.tags:
      self.assertNotIn(tag, ("link", "img", "iframe", "object", "base", "form"))
      self.assertNoCommonElements(attributes, ("src", "href", "srcset"))
    policies = [a["content"] for _, a in page.tags if "http-equiv" in a]
    self.assertLen(policies, 1)
    self.assertStartsWith(policies[0], "default-src 'none'; ")
    # The code makes text and elements, and never reads HTML.
    self.assertNotRegex(page.scripts[1], r"innerHTML|outerHTML|insertAdjacent")
    self.assertNotRegex(page.scripts[1], r"\b(eval|fetch|import|Function)\(")
    (address,) = re.findall(r"https?://[^\s\"']*", page.scripts[1])
    self.assertEqual(address, "http://www.w3.org/2000/svg")  # A name.

  def test_cells_of_characters(self):
    tokens = _CHAR27.encode("ab c").tolist()
    cells = self.cells(tokens, _CHAR27, order=[3, 4, 2, 1], known=2)
    self.assertEqual([cell["text"] for cell in cells], ["a", "b", " ", "c"])
    self.assertEqual([cell["position"] for cell in cells], [1, 2, 3, 4])
    self.assertEqual([cell["steps"] for cell in cells], [[2], [1], [0], [0]])
    self.assertEqual([cell["rank"] for cell in cells][:2], [2, 1])
    self.assertEqual([cell["logP"] for cell in cells], [-1.0, -0.5, 0, 0])

  def test_several_tokens_in_a_step(self):
    order = [3, 1, 4, 2, 5]
    cells = self.cells([97] * 5, order=order, width=2)
    self.assertEqual([cell["steps"][0] for cell in cells], [1, 2, 1, 2, 3])

  def test_a_text_without_steps_comes_token_by_token(self):
    text = texts.Text("abc", [97, 98, 99], [3, 1, 2], -1.5, 3)
    _, data = self.write({"x": text})
    cells = data["panels"][0]["cells"]
    self.assertEqual([cell["steps"] for cell in cells], [[2], [3], [1]])
    self.assertEqual({cell["logP"] for cell in cells}, {None})

  def test_a_character_of_several_tokens_is_one_cell(self):
    tokens = [*b"a", *"é".encode(), *b"b"]
    cells = self.cells(tokens, order=[3, 1, 4, 2])
    self.assertEqual([cell["text"] for cell in cells], ["a", "é", "b"])
    self.assertEqual(cells[1]["steps"], [4, 1])
    self.assertEqual([cell["rank"] for cell in cells], [2, 4, 3])
    self.assertAlmostEqual(cells[1]["logP"], -0.5 * (4 + 1))

  @parameterized.parameters(
    ([0, 1, 2, 0], ["a", "“ b", "a"]),
    ([1, 0, 1], ["\\xe2\\x80", "a", "\\xe2\\x80"]),
    ([1, 1, 2], ["\\xe2\\x80", "“ b"]),
    ([3, 2, 5], ["\\xff", "\\x9c b", "é"]),
    ([4, 0], ["↵\n↵\n", "a"]),
  )
  def test_tokens_that_cut_characters(self, tokens, want):
    cells = self.cells(tokens, _PIECES)
    self.assertEqual([cell["text"] for cell in cells], want)

  def test_every_byte_is_in_one_cell(self):
    rng = np.random.default_rng(0)
    for _ in range(20):
      tokens = rng.choice([*"aé“🙂".encode(), 0xFF, 0x0A], 40).tolist()
      cells = self.cells(tokens)
      at = 1
      for cell in cells:
        self.assertEqual(cell["position"], at)
        group = tokens[at - 1 : at - 1 + len(cell["steps"])]
        at += len(group)
        if cell["isText"]:
          self.assertEqual(cell["text"].encode(), bytes(group))
      self.assertEqual(at, 41)

  @parameterized.parameters(
    ("\n", "↵\n"),
    ("\t", "\\t"),
    ("\x1b", "\\x1b"),
    ("\u202e", "\\u202e"),  # It would turn the text round.
    ("\u200b", "\\u200b"),
    ("\U000e0041", "\\U000e0041"),
    ("\u0301", "◌\u0301"),  # It would join the cell before.
  )
  def test_what_cannot_be_seen_is_named(self, character, want):
    for tokenizer in (_BYTE, tokenizers.with_end(_BYTE)):
      cells = self.cells([*character.encode(), 97], tokenizer)
      self.assertEqual([cell["text"] for cell in cells], [want, "a"])
      self.assertEqual([cell["isText"] for cell in cells], [False, True])

  def test_the_end_of_a_document_is_shown(self):
    tokenizer = tokenizers.with_end(_CHAR27)
    cells = self.cells([1, tokenizer.end], tokenizer)
    self.assertEqual([cell["text"] for cell in cells], ["a", "<end>"])

  def test_an_earlier_page_is_replaced_as_a_whole(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / "x.html"
    path.write_text("before")
    with self.assertRaises(ValueError):  # JSON has no such number.
      nowhere = text_of([97], _BYTE)._replace(log_p=float("nan"))
      replay.write(path, {"x": nowhere}, _BYTE, title="")
    self.assertEqual(path.read_text(), "before")
    replay.write(path, {"x": text_of([97], _BYTE)}, _BYTE, title="")
    self.assertStartsWith(path.read_text(), "<!DOCTYPE html>")


if __name__ == "__main__":
  absltest.main()
