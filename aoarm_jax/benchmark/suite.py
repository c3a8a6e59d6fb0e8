"""The benchmark of a trained run: --mode=benchmark.

The folder benchmark/ of the run directory gets

  README.md       the table and the pictures
  benchmark.json  all numbers, and all that is needed to repeat them
  benchmark.csv   the table
  *.png           a picture of every part
  units/          the result of each piece of work, so that a benchmark that was
                  stopped goes on
"""

import dataclasses
import hashlib
import json
import time
from typing import Any

import jax
from absl import logging
from etils import epath

from aoarm_jax.benchmark import (
  consistency,
  frontier,
  infilling,
  last_word,
  likelihood,
  report,
)
from aoarm_jax.benchmark import results as results_lib
from aoarm_jax.benchmark import session as session_lib
from aoarm_jax.config import reading
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import stopping
from aoarm_jax.runs import directory as run_dir
from aoarm_jax.runs import disk, opening, telemetry

# Changes whenever a unit computes something else from the same settings.
_VERSION = 1
PARTS: dict[str, Any] = {
  "likelihood": likelihood,
  "orders": consistency,
  "infilling": infilling,
  "generation": frontier,
  "last_word": last_word,
}


def benchmark(config: config_lib.Config, workdir: epath.Path) -> None:
  """Measure a run, write the report and print its table: --mode=benchmark.

  Units that are done already with the same settings, text and parameters are
  not measured again.

  Args:
    config: the config; its section benchmark says what is measured.
    workdir: run directory.

  Raises:
    CheckpointError, ConfigError: see opening.open_run.
    DataError: a text is missing or wrong.
    Stopped: a signal came. The units before are kept.
  """
  if jax.process_count() > 1:
    raise config_lib.ConfigError(
      "--mode=benchmark runs in one process: start it on one host, whose "
      "devices it uses"
    )
  run = opening.open_run(workdir, config)
  folder = workdir / "benchmark"
  with jax.set_mesh(run.network.mesh), stopping.Signals("batch") as signals:
    session = session_lib.Session(config, run, signals)
    facts = _facts(session)
    units: list[results_lib.Unit] = []
    left_out: dict[str, str] = {}
    for name in config.benchmark.parts or config_lib.BENCHMARK_PARTS:
      found = PARTS[name].units(session)
      if isinstance(found, str):
        left_out[name] = found
        logging.info("%s is left out: %s", name, found)
      else:
        units += found
    results = _measured(session, units, facts, folder / "units")
  record = {
    "run": facts,
    "versions": run_dir.versions(),
    "config": dataclasses.asdict(config),
    "left_out": left_out,
    "units": {
      unit.name: {"settings": unit.settings, "result": results[unit.name]}
      for unit in units
    },
  }
  print(report.write(folder, PARTS, record), end="")
  logging.info("written: %s", folder / "README.md")


def _facts(session):
  """Return what identifies the run, as values of JSON."""
  run, tokenizer = session.run, session.tokenizer
  return {
    "experiment": f"{run.trained.name}:{run.trained.variant}",
    "mechanism": session.network.model.mechanism,
    "step": run.step,
    "parameters": run_dir.parameter_count(session.network.abstract_params),
    "parameters_sha256": session_lib.parameters_sha256(run.params),
    "is_moving_average": run.trained.optimizer.ema_decay > 0,
    "tokenizer": tokenizer.name,
    "tokenizer_symbols": tokenizer.V,
    "tokenizer_sha256": tokenizer.sha256 or "fixed",
    "dtype": session.config.compute.dtype,
  }


def _measured(session, units, facts, folder):
  """Return {name: result} of all units; those that are kept are read."""
  results: dict[str, Any] = {}
  start, measured = time.monotonic(), 0
  for done, unit in enumerate(units):
    path = folder / f"{unit.name.replace('/', '-')}.json"
    kept = _kept(path)
    key = _key(unit, facts)
    if kept.get("key") == key:
      results[unit.name] = kept["result"]
      continue
    eta = ""
    if measured:
      seconds = (time.monotonic() - start) / measured * (len(units) - done)
      eta = f"  ETA {telemetry.format_duration(seconds)}"
    logging.info("benchmark %d/%d: %s%s", done + 1, len(units), unit.name, eta)
    session.progress = f"{done} of {len(units)} units"
    result = json.loads(disk.to_json(unit.measure()))
    record = {"key": key, "settings": unit.settings, "result": result}
    disk.write_atomically(path, disk.to_json(record, indent=2) + "\n")
    results[unit.name] = result
    measured += 1
  return results


def _key(unit, facts):
  """Return a hash of all that the result of a unit depends on."""
  record = disk.to_json([_VERSION, unit.name, unit.settings, facts])
  return hashlib.sha256(record.encode()).hexdigest()


def _kept(path):
  """Return the record of a unit that was measured before; {} without one."""
  try:
    data = reading.read(path, reading.JSON_BYTES)
    return reading.parse(data, {"key": str, "result": dict})
  except OSError:
    return {}
  except ValueError as error:
    logging.warning("%s: is measured again: %s", path, error)
    return {}
