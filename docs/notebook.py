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
# as cells, and `python docs/notebook.py` runs it from top to bottom. It trains
# two small models on the built-in novels, fills gaps, scores texts, and shows
# in which order a text comes about. With 600 steps it takes some minutes on a
# CPU. `NOTEBOOK_STEPS=100` is faster, and the texts are worse.

# %%
import os
import pathlib
import subprocess
import sys

import numpy as np

import aoarm_jax
from aoarm_jax.generation import replay

STEPS = int(os.environ.get("NOTEBOOK_STEPS", "600"))
RUNS = pathlib.Path("runs")

# %% [markdown]
# ## Train, or load what is trained
#
# The same command resumes a run, and does nothing where the run is finished.
# `aoarm_jax.load` also takes an exported model, here or on a hub.


# %%
def trained(mechanism):
  """Return a model of a mechanism, trained for STEPS steps."""
  workdir = RUNS / f"notebook-{mechanism}-{STEPS}"
  command = [
    *(sys.executable, "-m", "aoarm_jax.main", f"--config={mechanism}:tiny"),
    *(f"--workdir={workdir}", f"--config.train.steps={STEPS}"),
  ]
  subprocess.run(command, check=True)
  return aoarm_jax.load(workdir)


two_stream = trained("two_stream")
print(two_stream)

# %% [markdown]
# ## Infill
#
# A `_` is one unknown character. Gaps may stand anywhere, also before known
# text. `log_p` is the exact log-probability of the filling, in nats.

# %%
PROMPT = "she said noth___ to her moth__ but went into the _____"
for text in two_stream.infill(PROMPT, count=4, temperature=0.7, seed=1):
  print(f"{text.log_p:7.2f}  {text.text}")

# %% [markdown]
# ## Score
#
# The part in brackets is scored, given the rest. A word that the text suggests
# should be more likely than another word of the same length.

# %%
CHOICES = ["she said [nothing] to her", "she said [gnihton] to her"]
for score in two_stream.score(CHOICES):
  print(f"{score.bits:6.2f} bits  {score.text}")

# %% [markdown]
# One text has one log-probability for each order. Here are eight orders, and
# the log of their mean probability.

# %%
TEXT = "it was the best of times it was the worst of times"
score = two_stream.score(TEXT, order="uniform", orders=8)
print("in each order:", np.round(score.order_log_p, 1))
print("of the mixture:", round(score.log_p, 1))

# %% [markdown]
# ## Watch an order
#
# `steps` says which step decided each token; 0 is a known one. The model fills
# the gap where it is surest first.

# %%
GAP = "she opened the ____________________ and looked at him"
(surest,) = two_stream.infill(
  GAP, method="adaptive", width=1, temperature=0.7, seed=1
)
for step in range(0, max(surest.steps) + 1, 5):
  shown = zip(surest.text, surest.steps)
  print("".join(c if at <= step else "_" for c, at in shown))

# %% [markdown]
# ## Compare two mechanisms
#
# `mdlm` is a masked diffusion model. It can decide many tokens in one step. The
# likelihoods below are those of the chain rule in random orders, for both.

# %%
mdlm = trained("mdlm")
SENTENCES = [
  "there was no answer and the room was very still",
  "he had been a captain in the army for many years",
  "the wind was cold and the sea was dark that night",
]
for model in (two_stream, mdlm):
  scores = model.score(SENTENCES, order="uniform", orders=4)
  bits = np.mean([score.bits_per_char for score in scores])
  print(f"{model.config.model.mechanism}: {bits:.3f} bits per character")

# %% [markdown]
# The page below replays both: the slider goes over the steps, and the colour is
# the order or the probability of a token.

# %%
law = dict(temperature=0.7, seed=1)
texts = {
  "two_stream, random order": two_stream.infill(GAP, **law)[0],
  "two_stream, surest first": surest,
  "mdlm, one token a step": mdlm.infill(GAP, method="sequential", **law)[0],
  "mdlm, five steps": mdlm.infill(GAP, method="confidence", steps=5, **law)[0],
}
replay.write("replay.html", texts, two_stream.tokenizer, title=GAP)
try:
  from IPython import display

  display.display(display.IFrame("replay.html", "100%", 640))
except ImportError:
  print("open replay.html in a browser")
