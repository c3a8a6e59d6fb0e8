"""A switch that says where the kernels of this package run."""

import jax

# None: on the default backend, which must be the kernel's platform.
# True, or the InterpretParams of a Pallas backend: in the interpreter. It is
# slow, runs on any backend and serves tests.
# False: compiled for the kernel's platform, although this process runs on
# another one. Ahead-of-time compilation needs this.
interpret = jax.make_user_context(default_value=None)
