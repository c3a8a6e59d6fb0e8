"""Builds the package; setup.cfg says what it is.

A wheel holds the experiments of configs/ as aoarm_jax/configs. A checkout, also
when it is installed in editable mode, has them in configs/ alone.
"""

import pathlib

import setuptools
from setuptools.command import build_py

_EXPERIMENTS = "configs"


class BuildWithExperiments(build_py.build_py):
  """Copies the experiments into the package."""

  def _experiments(self) -> dict[str, str]:
    """Returns {target in the build folder: file of the checkout}."""
    folder = pathlib.Path(self.build_lib, "aoarm_jax", _EXPERIMENTS)
    files = sorted(pathlib.Path(_EXPERIMENTS).glob("*.py"))
    return {str(folder / file.name): str(file) for file in files}

  def run(self) -> None:
    super().run()
    if self.editable_mode:
      return
    for target, source in self._experiments().items():
      self.mkpath(str(pathlib.Path(target).parent))
      self.copy_file(source, target)

  def get_source_files(self) -> list[str]:
    return [*super().get_source_files(), *self._experiments().values()]

  def get_outputs(self, include_bytecode: bool = True) -> list[str]:
    return [*super().get_outputs(include_bytecode), *self._experiments()]

  def get_output_mapping(self) -> dict[str, str]:
    return super().get_output_mapping() | self._experiments()


setuptools.setup(cmdclass={"build_py": BuildWithExperiments})
