"""The page that replays texts, in a real browser without a window."""

import contextlib
import pathlib
import shutil
import tempfile

import pytest
import replay_test
from absl.testing import absltest, parameterized

from aoarm_jax.data import tokenizers
from aoarm_jax.generation import replay

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")

_BYTE = tokenizers.get("byte")
_GIVEN = 5
_TEXT = "given" + "é</script> \n\x1b🙂abc"
# The least contrast of small text (WCAG 2, level AA).
_CONTRAST = 4.5
_CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {
    willReadFrequently: true,
  });
  const levels = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) {
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((x) => {
      x /= 255;
      return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const card = getComputedStyle(document.querySelector("article"));
  return [...document.querySelectorAll(".cell:not(.open)")].map((cell) => {
    const style = getComputedStyle(cell), behind = card.backgroundColor;
    const back = levels([behind, style.backgroundColor]);
    const front = levels([behind, style.backgroundColor, style.color]);
    return Math.max(back, front) / Math.min(back, front);
  });
}"""


def setUpModule():
  global _browser, _stack
  _stack = contextlib.ExitStack()
  driver = _stack.enter_context(sync_api.sync_playwright())
  # Chromium of the system, or the one that `playwright install` downloads.
  found = shutil.which("chromium") or shutil.which("google-chrome")
  try:
    _browser = driver.chromium.launch(
      executable_path=found, args=["--no-sandbox"]
    )
  except sync_api.Error as error:
    _stack.close()
    pytest.skip(f"no browser: {str(error).splitlines()[0]}")
  _stack.callback(_browser.close)


def tearDownModule():
  _stack.close()


class BrowserTest(parameterized.TestCase):
  def open(self, scheme="light", width=1, second=False):
    """The page of one text, or of two; it must have no error."""
    tokens = _BYTE.encode(_TEXT).tolist()
    n = len(tokens)
    left_to_right = replay_test.text_of(tokens, _BYTE, None, _GIVEN, width)
    panels = {"Left to right": left_to_right}
    if second:
      order = [*range(1, _GIVEN + 1), *range(n, _GIVEN, -1)]
      panels["Backwards"] = replay_test.text_of(tokens, _BYTE, order, _GIVEN, 3)
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / "x.html"
    replay.write(path, panels, _BYTE, title="<b>Title</b>", facts={"a": "<i>"})
    context = _browser.new_context(color_scheme=scheme)
    self.addCleanup(context.close)
    page = context.new_page()
    self.seen, self.wrong = [], []
    page.on("request", lambda request: self.seen.append(request.url))
    page.on("console", lambda message: self.wrong.append(message.text))
    page.on("pageerror", lambda error: self.wrong.append(str(error)))
    page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
    page.goto(path.as_uri())
    self.addCleanup(lambda: self.assertEqual(self.wrong, []))
    return page

  def to(self, page, step):
    page.locator("#slider").fill(str(step))

  def shown(self, page, panel=0):
    """The text of the cells that can be seen, "." for the others."""
    return page.evaluate(
      """(panel) => [...document.querySelectorAll("article")[panel]
        .querySelectorAll(".cell")].map((cell) => {
          const isOpen = getComputedStyle(cell).color === "rgba(0, 0, 0, 0)";
          return isOpen ? "." : cell.textContent;
        })""",
      panel,
    )

  def test_a_text_is_complete_first_and_replayed_by_the_slider(self):
    page = self.open()
    whole = [*"givené</script> ", "↵\n", "\\x1b", *"🙂abc"]
    self.assertEqual(self.shown(page), whole)
    self.assertEqual(page.title(), "<b>Title</b>")
    self.assertEqual(page.locator("#facts").inner_text().split(), ["a", "<i>"])
    self.to(page, 0)
    self.assertEqual(self.shown(page), [*"given", *"." * (len(whole) - 5)])
    self.assertEqual(page.locator(".now").count(), 1)  # In the legend.
    self.to(page, 1)  # One byte of two.
    self.assertEqual(self.shown(page)[5], ".")
    self.assertEqual(page.locator("main .partly").count(), 1)
    self.to(page, 2)
    self.assertEqual(self.shown(page)[5:7], ["é", "."])
    self.assertEqual(page.locator("main .now").inner_text(), "é")
    self.assertIn("step 2 of 21", page.locator("#count").inner_text())
    self.assertLen(self.seen, 1)  # The page itself.

  def test_texts_side_by_side_have_their_own_steps(self):
    page = self.open(second=True)
    self.to(page, 2)
    first, second = self.shown(page, 0), self.shown(page, 1)
    self.assertEqual(first[5:7], ["é", "."])
    self.assertEqual(second[-4:], [".", "a", "b", "c"])
    self.assertEqual(page.locator("main .now").count(), 2)
    progress = page.locator(".axes").all_inner_texts()
    self.assertIn("2 of 21", progress[0])
    self.assertIn("6 of 21", progress[1])
    self.to(page, 21)
    self.assertNotIn(".", self.shown(page, 1))

  def test_several_tokens_of_a_step_are_marked(self):
    page = self.open(width=4)
    self.to(page, 2)
    self.assertEqual(page.locator("main .now").all_inner_texts(), [*"scri"])

  def test_play_runs_to_the_end_and_begins_again(self):
    page = self.open(width=7)
    self.assertEqual(page.locator("#play").inner_text(), "Play")
    page.locator("#speed").select_option("4")
    page.locator("#play").click()
    self.assertEqual(page.locator("#play").inner_text(), "Pause")
    sync_api.expect(page.locator("#play")).to_have_text("Play")
    self.assertEqual(page.locator("#slider").input_value(), "3")
    page.locator("#play").click()
    page.locator("#play").click()  # Pauses.
    self.assertIn(page.locator("#slider").input_value(), "01")

  def test_keys(self):
    page = self.open()
    self.to(page, 7)
    page.locator("h1").click()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    self.assertEqual(page.locator("#slider").input_value(), "8")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    self.assertEqual(page.locator("#slider").input_value(), "6")
    page.keyboard.press(" ")
    self.assertEqual(page.locator("#play").inner_text(), "Pause")

  @parameterized.parameters("light", "dark")
  def test_every_token_can_be_read(self, scheme):
    page = self.open(scheme)
    backgrounds = set()
    for name in ("Probability", "None", "Order"):
      page.get_by_text(name, exact=True).click()
      contrasts = page.evaluate(_CONTRASTS)
      self.assertLen(contrasts, 22)
      self.assertGreater(min(contrasts), _CONTRAST, name)
      backgrounds.add(
        page.evaluate(
          "getComputedStyle(document.querySelectorAll('.done')[4])"
          ".backgroundColor"
        )
      )
    self.assertLen(backgrounds, 3)
    behind = page.evaluate("getComputedStyle(document.body).backgroundColor")
    self.assertEqual(behind == "rgb(20, 22, 27)", scheme == "dark")

  def test_numbers_of_a_token(self):
    page = self.open()
    page.locator("main .cell").nth(6).hover()
    about = page.locator("#about").inner_text()
    self.assertIn("position 8", about)
    self.assertIn("number 3 of 21, step 3", about)
    self.assertIn("probability 0.223, 2.16 bits", about)
    page.locator("main .cell").first.hover()
    self.assertIn("given", page.locator("#about").inner_text())


if __name__ == "__main__":
  absltest.main()
