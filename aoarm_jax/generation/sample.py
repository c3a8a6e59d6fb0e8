"""The mode that prints texts of a checkpoint: --mode=sample."""

import datetime
import json
import sys

import jax
from absl import logging
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import stopping
from aoarm_jax.generation import prompts, replay
from aoarm_jax.generation import texts as texts_lib
from aoarm_jax.runs import agreement, alphabet, disk, opening
from aoarm_jax.runs import text as text_lib

# The texts of a file are drawn in parts of this many, and each part is printed
# before the next one is drawn.
_AT_ONCE = 1024


def sample(
  config: config_lib.Config,
  workdir: epath.Path,
  prompt: str = "",
  input_file: str = "",
  page: str = "",
) -> None:
  """Print texts of a checkpoint: --mode=sample.

  Without an input file, the texts go to standard output, one per line, with
  control characters escaped. Then they are also written, with their orders, to
  samples/ in the run directory. A failure to write them is a warning. With an
  input file, they go to standard output as JSON lines and are not written. The
  `prompt` of the JSON is the text that was filled: with data.normalise it is
  the normal form of what the user gave.

  Args:
    config: the config; its section sample says how.
    workdir: run directory. Only its checkpoint is needed, and no corpus.
    prompt: a text with blanks. '' generates whole texts.
    input_file: file with one prompt per line; '-' is standard input; '' is no
      file.
    page: HTML file to write, which replays the texts; '' writes none. It goes
      without an input file.

  Raises:
    CheckpointError, ConfigError: see opening.open_run.
    PromptError: this model cannot fill one of the prompts.
    Stopped: SIGTERM came. The texts so far are printed and written.
  """
  tokenizer = alphabet.of_run(config, workdir)
  blank, primary = config.sample.blank, jax.process_index() == 0
  lines = prompts.read_lines(input_file) if input_file else []
  if prompt:
    lines = [("--prompt", prompt)]
  agreement.check_lines(lines)
  if config.data.normalise:
    lines = prompts.normalised(lines, tokenizer, blank, "")

  def parse(line, name):
    return prompts.parse_prompt(line, tokenizer, blank, name)

  # All prompts are checked before the first one is filled: here for symbols and
  # blanks, and below, when the run's model is known, for length and order.
  parsed = prompts.check_lines(lines, parse)
  one_by_one = config.sample.method in ("sequential", "speculative")
  if config.orders.groups != "none" and one_by_one:
    logging.info(
      "config.sample.method=%s: texts follow the chain rule, and this model "
      "was trained with groups; --config.sample.method=parallel with "
      "--config.sample.width=0 draws groups",
      config.sample.method,
    )
  run = opening.open_run(workdir, config)
  prompts.check_lines(
    [(text.name, text) for text in parsed],
    lambda text, _: texts_lib.check(text, run.network.model),
  )
  done, total = 0, max(1, len(parsed)) * config.sample.count
  with jax.set_mesh(run.network.mesh), stopping.Signals("batch") as signals:
    sampler = texts_lib.Sampler(config, run.network)
    if input_file:
      # Each part is printed at once, so that a later failure loses nothing of
      # it.
      at_once = -(-_AT_ONCE // config.sample.count)
      for start in range(0, len(parsed), at_once):
        span = slice(start, start + at_once)
        filled = sampler.fill(
          run.params, parsed[span], first=start, is_stopped=signals.poll
        )
        if primary:
          _print_json(lines[span], filled)
        done += sum(map(len, filled))
        signals.raise_if_stopped(f"{done} of {total} texts")
      return
    texts = sampler.sample(
      run.params, parsed[0] if parsed else None, is_stopped=signals.poll
    )
  if primary and texts:
    given = "".join(text for _, text in lines)
    try:
      _show(config, workdir, run.step, given, texts)
    finally:
      if page:
        _replay(config, page, run, given, texts)
  signals.raise_if_stopped(f"{len(texts)} of {total} texts")


def _show(config, workdir, step, given, texts):
  """Print the texts and write them with their orders."""
  now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
  path = workdir / "samples" / f"{now}.jsonl"
  facts = {
    name: getattr(config.sample, name)
    for name in ("method", "order", "temperature", "top_k", "top_p")
  }
  try:
    for text in texts:
      print(text_lib.printable(text.text))
    sys.stdout.flush()
  finally:  # The reader of the output may have ended, as `| head` does.
    if disk.attempt(
      lambda: texts_lib.write(path, texts, step, prompt=given, **facts)
    ):
      logging.info("written with their orders: %s", path)


def _print_json(lines, filled):
  """Print the texts of every prompt as JSON lines."""
  for (_, line), texts in zip(lines, filled):
    for text in texts:
      print(json.dumps({"prompt": line, **text._asdict()}))
  sys.stdout.flush()


def _replay(config, page, run, given, texts):
  """Write the page that replays the texts."""
  sample = config.sample
  facts = {
    "mechanism": config.model.mechanism,
    "training": f"{run.step:,} steps",
    "method": sample.method,
    "order": sample.order,
    "temperature": f"{sample.temperature:g}",
    "seed": sample.seed,
  }
  if sample.method in ("ancestral", "confidence"):  # They choose their own.
    del facts["order"]
  replay.write(
    page,
    {f"Text {i}": text for i, text in enumerate(texts, 1)},
    run.network.tokenizer,
    title=given or "Texts, token by token",
    facts=facts,
  )
  logging.info("written, for a browser: %s", page)
