"""The parts of a benchmark on tiny models, beside enumerations."""

import functools
import itertools
import json
import math
import pathlib
import tempfile
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import orders
from aoarm_jax.benchmark import (
  consistency,
  frontier,
  infilling,
  last_word,
  session,
)
from aoarm_jax.config import schema as config
from aoarm_jax.data import tokenizers
from aoarm_jax.devices import meshes, sharding, stopping
from aoarm_jax.model import network as network_lib
from aoarm_jax.runs import opening

_LETTERS = tokenizers.Tokenizer("letters", b" .!\nabcdefgh")
# Tokens of several bytes, with their space before them.
_WORDS = tokenizers.Tokenizer(
  "words",
  (b" ab", b"ab", b"c", b" ", b"."),
  tokenizers.Codec("token", lambda text: _ids(text), lambda: None, ""),
)
setUpModule, tearDownModule = helpers.around_module(helpers.quick_compilation())


def _ids(text):
  """Return the ids of words; the longest symbol comes first."""
  ids = []
  while text:
    i = next(i for i, s in enumerate(_WORDS.symbols) if text.startswith(s))
    ids.append(i)
    text = text[len(_WORDS.symbols[i]) :]
  return np.array(ids)


@functools.cache
def _network(mechanism, T, tokenizer, documents):
  mesh = meshes.make_mesh(config.Mesh(data=1))
  model = config.Model(mechanism=mechanism, T=T, D=8, L=1, N=2)
  compute = config.Compute(dtype="float32", attention="xla")
  data = config.Data(documents=documents)
  made = config.Config(model=model, compute=compute, data=data)
  return network_lib.Network(made, mesh, tokenizer)


def session_of(
  mechanism="two_stream",
  T=16,
  tokenizer=_LETTERS,
  change=lambda params: params,
  text="",
  documents="join",
  **benchmark,
):
  """A session of a run with sharp parameters, and its mesh entered."""
  network = _network(mechanism, T, tokenizer, documents)
  params = sharding.put(network.mesh, change(tiny.sharp(network)))
  made = network.config.replace("benchmark", config.Benchmark(**benchmark))
  run = opening.Run(made, made, mock.Mock(step=0), network, params, "params")
  opened = session.Session(made, run, stopping.Signals("batch"))
  tokens = tokenizer.encode(text)
  opened.__dict__["text"] = opened.text_of(tokens, "a text")
  return opened


def _results(part, opened):
  """Results by the names of the units, as they are in the report."""
  with jax.set_mesh(opened.network.mesh):
    return {
      unit.name.split("/")[1]: json.loads(json.dumps(unit.measure()))
      for unit in part.units(opened)
    }


class TextTest(parameterized.TestCase):
  def test_windows_and_the_start_of_a_text(self):
    opened = session_of(T=16, text="abcdefgh" * 5, tokens=20, windows=9)
    # Random windows, and none of them cut.
    self.assertEqual([len(w) for w in opened.windows], [16, 16])
    self.assertEqual(opened.start.facts["left_out_tokens"], 20)
    self.assertEqual(opened.start.ends.tolist(), [20])
    whole = opened.start.facts["sha256_of_the_whole_text"]
    self.assertEqual(whole, opened.text.facts["sha256"])
    self.assertNotEqual(whole, opened.start.facts["sha256"])
    (short,) = session_of(T=16, text="abc", windows=9).windows
    self.assertEqual(_LETTERS.decode(short), "abc")

  @parameterized.parameters(1, 2)
  def test_padded_documents_stay_whole(self, sentinels):
    mesh = meshes.make_mesh(config.Mesh(data=1))
    model = config.Model(T=4, D=8, L=1, N=2, sentinels=sentinels)
    data = config.Data(documents="pad")
    made = config.Config(model=model, data=data)
    made = made.replace("benchmark", config.Benchmark(tokens=5, windows=9))
    network = network_lib.Network(made, mesh, _LETTERS)
    run = opening.Run(made, made, mock.Mock(step=0), network, None, "params")
    opened = session.Session(made, run, stopping.Signals("batch"))
    end = network.tokenizer.end
    texts = ("ab", "cdefgh", "c")
    tokens = [[*_LETTERS.encode(text), end] for text in texts]
    opened.__dict__["text"] = opened.text_of(np.concatenate(tokens), "a text")
    windows = sorted(_LETTERS.decode(window) for window in opened.windows)
    self.assertEqual(windows, ["ab", "c", "cdef"])
    # Five tokens would cut the second document.
    given = sentinels == 2
    self.assertEqual(
      opened.text.ends.tolist(), [3 - given, 10 - given, 12 - given]
    )
    self.assertEqual(opened.start.ends.tolist(), [3 - given])
    self.assertEqual(opened.start.facts["left_out_tokens"], 9)


