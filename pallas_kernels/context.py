"""Where the kernels of this package are to run."""

import jax

# None: on the default backend, which must be the kernel's own. True, or the
# InterpretParams of a Pallas backend: interpreted, on any backend, slowly, for
# tests. False: compiled for the kernel's own platform though this process has
# another one, as ahead-of-time compilation does.
interpret = jax.make_user_context(default_value=None)
