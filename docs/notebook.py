# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First steps in a notebook
#
# This file is a notebook: Jupyter (with jupytext), VS Code and PyCharm open it
# as cells, and `python docs/notebook.py` runs it from top to bottom. It fills
# gaps, scores texts and shows in which order a text comes about, by a model
# that comes with the package. Then it trains two small models and compares
# them. That takes some minutes on a CPU; NOTEBOOK_STEPS=100 takes fewer steps.

# %%
import os
import subprocess
import sys

import numpy as np

import aoarm_jax
from aoarm_jax.generation import replay

STEPS = int(os.environ.get("NOTEBOOK_STEPS", "600"))
model = aoarm_jax.load("books-8m")
print(model)

# %% [markdown]
# ## Infill
#
# A `_` is one unknown character. Gaps may stand anywhere, also before known
# text. `log_p` is the exact log-probability of the filling, in nats. The first
# call compiles a program, which takes some seconds.

# %%
PROMPT = "she said noth___ to her moth__ and went out into the ______"
for text in model.infill(PROMPT, count=4, temperature=0.7, seed=1):
  print(f"{text.log_p:7.2f}  {text.text}")

# %% [markdown]
# ## Score
#
# The part in brackets is scored, given the rest. A text has a log-probability
# in every order of the scored letters. Here are the score of their mean over
# eight random orders, and how far the orders lie apart.

# %%
CHOICES = [
  "she said [nothing] to her mother",
  "she said [gnihton] to her mother",
]
for score in model.score(CHOICES, order="uniform", orders=8):
  spread = np.std(score.order_log_p) / np.log(2)
  print(f"{score.bits:6.2f} bits (orders: ±{spread:.2f})  {score.text}")

# %% [markdown]
# ## Watch an order
#
# `steps` says which step decided each token; 0 is a known one. Here the model
# goes on where it is surest.

# %%
GAP = "she opened the ____________ and looked at him"
(surest,) = model.infill(
  GAP, method="adaptive", width=1, temperature=0.7, seed=1
)
for step in range(0, max(surest.steps) + 1, 3):
  shown = zip(surest.text, surest.steps)
  print("".join(c if at <= step else "_" for c, at in shown))

# %% [markdown]
# ## Train two mechanisms, and compare them
#
# The same command resumes a run, and does nothing where the run is finished.
# `mdlm` is a masked diffusion model, which can decide many tokens in one step.
# Both are trained at the same time.


# %%
def start(mechanism, workdir):
  """Return the process that trains a small model of a mechanism."""
  command = [
    *(sys.executable, "-m", "aoarm_jax.main", f"--config={mechanism}:tiny"),
    *(f"--workdir={workdir}", f"--config.train.steps={STEPS}"),
  ]
  return subprocess.Popen(command)


runs = {
  name: f"runs/notebook-{name}-{STEPS}" for name in ("two_stream", "mdlm")
}
processes = [start(name, workdir) for name, workdir in runs.items()]
assert not any([process.wait() for process in processes])
pair = {name: aoarm_jax.load(workdir) for name, workdir in runs.items()}

# %% [markdown]
# Both likelihoods are those of the chain rule in random orders.

# %%
SENTENCES = [
  "there was no answer and the room was very still",
  "he had been a captain in the army for many years",
  "the wind was cold and the sea was dark that night",
]
for mechanism, small in pair.items():
  scores = small.score(SENTENCES, order="uniform", orders=4)
  bits = np.mean([score.bits_per_char for score in scores])
  print(f"{mechanism}: {bits:.3f} bits per character")

# %% [markdown]
# This page replays how both fill the gap. The slider goes over the steps. The
# colour is the order, or the probability of a token.

# %%
law = dict(temperature=0.7, seed=1)
two_stream, mdlm = pair.values()
texts = {
  "books-8m, surest first": surest,
  "two_stream, random order": two_stream.infill(GAP, **law)[0],
  "mdlm, one token a step": mdlm.infill(GAP, method="sequential", **law)[0],
  "mdlm, four steps": mdlm.infill(GAP, method="confidence", steps=4, **law)[0],
}
replay.write("replay.html", texts, model.tokenizer, title=GAP)
try:
  from IPython import display

  display.display(display.IFrame("replay.html", "100%", 640))
except ImportError:
  print("open replay.html in a browser")