class OrdersTest(absltest.TestCase):
  def test_a_model_without_context_is_consistent(self):
    def without_context(params):
      return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (path[-1].key != "value"), params
      )

    text = "abc abd. aba! dab " * 6
    for change in (lambda params: params, without_context):
      opened = session_of(
        change=change, text=text, orders=4, windows=3, texts=2
      )
      found = _results(consistency, opened)
      spread = found["spread"]["bits_per_token"]["spread"]["mean"]
      apart = found["pairs"]["neighbours, given the rest"]
      apart = apart["absolute_difference"]["mean"]
      if change is without_context:
        self.assertLess(max(spread, apart), 1e-5)
      else:
        self.assertGreater(min(spread, apart), 1e-2)
    # The likelihoods of the table are those of single orders.
    with jax.set_mesh(opened.network.mesh):
      marked = [consistency._whole(window) for window in opened.windows]
      bits = [s.bits for s in opened.score(marked, "left_to_right")]
    value = found["spread"]["bits_per_token"]["left_to_right"]["mean"]
    self.assertAlmostEqual(value, np.mean(bits) / 16, places=5)
    (row,) = (
      row
      for row in consistency.rows(found)
      if row.measure == "rank correlation"
    )
    self.assertBetween(row.value, -1, 1)
    orders_found = np.array(found["adaptive"]["orders"])
    self.assertEqual(orders_found.shape, (2, 16))

  def test_one_way_has_no_orders(self):
    self.assertIn(
      "causal has one order", consistency.units(session_of("causal"))
    )


class EntropyTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 0.6)
  def test_measured_entropy_is_the_enumerated_one(self, temperature):
    V, T = 3, 3
    tokenizer = tokenizers.Tokenizer("abc", b"abc")
    opened = session_of(
      T=T, tokenizer=tokenizer, temperatures=(temperature,), texts=800,
      windows=2, text="abcabc", batch_size=800,
    )  # fmt: skip
    found = _results(frontier, opened)[f"{temperature:g}"]
    sequences, network = tiny.all_sequences(V, T), opened.network
    apply = jax.jit(lambda slots: network.apply(opened.run.params, slots))
    entropies = []
    for order in tiny.all_orders(T):
      each = np.tile(order, (len(sequences), 1))
      with jax.set_mesh(network.mesh):
        slots = orders.to_slots(sequences, each, network.layout)
        logits = np.asarray(apply(slots), np.float64) / temperature
      log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
      targets = np.take_along_axis(sequences, each - 1, axis=1)
      log_p = np.take_along_axis(log_p, targets[..., None], axis=-1).sum((1, 2))
      self.assertAlmostEqual(np.exp(log_p).sum(), 1, places=5)
      entropies.append(-(np.exp(log_p) * log_p).sum() / math.log(2) / T)
    row, per_byte = (
      r
      for r in frontier.rows({f"{temperature:g}": found})
      if r.measure == "measured entropy"
    )
    self.assertEqual((row.n, row.unit), (800, "bits_per_token"))
    # A token is a byte here.
    self.assertEqual(per_byte, row._replace(unit="bits_per_byte"))
    self.assertLess(abs(row.value - np.mean(entropies)), 4 * row.error)
    self.assertLess(row.error, 0.03)

  def test_unigram_entropy(self):
    opened = session_of(text="abc")
    texts = [np.array([4, 5, 4, 5]), np.array([4, 4, 4])]
    found = frontier._of_tokens(opened, texts)
    self.assertEqual(found, {"tokens": [4, 3], "unigram_bits": [1.0, 0.0]})

  def test_a_scorer_reads_what_is_shown(self):
    """Drawn bytes may be no UTF-8, which a tokenizer of words refuses."""
    codec = tokenizers.Codec(
      "token",
      lambda text: np.array([*map("a\ufffd".index, text.decode())]),
      lambda: None,
      "",
    )
    shown = tokenizers.Tokenizer("shown", (b"a", "\ufffd".encode()), codec)
    opened = session_of(T=6, tokenizer=shown)
    scorer = frontier._Scorer(opened)
    scorer.facts, scorer._run = {}, opened.run
    with mock.patch.object(opened, "estimate") as estimate:
      estimate.return_value.nats_per_token = 0.5
      scorer.quality([b"a\xffa", b""])
    _, text, _ = estimate.call_args.args
    self.assertEqual(text.tokens.tolist(), [0, 1, 0])


