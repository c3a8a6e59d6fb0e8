"""The built-in text, from small source trees."""

import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from aoarm_jax.data import docstrings, tokenizers

_CODE = r'''
"""Module: 1 text."""
import nothing_of_this_name  # Never imported.

class A:
  """Class\d of {name}."""  # An invalid escape: a warning, not an error.
  def f(self):
    """Method."""
    def inner():
      """Inner of {name}."""

if True:
  async def g():
    """Under if of {name}"""
try:
  pass
except OSError:
  def h(): "In handler of {name}"
match 1:
  case 1:
    def k(): "In case of {name}"
lambda: "not one"
"not one either"
'''

_WRITER = """
import pathlib, sys
from aoarm_jax.data import docstrings
source = docstrings.Source("fake1", "fake.", pathlib.Path(sys.argv[1]))
print(sum(map(len, docstrings.load([source]).values())))
"""


class DocstringsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.root = self.folder / "fake"
    self.cache = self.folder / "cache"
    self.set_cache(self.cache)

  def set_cache(self, path):
    variables = {"XDG_CACHE_HOME": str(path)}
    self.enterContext(mock.patch.dict(os.environ, variables))

  def write(self, name: str, code: str | bytes):
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(code if isinstance(code, bytes) else code.encode())

  def fake_package(self, count: int = 60) -> docstrings.Source:
    for i in range(count):
      name = "m" + "".join(chr(ord("a") + int(digit)) for digit in f"{i:02}")
      self.write(f"{name}.py", f'"""Common."""\ndef f():\n  """Of {name}."""')
    return docstrings.Source("fake1", "fake.", self.root)

  @parameterized.parameters(
    ("Hello,  World!\n", b"hello world"),
    ("3.14 x2", b"three one four x two"),
    ("Élan in \u212a, don't", b"lan in don t"),
    ("٣", b""),  # A digit, but not one of wikifil.pl's.
    ("\ud800a", b"a"),
    (" \n", b""),
  )
  def test_normal_form(self, text, expected):
    self.assertEqual(docstrings.normal_form(text), expected)

  def test_docstrings_in_order_without_warnings(self):
    found = list(docstrings.of_source(_CODE.replace("{name}", "a").encode()))
    self.assertEqual(
      found,
      [
        *("Module: 1 text.", r"Class\d of a.", "Method.", "Inner of a."),
        *("Under if of a", "In handler of a", "In case of a"),
      ],
    )

  def test_modules_have_dotted_names_and_no_tests(self):
    for name in (
      *("__init__.py", "b.py", "sub/__init__.py", "sub/a.py", "tests/x.py"),
      *("sub/test/y.py", "site-packages/z.py", "b.txt", "sub/data.pyc"),
    ):
      self.write(name, "")
    names = [
      n for n, _ in docstrings.modules(docstrings.Source("", "", self.root))
    ]
    self.assertEqual(names, ["", "b", "sub", "sub.a"])
    source = docstrings.Source("fake1", "fake.", self.root)
    names = [name for name, _ in docstrings.modules(source)]
    self.assertEqual(names, ["fake", "fake.b", "fake.sub", "fake.sub.a"])

  def test_no_module_and_no_docstring_in_two_splits(self):
    source = self.fake_package()
    splits = docstrings.load([source])
    text = b" ".join(splits.values())
    self.assertEqual(text.split().count(b"common"), 1)
    for module, _ in docstrings.modules(source):
      own = docstrings.normal_form(f"of {module.removeprefix('fake.')}")
      inside = [name for name, text in splits.items() if own in text]
      self.assertEqual(inside, [docstrings.split_of(module)])
    for split in docstrings.SPLITS:
      self.assertNotEmpty(splits[split])
      self.assertRegex(splits[split], rb"\A[a-z]+( [a-z]+)*\Z")

  @parameterized.parameters(
    *(("argparse", "train"), ("jax.numpy", "train")),
    *(("_pyio", "valid"), ("_collections_abc", "test")),
  )
  def test_the_split_of_a_module_never_changes(self, module, split):
    self.assertEqual(docstrings.split_of(module), split)

  def test_bad_sources_are_skipped(self):
    source = self.fake_package(3)
    before = docstrings.build(docstrings.modules(source))
    self.write("mzz.py", "def (: ")
    self.write("mzy.py", b'"""\xff"""')
    self.write("mzx.py", b"\0")
    (self.root / "mzw.py").symlink_to(self.root / "nothing")
    self.assertEqual(docstrings.build(docstrings.modules(source)), before)
    self.assertEqual(docstrings.load([source]), before)

  def test_cache_is_read_until_the_sources_change(self):
    source = self.fake_package(3)
    first = docstrings.load([source])
    with mock.patch.object(docstrings, "build") as build:
      self.assertEqual(docstrings.load([source]), first)
      build.assert_not_called()
    self.write("mzz.py", '"""New."""')
    self.assertNotEqual(docstrings.load([source]), first)
    self.assertLen(list((self.cache / "aoarm_jax").iterdir()), 2)

  @parameterized.parameters(
    *((lambda data: data[:-1],), (lambda data: b"",)),
    *((lambda data: data + b"x",), (lambda data: data[:70],)),
    *((lambda data: data.replace(b"\n", b" "),),),
    *((lambda data: bytes([data[0] ^ 1]) + data[1:],),),
    *((lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],),),
  )
  def test_a_damaged_cache_is_noticed_and_rebuilt(self, damage):
    source = self.fake_package(3)
    first = docstrings.load([source])
    (file,) = (self.cache / "aoarm_jax").iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    with self.assertLogs(level="WARNING") as logs:
      self.assertEqual(docstrings.load([source]), first)
    self.assertLen(logs.output, 1)
    self.assertIn(str(file), logs.output[0])
    self.assertEqual(file.read_bytes(), good)

  def test_an_unwritable_cache_is_one_warning(self):
    source = self.fake_package(3)
    blocked = self.folder / "file"
    blocked.write_text("")
    self.set_cache(blocked)
    with self.assertLogs(level="WARNING") as logs:
      self.assertNotEmpty(docstrings.load([source])["train"])
    self.assertLen(logs.output, 1)
    self.assertIn("not cached", logs.output[0])

  def test_no_home_folder_is_one_warning(self):
    source = self.fake_package(3)
    self.set_cache("")
    error = RuntimeError("no home")
    with (
      mock.patch.object(pathlib.Path, "home", side_effect=error),
      self.assertLogs(level="WARNING") as logs,
    ):
      self.assertNotEmpty(docstrings.load([source])["train"])
    self.assertLen(logs.output, 1)

  def test_a_relative_cache_variable_is_ignored(self):
    self.set_cache("relative")
    with mock.patch.object(pathlib.Path, "home", return_value=self.folder):
      self.assertEqual(
        docstrings.cache_folder(), self.folder / ".cache" / "aoarm_jax"
      )

  def test_a_killed_writer_leaves_no_cache_file(self):
    source = self.fake_package(3)
    with (
      mock.patch.object(os, "replace", side_effect=KeyboardInterrupt),
      self.assertRaises(KeyboardInterrupt),
    ):
      docstrings.load([source])
    self.assertEmpty(list((self.cache / "aoarm_jax").glob("*.txt")))
    with self.assertNoLogs(level="WARNING"):
      docstrings.load([source])
    self.assertLen(list((self.cache / "aoarm_jax").glob("*.txt")), 1)

  def test_concurrent_writers_all_read_the_same(self):
    source = self.fake_package()
    command = [sys.executable, "-c", _WRITER, str(self.root)]
    writers = [
      subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)
    ]
    outputs = [writer.communicate()[0] for writer in writers]
    expected = sum(map(len, docstrings.load([source]).values()))
    self.assertEqual([int(output) for output in outputs], [expected] * 3)
    self.assertLen(list((self.cache / "aoarm_jax").iterdir()), 1)

  def test_sources_missing(self):
    self.root.mkdir()
    source = docstrings.Source("python3", "", self.root)
    message = f"{self.root} holds no .py files of python3.*--config.data.path="
    with self.assertRaisesRegex(tokenizers.DataError, message):
      docstrings.load([source])

  def test_numpy_missing(self):
    message = "numpy is not installed here.*--config.data.path="
    with (
      mock.patch.object(docstrings.importlib.util, "find_spec") as find_spec,
      self.assertRaisesRegex(tokenizers.DataError, message),
    ):
      find_spec.return_value = None
      docstrings.load()

  def test_installed_sources_are_found_without_import(self):
    sources = docstrings.installed()
    self.assertEqual([s.prefix for s in sources], ["", "numpy.", "jax."])
    names = [n for source in sources for n, _ in docstrings.modules(source)]
    self.assertContainsSubset({"argparse", "numpy.linalg", "jax"}, names)
    self.assertEmpty([n for n in names if "tests" in n.split(".")])


if __name__ == "__main__":
  absltest.main()
