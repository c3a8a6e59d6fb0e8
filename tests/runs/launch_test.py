"""Launchers: what they print and refuse, and the scripts that they write."""

import contextlib
import io
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from absl.testing import absltest, parameterized
from launchers import (
  APPLY,
  LAUNCHERS,
  POD,
  ROOT,
  SLICE,
  SUBMIT,
  TRAIN,
  LaunchTest,
  launch,
)

from launch import common, tpu_pod


class CommandsTest(LaunchTest):
  @parameterized.parameters(*LAUNCHERS)
  def test_help(self, launcher):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), self.assertRaises(SystemExit) as stop:
      LAUNCHERS[launcher].make_parser().parse_args(["--help"])
    self.assertEqual(stop.exception.code, 0)
    self.assertIn(f"usage: python -m launch.{launcher}", out.getvalue())

  @parameterized.parameters(
    ("gcloud", "tpu_pod", "create", *SLICE),
    ("gcloud", "tpu_pod", "delete", *POD),
    ("kubectl", "gke", *APPLY, "--tpu=v5e:4x4"),
    ("kubectl", "gke", "delete", "--name=run"),
    ("sbatch", "slurm", "submit", "--name=run", "--nodes=1"),
    ("scancel", "slurm", "cancel", "--name=run"),
  )
  def test_a_client_that_is_not_there(self, client, launcher, verb, *flags):
    starts = verb in ("apply", "submit")
    line = self.refused(launcher, verb, *flags, command=TRAIN * starts)
    self.assertRegex(line, rf"^launch.{launcher}: error: {client} is not inst")

  @parameterized.parameters(
    ("tpu_pod", ["run", *POD], [], "no command: end with -- python -m"),
    ("gke", [*APPLY, "--tpu="], TRAIN, "--tpu=: '' is not one of v4"),
    ("gke", [*APPLY, "--gpu="], TRAIN, "--gpu=: no machine of GKE has this "),
    ("gke", [*APPLY, "--gpu=nvidia-h100"], TRAIN, "there are .*h100-80gb"),
    (
      "gke",
      [*APPLY, "--gpu=nvidia-gb200", "--gpus-per-node=8"],
      TRAIN,
      "--gpus-per-node=8: must be from 1 to 4",
    ),
    (
      "gke",
      [*APPLY, "--gpu=nvidia-l4", "--processes-per-node=2"],
      TRAIN,
      "--processes-per-node=2: must be 1, or --gpus-per-node=8",
    ),
    ("gke", [*APPLY, "--tpu=v5e:4x4", "--nodes=2"], TRAIN, "only with --gpu"),
    ("gke", [*APPLY[:2], "--image=a b", "--tpu=v5e:4x4"], TRAIN, "write regi"),
    (
      "gke",
      [*APPLY, "--tpu=v5e:4x4", "--service-account=a b"],
      TRAIN,
      "--service-account=a b: write the name of a ServiceAccount",
    ),
    (
      "gke",
      [*APPLY, "--tpu=v5e:4x4", "--max-restarts=2147483648"],
      TRAIN,
      "must be from 0 to 2147483647",
    ),
    (
      "gke",
      [*APPLY, "--tpu=v5e:4x4", "--spot", "--grace-seconds=121"],
      TRAIN,
      "--grace-seconds=121: must be from 1 to 120",
    ),
    ("gke", [*APPLY, "--tpu=v5e:4x4", "--env=1=2"], TRAIN, "write NAME=VALUE"),
    (
      "gke",
      [*APPLY, "--tpu=v5e:4x4", "--env=AOARM_DISTRIBUTED=0"],
      TRAIN,
      "AOARM_DISTRIBUTED has a value already",
    ),
    ("gke", [*APPLY, "--tpu=v5e:4x4", "--volume=a"], TRAIN, "write CLAIM:PATH"),
    (
      "gke",
      [*APPLY, "--tpu=v5e:4x4", "--volume=a:/dev/shm"],
      TRAIN,
      "/dev/shm is mounted already",
    ),
    (
      "local",
      ["--processes=1", "--machines=2"],
      TRAIN,
      "--address=: write host:port of machine 0",
    ),
    (
      "local",
      ["--processes=1", "--machines=2", "--address=h:99999"],
      TRAIN,
      "from 1 to 65535",
    ),
    (
      "local",
      ["--processes=1", "--machines=2", "--address=h:1", "--machine=2"],
      TRAIN,
      "--machine=2: must be from 0 to 1",
    ),
    (
      "local",
      ["--processes=1", "--grace-seconds=nan"],
      TRAIN,
      "--grace-seconds=nan: must be from 0 to 1000000",
    ),
    ("local", ["--processes=1", "--stop-seconds=inf"], TRAIN, "=inf: must be"),
    ("tpu_pod", ["run", *POD], TRAIN[:-1], r"--workdir=\(none\).*gs://bucket"),
    (
      "tpu_pod",
      ["run", *POD],
      [*TRAIN[:-1], "--workdir", "/tmp/r"],
      "--workdir=/tmp/r.*gs://bucket",
    ),
    (
      "tpu_pod",
      ["run", *POD],
      [*TRAIN, "--workdir=/tmp/r"],
      "--workdir=/tmp/r.*gs://bucket",
    ),
    ("tpu_pod", ["logs", *POD], TRAIN, "logs takes no command.*drop 'python'"),
    ("tpu_pod", ["create", *POD, "--accelerator=v5"], [], "write <type>-<s"),
    ("tpu_pod", ["create", *POD, "--accelerator=v9-8"], [], "one of v4, v5"),
    (
      "tpu_pod",
      ["create", *POD, "--accelerator=v5p-0"],
      [],
      "no such size; v5p has 8, up to 12288",
    ),
    ("tpu_pod", ["create", *POD, "--accelerator=v6e-12"], [], "has 8 and 16,"),
    ("tpu_pod", ["create", *POD, "--accelerator=v6e-2"], [], "has 1 and 4, "),
    ("tpu_pod", ["create", *POD, "--accelerator=v6e-08"], [], "no such size"),
    ("tpu_pod", ["create", *POD, "--accelerator=v5p-24"], [], "16 and 32,"),
    ("tpu_pod", ["create", *POD, "--accelerator=v4-8320"], [], "8192, up to"),
    (
      "tpu_pod",
      ["create", *SLICE, "--wait-minutes=0"],
      [],
      "--wait-minutes=0: must be at least 1",
    ),
    ("tpu_pod", ["create", *SLICE, "--name=My_pod"], [], "--name=My_pod: use"),
    ("tpu_pod", ["logs", *POD, "--worker=-1"], [], "write the number of a ho"),
    ("tpu_pod", ["create", *SLICE, "--zone=east"], [], "--zone=east: write as"),
    ("gke", [*APPLY, "--tpu=v5:4x4"], TRAIN, "'v5' is not one of v4, v5e, v5p"),
    ("gke", [*APPLY, "--tpu=v5p:4x4"], TRAIN, "2x2x1, .*up to 16x16x24"),
    ("gke", [*APPLY, "--tpu=v5e:4x3"], TRAIN, "there are 1x1, 2x2, .* 16x16$"),
    ("gke", [*APPLY, "--tpu=v5e:32x16"], TRAIN, "no node pool has this topolo"),
    ("gke", [*APPLY, "--tpu=v6e:4x2"], TRAIN, "no node pool has this topology"),
    ("gke", [*APPLY, "--tpu=v6e:2x8"], TRAIN, "no node pool has this topology"),
    ("gke", [*APPLY, "--tpu=v5p:8x4x4"], TRAIN, "no node pool has this topolo"),
    ("gke", [*APPLY, "--tpu=v4:2x2x8"], TRAIN, "no node pool has this topolog"),
    (
      "gke",
      [*APPLY, "--gpu=nvidia-l4", "--nodes=0"],
      TRAIN,
      "--nodes=0: must be at",
    ),
    ("gke", [*APPLY, "--tpu=v5e:4x4"], TRAIN[:-1], r"\(none\).*gs://bucket"),
    ("gke", ["status", "--name=run"], TRAIN, "status takes no command"),
    ("slurm", ["submit", "--name=r", "--nodes=0"], TRAIN, "--nodes=0: must"),
    ("slurm", [*SUBMIT, "--time=24855-03:14:08"], TRAIN, "up to 24855 days"),
    ("slurm", [*SUBMIT, "--time=1:60:00"], TRAIN, "--time=1:60:00: write "),
    ("slurm", [*SUBMIT, "--time=1:00:00 "], TRAIN, "--time=1:00:00 : write "),
    ("slurm", [*SUBMIT, "--notice-seconds=65536"], TRAIN, "from 30 to 65535"),
    ("slurm", [*SUBMIT, "--cpus-per-task=65536"], TRAIN, "from 1 to 65533"),
    ("slurm", [*SUBMIT, "--gpus-per-node=70000"], TRAIN, "from 0 to 65533"),
    ("slurm", [*SUBMIT, "--mem=1.5G"], TRAIN, "--mem=1.5G: write a whole num"),
    ("slurm", [*SUBMIT, "--mem=2P"], TRAIN, "--mem=2P: write a whole number"),
    ("slurm", [*SUBMIT, "--qos=a\nb"], TRAIN, "no backslash and no control"),
    ("slurm", [*SUBMIT, "--account=a\\b"], TRAIN, "no backslash and no con"),
    ("slurm", [*SUBMIT, "--also=-N 2"], TRAIN, "write one long flag"),
    ("slurm", [*SUBMIT, "--also=--nodes=3"], TRAIN, "write --nodes without"),
    ("slurm", [*SUBMIT, "--also=--out=x"], TRAIN, "--also=--out=x: this lau"),
    ("slurm", [*SUBMIT, "--also=--gpu-bind=none"], TRAIN, "needs it unset"),
    ("slurm", [*SUBMIT, "--also=--chdir=/a"], TRAIN, "this launcher sets"),
    (
      "slurm",
      [*SUBMIT, "--gpus-per-node=4", "--processes-per-node=2"],
      TRAIN,
      "--processes-per-node=2: must be 1, or --gpus-per-node=4",
    ),
    (
      "slurm",
      ["submit", "--name=r", "--nodes=1", "--time=5"],
      TRAIN,
      "--time=5: write .*24:00:00",
    ),
    (
      "slurm",
      ["submit", "--name=r", "--nodes=1", "--time=0:05:00"],
      TRAIN,
      "--notice-seconds=300: must be below --time=0:05:00",
    ),
    ("slurm", ["submit", "--name=r", "--nodes=1"], [], "no command"),
    ("local", ["--processes=0"], TRAIN, "--processes=0: must be at least 1"),
    ("local", ["--processes=2"], [], "no command"),
    ("local", ["--processes=2"], ["/absent"], "/absent: cannot be started: No"),
  )
  def test_what_cannot_be(self, launcher, flags, command, message):
    self.assertRegex(self.refused(launcher, *flags, command=command), message)
    if "/absent" not in command:  # A dry run refuses the same.
      self.refused(launcher, *flags, "--dry-run", command=command)

  def test_a_file_that_cannot_be_written(self):
    with self.assertRaisesRegex(
      common.LaunchError, "^/dev/null/x: cannot be written here: "
    ):
      common.Shell(dry_run=False).write("/dev/null/x", "")

  def test_the_pages_show_what_is_printed(self):
    """Every dry run in docs/launching.md, word for word, without a client."""
    page = (ROOT / "docs" / "launching.md").read_text()
    runs = re.findall(
      r"^```console\n\$ (.*?[^\\])\n(.*?)^```$", page, re.DOTALL | re.MULTILINE
    )
    seen = set()
    for text, output in runs:
      words = shlex.split(text.replace("\\\n", " "))
      self.assertEqual(words[:2], ["python", "-m"])
      split = words.index("--") if "--" in words else len(words)
      launcher = words[2].removeprefix("launch.")
      with self.subTest(text):
        self.assertIn("--dry-run", words[:split])
        code, out, err = launch(
          launcher, *words[3:split], command=words[split + 1 :]
        )
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(out.rstrip(), output.rstrip())
        self.assertEmpty(os.listdir(self.folder))
      seen.add((launcher, words[3] if launcher != "local" else ""))
    verbs = {
      "gke": "apply status logs delete",
      "local": "",
      "slurm": "submit status logs cancel",
      "tpu_pod": "create install run logs resume stop delete",
    }
    every = {(k, v) for k, vs in verbs.items() for v in vs.split() or [""]}
    self.assertEqual(seen, every)
    linked = (ROOT / "README.md").read_text()
    self.assertIn("docs/launching.md", linked)


