"""The lines of the table of generation_speed: what they name and show."""

import dataclasses

from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.runs import text

# The masked diffusion model that the others are compared with. The method of
# generation that is timed with this model has the same name.
MASKED = next(
  name for name, kind in mechanisms.MECHANISMS.items() if kind.masked
)


@dataclasses.dataclass(frozen=True)
class Cell:
  """What one line of the table measures.

  Attributes:
    size: name of the model's size, or of a run.
    model: config.model.
    B: sequences that are generated together. 0 stands for the fastest batch.
    method: of generation.
  """

  size: str
  model: config_lib.Model
  B: int
  method: str

  def __str__(self):
    B = self.B or "best"
    return f"{self.size} T{self.model.T} B{B} {self.method}"

  @property
  def width(self) -> int:
    """Tokens per step; of speculative decoding, drafts per round."""
    number = self.method.rpartition("-")[2]
    return int(number) if number.isdigit() else 1


@dataclasses.dataclass(frozen=True)
class Result:
  """The speed of a cell.

  Attributes:
    size: as in Cell.
    T: length of a text in tokens.
    B: sequences that were generated together.
    method: as in Cell; masked diffusion adds its number of steps.
    tokens_per_second: of all sequences together.
    step_ms: milliseconds of one step; of speculative decoding, of one round.
    floor_ms: milliseconds that the necessary bytes or FLOPs of a step take.
      None where the bandwidth is not known.
    launches: kernels per step; 0 where the program does not tell.
    tokens_per_step: of one sequence.
    timed: the part of the texts that was timed.
    best: whether B is the fastest batch that was tried.
  """

  size: str
  T: int
  B: int
  method: str
  tokens_per_second: float
  step_ms: float
  floor_ms: float | None
  launches: int
  tokens_per_step: float
  timed: str
  best: bool = False

  def __str__(self):
    floor, floors = "-", "-"
    if self.floor_ms is not None:
      floor = f"{self.floor_ms:.4f}"
      floors = f"{self.step_ms / self.floor_ms:.1f}"
    return _line(
      self.size,
      f"{self.T}",
      f"{self.B}",
      self.method,
      f"{self.tokens_per_second:,.0f}",
      f"{self.step_ms:.3f}",
      floor,
      floors,
      f"{self.launches or '-'}",
      f"{self.tokens_per_step:.2f}",
      self.timed,
    )


# Title of each column of the table -> side on which its cells stand, and width.
_COLUMNS = {
  "size": ("<", 10),
  "T": (">", 5),
  "B": (">", 5),
  "method": ("<", 14),
  "tokens/s": (">", 11),
  "step ms": (">", 9),
  "floor ms": (">", 8),
  "floors": (">", 6),
  "launches": (">", 8),
  "tok/step": (">", 8),
  "timed": ("<", 0),
}


def _line(*cells: str) -> str:
  sides, widths = zip(*_COLUMNS.values())
  return text.padded(cells, widths, "".join(sides))


def header() -> str:
  """Returns the titles of the lines that results are printed as."""
  return _line(*_COLUMNS)