class InfillingTest(parameterized.TestCase):
  @parameterized.parameters(
    ("", "", 0), ("abc", "abc", 0), ("abc", "abd", 1 / 3), ("abc", "", 1),
    ("kitten", "sitting", 3 / 7), ("sitting", "kitten", 3 / 7),
    ("abcdef", "bcdefa", 2 / 6), ("", "ab", 1),
  )  # fmt: skip
  def test_edit_distance(self, a, b, share):
    found = infilling.share_of_edits(a.encode(), b.encode())
    self.assertAlmostEqual(found, share)

  @parameterized.parameters(
    ("words", "ab abc. de f! gh ab ", {"abc.", "de", "f!", "gh", "ab"}),
    ("sentences", "ab. a cd. e f! b ", {"a cd.", "e f!"}),
    ("paragraphs", "ab\n\ncd ab\n\nef\n\nab", {"cd ab", "ef"}),
  )
  def test_gaps(self, kind, text, spans):
    opened = session_of(T=20, text=text, windows=2)
    ((window,), looked) = infilling.gapped(opened, infilling._KINDS[kind])
    self.assertEqual(looked, 1)
    found = [_LETTERS.decode(window.tokens[gap]) for gap in window.gaps]
    self.assertContainsSubset(found, spans)
    self.assertNotEmpty(found)
    self.assertLessEqual(2 * window.masked.sum(), len(window.tokens))
    self.assertEqual(window.masked.sum(), sum(map(len, found)))

  def test_a_token_that_is_partly_in_a_gap_is_in_it(self):
    opened = session_of(T=8, tokenizer=_WORDS, text="ab abc ab c", windows=2)
    (window,), _ = infilling.gapped(opened, infilling._KINDS["words"])
    self.assertEqual(window.tokens.tolist(), [1, 0, 2, 0, 3, 2])
    for gap in window.gaps:
      self.assertIn(np.flatnonzero(gap).tolist(), ([1, 2], [3]))

  def test_scores_and_samples(self):
    """A model that is sure of its texts is right, and says so."""
    opened = session_of(text="ab ba ab ba ab. " * 3, windows=3, samples=2)
    found = _results(infilling, opened)["words"]
    table = infilling.rows({"words": found})
    with jax.set_mesh(opened.network.mesh):
      windows, _ = infilling.gapped(opened, infilling._KINDS["words"])
    self.assertEqual(found["tokens"], [int(w.masked.sum()) for w in windows])
    (row,) = (r for r in table if r.measure == "reference, left to right")
    bits = sum(found["bits"]["left_to_right"])
    self.assertAlmostEqual(row.value, bits / sum(found["bytes"]))
    self.assertIn("exact", row.note)
    for log_p in np.ravel(found["sample_log_p"]):
      self.assertLess(log_p, 0)
    # For mdlm it is a bound.
    bound = infilling.rows({"words": found | {"is_bound": True}})
    self.assertTrue(any("bound" in row.note for row in bound))
    texts = [[mock.Mock(tokens=w.tokens.tolist())] for w in windows]
    right = infilling._nearness(opened, windows, texts)
    self.assertEqual(set(right["exact_match_of_all_gaps"]), {1.0})
    self.assertEqual(set(right["edit_distance"]), {0.0})
    wrong = [[mock.Mock(tokens=[2] * 16)] for _ in windows]
    self.assertEqual(
      set(infilling._nearness(opened, windows, wrong)["exact_match"]), {0.0}
    )