class ScriptsTest(LaunchTest):
  def test_shellcheck(self):
    """All that launchers write for bash, and the script of CI."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    for client in ("sbatch", "git", "gcloud"):
      self.client(client, "")
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    gpus = ["--gpus-per-node=8", "--processes-per-node=1", "--qos=a b"]
    for launcher, *words in (
      ["slurm", "submit", "--name=a", "--nodes=2"],
      ["slurm", "submit", "--name=b", "--nodes=2", "--cpus-per-task=2", *gpus],
      ["tpu_pod", "install", *POD],
      ["tpu_pod", "run", *POD],
    ):
      code, _, err = launch(
        launcher,
        *words,
        command=[] if "install" in words else [*TRAIN, "--text=it's (a)"],
        path=f"{self.folder}/bin:{path}",
      )
      self.assertEqual((code, err), (0, ""))
    folder = self.folder / common.FOLDER
    (folder / "stop.sh").write_text(f"#!/bin/bash\n{tpu_pod._STOP}\n")
    names = [
      "a.sbatch",
      "b.sbatch",
      "install.sh",
      "next.sh",
      "start.sh",
      "stop.sh",
    ]
    self.assertEqual(sorted(os.listdir(folder)), names)
    scripts = [folder / name for name in names]
    done = subprocess.run(
      [
        shutil.which("shellcheck", path=path),
        "--exclude=SC2016",  # Another shell reads the single quotes.
        *scripts,
        ROOT / ".ci" / "run",
      ],
      capture_output=True,
      text=True,
    )
    self.assertEqual((done.returncode, done.stdout), (0, ""))


if __name__ == "__main__":
  absltest.main()
