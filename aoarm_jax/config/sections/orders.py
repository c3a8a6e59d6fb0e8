"""The generation orders of training."""

import dataclasses

from aoarm_jax.config.sections import fields

ORDER_FAMILIES = (
  "uniform",
  "left_to_right",
  "right_to_left",
  "mixture",
  "curriculum",
  "growing_blocks",
  "block",
  "shuffled_blocks",
  "given",
)


@dataclasses.dataclass(frozen=True)
class Orders:
  """The generation orders of training (aoarm_jax/orders.py)."""

  family: str = fields.field(
    "uniform",
    "family that generation orders are drawn from",
    choices=ORDER_FAMILIES,
    binds="run",
  )
  left_to_right_share: float = fields.field(
    0.1,
    "mixture only: share of left-to-right orders",
    low=0.0,
    high=1.0,
    binds="run",
  )
  curriculum_steps: int = fields.field(
    1000,
    "curriculum and growing_blocks only: number of steps until the orders that "
    "change are uniform",
    low=1,
    binds="run",
  )
  curriculum_start: int = fields.field(
    0,
    "curriculum and growing_blocks only: number of steps before that, in which "
    "all orders are left to right",
    low=0,
    binds="run",
  )
  curriculum_left_to_right_share: float = fields.field(
    0.0,
    "curriculum and growing_blocks only: share of orders that stay left to "
    "right, also at the end",
    low=0.0,
    high=1.0,
    binds="run",
  )
  block_width: int = fields.field(
    16,
    "block and shuffled_blocks only: width of a window, in positions",
    low=1,
    binds="run",
  )
  given: tuple[int, ...] = fields.field(
    (), "given only: the order, a permutation of 1..T", binds="run"
  )
  groups: str = fields.field(
    "none",
    "two_stream only: how ranks are grouped; the tokens of a group are "
    "generated together, independently of each other given earlier groups",
    choices=("none", "fixed", "random", "given"),
    binds="run",
  )
  group_width: int = fields.field(
    16,
    "number of ranks in a group for groups=fixed; mean number for "
    "groups=random",
    low=1,
    binds="run",
  )
  group_sizes: tuple[int, ...] = fields.field(
    (),
    "groups=given only: number of ranks in each group; they sum to T",
    binds="run",
  )

  @property
  def width(self) -> int:
    """Number of ranks in a group, in the mean; 1 without groups."""
    return 1 if self.groups == "none" else self.group_width

  @property
  def curriculum_end(self) -> int:
    """First step whose orders are those of the end; 0 for other families."""
    moves = self.family in ("curriculum", "growing_blocks")
    return self.curriculum_start + self.curriculum_steps if moves else 0

  @property
  def trains_left_to_right(self) -> bool:
    """True if many orders are left to right in all of the training."""
    share = {
      "left_to_right": 1.0,
      "mixture": self.left_to_right_share,
      "curriculum": self.curriculum_left_to_right_share,
      "growing_blocks": self.curriculum_left_to_right_share,
    }
    return share.get(self.family, 0.0) > 0