class LastWordTest(parameterized.TestCase):
  def read(self, content, name="texts.txt", **kwargs):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / name
      path.write_text(content)
      opened = session_of(**kwargs)
      return opened, *last_word._read(opened, str(path))

  @parameterized.parameters(True, False)
  def test_texts_of_a_file(self, is_json):
    lines = ["ab cd ef", "ab gh. ", "abc"]
    content, name = "\n".join(lines), "texts.txt"
    if is_json:
      lines_ = (json.dumps({"text": line}) for line in lines)
      content, name = "\n".join(lines_), "texts.jsonl"
    opened, clozes, facts = self.read(content, name)
    decode = opened.tokenizer.decode
    self.assertEqual(
      [(decode(c.before), decode(c.word), decode(c.after)) for c in clozes],
      [("ab cd ", "ef", "."), ("ab ", "gh", ".")],
    )
    self.assertEqual(
      (facts["texts"], facts["texts_without_a_last_word"]), (2, 1)
    )

  def test_a_long_text_is_cut_at_its_start(self):
    opened, (cloze,), facts = self.read("abcdefgh " * 3 + "abc")
    self.assertEqual(opened.tokenizer.decode(cloze.before), "gh abcdefgh ")
    self.assertEqual(facts["texts_cut_at_the_start"], 1)
    self.assertLen(np.concatenate(cloze[:3]), 16)

  def test_a_space_may_belong_to_the_word(self):
    _, (cloze,), _ = self.read("c abc ab", tokenizer=_WORDS)
    self.assertEqual(cloze.word.tolist(), [0])
    self.assertEqual(cloze.after.tolist(), [4])

  def test_the_likeliest_word_is_right(self):
    self.check_likeliest("two_stream")

  @pytest.mark.slow
  def test_the_likeliest_word_of_a_causal_model_is_right(self):
    self.check_likeliest("causal")

  def check_likeliest(self, mechanism):
    opened, clozes, _ = self.read("ab cd\nba dc\nad ab", mechanism=mechanism)
    with jax.set_mesh(opened.network.mesh):
      found = last_word._measure(opened, clozes, False)
      best = []
      for cloze in clozes:
        words = [
          cloze._replace(word=np.array(word))
          for word in itertools.product(range(12), repeat=2)
        ]
        nats = last_word._measure(opened, words, False)
        best.append(words[int(np.argmin(nats["nats"]))])
        self.assertEqual(sum(nats["is_right"]), 1)  # One word is drawn.
        self.assertAlmostEqual(np.exp(-np.array(nats["nats"])).sum(), 1, 4)
    self.assertEqual(found["tokens"], [2, 2, 2])
    table = last_word.rows({"left_to_right": found})
    (row,) = (r for r in table if r.unit == "per word")
    self.assertAlmostEqual(row.value, math.exp(np.mean(found["nats"])))


if __name__ == "__main__":
  absltest.main()
