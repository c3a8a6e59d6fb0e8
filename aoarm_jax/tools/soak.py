"""Memory, files and descriptors of a long run and of many calls, on Linux.

  python -m aoarm_jax.tools.soak --out=docs/results

Trains a tiny model for many steps in a process of its own, and looks at that
process. Then it loads the model here and calls it many times. Writes soak.csv,
soak_calls.csv and soak.png. The defaults take about half an hour on two cores.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax

import aoarm_jax
from aoarm_jax.runs import canvas
from aoarm_jax.tools import arguments, table

_TINY = {
  "model.T": 16,
  "model.D": 16,
  "model.L": 2,
  "model.N": 2,
  "train.batch_size": 8,
  "telemetry.log_every": 50,
  "eval.batches": 2,
  "sample.count": 2,
}
_EVERY = ("eval.every", "sample.every", "checkpoint.every")
_SECONDS_BETWEEN_LOOKS = 2.0
_CALLS_BETWEEN_LOOKS = 10
_COMPILATION = "/jax/core/compile/backend_compile_duration"


def _look(process: int) -> dict[str, Any]:
  """Returns memory in 10^6 bytes, descriptors and threads of a process."""
  folder = pathlib.Path("/proc", str(process))
  status = dict(
    line.split(":", 1) for line in (folder / "status").read_text().splitlines()
  )
  return {
    "rss_megabytes": round(int(status["VmRSS"].split()[0]) * 1024 / 1e6, 2),
    "descriptors": len(os.listdir(folder / "fd")),
    "threads": int(status["Threads"]),
  }


def _step_of(workdir: pathlib.Path) -> int:
  """Returns the step of the last whole record of metrics.jsonl, or 0."""
  try:
    with (workdir / "metrics.jsonl").open("rb") as file:
      file.seek(max(0, os.path.getsize(file.name) - 4096))
      return json.loads(file.read().splitlines()[-1])["step"]
  except (OSError, ValueError, IndexError):
    return 0


def train(
  workdir: pathlib.Path, steps: int, every: int
) -> list[dict[str, Any]]:
  """Trains a run; returns looks at its process, at most one of a step.

  Args:
    workdir: run directory.
    steps: training steps.
    every: steps between visits: evaluation, sample and save.
  """
  changes = _TINY | {"train.steps": steps} | dict.fromkeys(_EVERY, every)
  command = [
    *(sys.executable, "-m", "aoarm_jax.main", "--config=two_stream:tiny"),
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in changes.items()),
  ]
  rows: list[dict[str, Any]] = []
  start = time.monotonic()
  with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
    while process.poll() is None:
      time.sleep(_SECONDS_BETWEEN_LOOKS)
      step = _step_of(workdir)
      if step == 0 or (rows and step == rows[-1]["step"]):
        continue
      try:
        seen = _look(process.pid)
      except (OSError, KeyError):  # The process has ended.
        break
      files = sum(len(names) for _, _, names in os.walk(workdir))
      seconds = round(time.monotonic() - start, 1)
      rows.append({"step": step, "seconds": seconds, **seen, "files": files})
  if process.returncode:
    sys.exit(f"aoarm_jax: error: the run ended with {process.returncode}")
  return rows


def call(workdir: pathlib.Path, calls: int) -> list[dict[str, Any]]:
  """Calls a model many times; returns looks at this process.

  Args:
    workdir: run directory.
    calls: number of calls, of all methods with texts of all lengths.
  """
  compiled = 0

  def count(event: str, *_: Any, **__: Any) -> None:
    nonlocal compiled
    compiled += event == _COMPILATION

  jax.monitoring.register_event_duration_secs_listener(count)
  model = aoarm_jax.load(workdir, progress=False)
  T, rng = model.config.model.T, random.Random(0)
  rows: list[dict[str, Any]] = []
  for number in range(calls):
    text = "".join(rng.choices("abcdefgh ", k=rng.randint(2, T)))
    match rng.randrange(4):
      case 0:
        model.generate(rng.randint(1, 5), length=rng.randint(1, T))
      case 1:
        model.generate(prompt=text[: T - 1])
      case 2:
        model.infill(["_" + text[1:]] * rng.randint(1, 5))
      case 3:
        model.score([text] * rng.randint(1, 5))
    if (number + 1) % _CALLS_BETWEEN_LOOKS == 0:
      seen = _look(os.getpid())
      rows.append({"call": number + 1, **seen, "compilations": compiled})
  return rows


def draw(
  steps: list[dict[str, Any]], calls: list[dict[str, Any]], path: str
) -> None:
  """Draws both tables: memory above, counts below.

  Args:
    steps: the rows of `train`.
    calls: the rows of `call`.
    path: of the PNG file.
  """
  columns = (
    ("step", steps, ("files", "descriptors", "threads"), "training steps"),
    ("call", calls, ("compilations", "descriptors", "threads"), "calls"),
  )
  with canvas.draw([path], 2, 2, inches=(9.4, 6.4), sharex="col") as (_, axes):
    for column, (unit, rows, names, words) in enumerate(columns):
      above, below = axes[:, column]
      x = [row[unit] for row in rows]
      memory = [row["rss_megabytes"] for row in rows]
      above.plot(x, memory, color=canvas.COLOURS[0])
      above.set_ylim(0, 1.1 * max(memory))
      above.set_title(f"memory (RSS), 10^6 bytes, over {words}")
      for colour, name in zip(canvas.COLOURS, names):
        counts = [row[name] for row in rows]
        below.plot(x, counts, color=colour, label=name, lw=1)
      below.set_ylim(0, 1.5 * max(row[name] for row in rows for name in names))
      below.set_xlabel(words)
      below.legend(loc="upper right", ncols=3, fontsize=9)


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the tables and the picture."""
  parser = arguments.parser("tools.soak", __doc__)
  parser.add_argument(
    "--out", required=True, type=arguments.place, help="folder"
  )
  whole = arguments.number(int, 1)
  parser.add_argument("--steps", type=whole, default=60_000)
  parser.add_argument("--every", type=whole, default=100)
  parser.add_argument("--calls", type=whole, default=1000)
  options = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / "run"
    steps = train(workdir, options.steps, options.every)
    table.write_csv(options.out / "soak.csv", steps)
    calls = call(workdir, options.calls)
    table.write_csv(options.out / "soak_calls.csv", calls)
  draw(steps, calls, str(options.out / "soak.png"))
  print(options.out / "soak.png")


if __name__ == "__main__":
  main()
