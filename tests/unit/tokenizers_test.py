"""Tokenizers: inverse of each other, and what they refuse."""

import numpy as np
from absl.testing import absltest, parameterized

from aoarm_jax.data import tokenizers


class TokenizersTest(parameterized.TestCase):
  def test_char27_is_space_and_letters(self):
    ids = tokenizers.get("char27").encode(" abz")
    self.assertEqual(ids.dtype, np.uint8)
    np.testing.assert_array_equal(ids, [0, 1, 2, 26])

  def test_byte_is_utf8(self):
    ids = tokenizers.get("byte").encode("é\n")
    self.assertEqual(ids.dtype, np.uint8)
    np.testing.assert_array_equal(ids, [0xC3, 0xA9, 0x0A])

  @parameterized.parameters(("char27", 27), ("byte", 256))
  def test_every_id_survives_the_round_trip(self, name, V):
    tokenizer = tokenizers.get(name)
    ids = np.arange(V)
    self.assertEqual(tokenizer.V, V)
    np.testing.assert_array_equal(
      tokenizer.encode(tokenizer.to_bytes(ids)), ids
    )

  @parameterized.parameters(
    *(("char27", ""), ("char27", "a b"), ("byte", ""), ("byte", "Aé\x00€")),
  )
  def test_text_survives_the_round_trip(self, name, text):
    tokenizer = tokenizers.get(name)
    self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)
    np.testing.assert_array_equal(
      tokenizer.encode(text), tokenizer.encode(text.encode())
    )

  def test_half_a_character_is_replaced(self):
    self.assertEqual(tokenizers.get("byte").decode([0x61, 0xC3]), "a\ufffd")

  @parameterized.parameters(
    ("aéB", r"character 'é' at offset 1 is not a-z or space"),
    ("ab_", r"character '_' at offset 2 is not"),
    (b"ab\n", r"byte 0x0a \('\\n'\) at offset 2 is not"),
    (b"\xff", r"byte 0xff \('\\xff'\) at offset 0 is not"),
  )
  def test_the_first_wrong_character_is_named(self, text, message):
    with self.assertRaisesRegex(tokenizers.TokenizerError, message):
      tokenizers.get("char27").encode(text)

  def test_half_a_surrogate_is_named(self):
    with self.assertRaisesRegex(tokenizers.TokenizerError, "at offset 1"):
      tokenizers.get("byte").encode("a\ud800")

  @parameterized.parameters(27, -1)
  def test_a_wrong_id_is_named(self, wrong):
    message = f"id {wrong} at offset 1 is not below V=27"
    with self.assertRaisesRegex(tokenizers.TokenizerError, message):
      tokenizers.get("char27").decode(np.array([3, wrong]))

  def test_an_unknown_tokenizer_is_named(self):
    message = "config.data.tokenizer='words': not one of char27, byte"
    with self.assertRaisesRegex(tokenizers.DataError, message):
      tokenizers.get("words")

  @parameterized.parameters(
    (1, np.uint8), (256, np.uint8), (257, np.uint16), (65_537, np.uint32)
  )
  def test_ids_have_the_smallest_dtype(self, V, dtype):
    self.assertEqual(tokenizers.dtype_of(V), dtype)

  def test_sizes_of_tokens(self):
    byte = tokenizers.get("byte")
    ids = byte.encode("aé€🎉")
    self.assertEqual(byte.bytes_of[ids].sum(), 10)
    self.assertEqual(byte.characters_of[ids].sum(), 4)


class UnitTest(parameterized.TestCase):
  @parameterized.parameters(
    ("char27", "char", "characters"), ("byte", "byte", "bytes")
  )
  def test_a_token_has_a_name(self, name, unit, units):
    made = tokenizers.get(name)
    self.assertEqual((made.unit, made.units), (unit, units))


if __name__ == "__main__":
  absltest.main()
