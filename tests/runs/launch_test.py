"""Launchers: what they print, refuse and write, and processes that are lost."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jsonschema
import pytest
from absl.testing import absltest, parameterized

from launch import common, gke, local, slurm, tpu_pod

# On the older Python alone, for time.
pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCHERS = {"gke": gke, "local": local, "slurm": slurm, "tpu_pod": tpu_pod}
TRAIN = [
  "python",
  "-m",
  "aoarm_jax.main",
  "--config=c.py",
  "--workdir=gs://b/r",
]
POD = ["--name=pod", "--zone=us-east5-a"]
SLICE = [*POD, "--accelerator=v5p-256"]
APPLY = ["apply", "--name=run", "--image=i:1"]
SUBMIT = ["submit", "--name=run", "--nodes=1"]


def launch(launcher, *argv, command=TRAIN, path=""):
  """(exit code, stdout, stderr) of a launcher, where PATH has no client."""
  out, err = io.StringIO(), io.StringIO()
  module = LAUNCHERS[launcher]
  words = [*argv, "--", *command] if command else argv
  with (
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    absltest.mock.patch.dict(os.environ, {"PATH": path}),
  ):
    code = common.main(module.make_parser, module.start, words)
  return code, out.getvalue(), err.getvalue()


class LaunchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.enterContext(contextlib.chdir(self.folder))

  def client(self, name, script):
    """Puts a client of ours into the folder bin."""
    path = self.folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)

  def refused(self, *argv, **kwargs):
    """The one line of a command that cannot be."""
    code, out, err = launch(*argv, **kwargs)
    self.assertEqual((code, out), (2, ""), err)
    self.assertLen(err.splitlines(), 1)
    self.assertEmpty(os.listdir(self.folder))
    return err


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
      "--grace-seconds=nan: must be at least 0",
    ),
    ("tpu_pod", ["run", *POD], TRAIN[:-1], r"--workdir=\(none\).*gs://bucket"),
    (
      "tpu_pod",
      ["run", *POD],
      [*TRAIN[:-1], "--workdir", "/tmp/r"],
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


def _closed(properties, *required):
  """The schema of an object that has no other fields."""
  return {
    "type": "object",
    "properties": properties,
    "required": list(required),
    "additionalProperties": False,
  }


# The part that we use of the schema in config/components/crd/bases/
# jobset.x-k8s.io_jobsets.yaml of github.com/kubernetes-sigs/jobset, v0.10.0,
# and the names that its webhook accepts.
# kubernetes_validate checks a Job's fields.
_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
_RULE = _closed(
  {
    "name": {
      "type": "string",
      "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
      "maxLength": 128,
    },
    "action": {
      "enum": [
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
      ]
    },
    "onJobFailureReasons": {
      "type": "array",
      "items": {
        "enum": [
          "BackoffLimitExceeded",
          "DeadlineExceeded",
          "FailedIndexes",
          "MaxFailedIndexesExceeded",
          "PodFailurePolicy",
        ]
      },
    },
    "onJobFailureMessagePatterns": {
      "type": "array",
      "items": {"type": "string", "format": "regex"},
    },
  },
  "action",
  "name",
)
_REPLICATED_JOB = _closed(
  {
    "name": {"type": "string", "pattern": _LABEL, "maxLength": 20},
    "replicas": {"type": "integer", "minimum": 0},
    "template": _closed({"spec": {"type": "object"}}, "spec"),
  },
  "name",
  "template",
)
JOB_SET = _closed(
  {
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    "kind": {"const": "JobSet"},
    "metadata": _closed(
      {
        # With it, names of pods have at most 63 characters.
        "name": {"type": "string", "pattern": _LABEL, "maxLength": 40},
        "annotations": {"additionalProperties": {"type": "string"}},
      },
      "name",
    ),
    "spec": _closed(
      {
        "failurePolicy": _closed(
          {
            "maxRestarts": {
              "type": "integer",
              "minimum": 0,
              "maximum": 2**31 - 1,
            },
            "rules": {"type": "array", "items": _RULE},
          }
        ),
        "replicatedJobs": {"type": "array", "items": _REPLICATED_JOB},
      }
    ),
  },
  *("apiVersion", "kind", "metadata", "spec"),
)


class GkeTest(LaunchTest):
  def manifest(self, *flags):
    code, out, err = launch("gke", *APPLY, *flags, "--dry-run")
    self.assertEqual((code, err), (0, ""))
    path, rest = out.split("\n", 1)
    manifest, call, _ = rest.rsplit("\n", 2)
    self.assertEqual(path, "# runs/launch/run.json")
    self.assertEqual(call, "kubectl apply --filename=runs/launch/run.json")
    return json.loads(manifest)

  def pod(self, *flags):
    job = self.manifest(*flags)["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]

  @parameterized.parameters(
    ("v5e:2x2", 1, 4),
    ("v5e:2x4", 1, 8),
    ("v5e:4x4", 4, 4),
    ("v6e:16x16", 64, 4),
    ("v4:2x2x1", 1, 4),
    ("v5p:4x4x8", 32, 4),
    ("v6e:1x1", 1, 1),
  )
  def test_tpu_slices(self, tpu, hosts, chips):
    tree = self.manifest(f"--tpu={tpu}")
    # Slices of one host share a node pool: none has one to itself.
    annotations = tree["metadata"].get("annotations", {})
    self.assertEqual("exclusive-topology" in str(annotations), hosts > 1)
    spec = tree["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    self.assertEqual((job["parallelism"], job["completions"]), (hosts, hosts))
    pod = job["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    self.assertEqual(limits, {"google.com/tpu": chips})
    self.assertNotIn("tolerations", pod)

  @parameterized.parameters(
    ["--tpu=v5p:4x4x8", "--spot"],
    ["--tpu=v6e:2x4", "--max-restarts=2147483647"],
    ["--gpu=nvidia-h100-80gb", "--nodes=3", "--service-account=me"],
    [
      *("--gpu=nvidia-gb200", "--processes-per-node=4", "--env=A=$(B)"),
      *("--volume=disk:/data", "--volume=other:/data/other"),
    ],
  )
  def test_the_manifest_is_of_the_api(self, *flags):
    tree = self.manifest(*flags)
    jsonschema.validate(tree, JOB_SET)
    end, again = tree["spec"]["failurePolicy"]["rules"]
    self.assertEqual(end["action"], "FailJobSet")
    self.assertEqual(again["action"], "RestartJobSetAndIgnoreMaxRestarts")
    (jobs,) = tree["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    again, _, end = job["podFailurePolicy"]["rules"]
    self.assertEqual(again["onExitCodes"]["values"], [75])
    self.assertEqual(end["onExitCodes"]["values"], [1, 2, 126, 127, 130])
    self.assertTrue(job["template"]["spec"]["shareProcessNamespace"])
    names = [v["name"] for v in job["template"]["spec"]["volumes"]]
    (container,) = job["template"]["spec"]["containers"]
    self.assertEqual(names, [m["name"] for m in container["volumeMounts"]])
    if importlib.util.find_spec("kubernetes_validate") is None:
      self.skipTest("kubernetes-validate is not installed (extra test)")
    import kubernetes_validate

    whole = {
      "apiVersion": "batch/v1",
      "kind": "Job",
      "metadata": {},
      "spec": job,
    }
    kubernetes_validate.validate(whole, "1.31", strict=True)
    job["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with self.assertRaises(kubernetes_validate.ValidationError):
      kubernetes_validate.validate(whole, "1.31", strict=True)

  @parameterized.parameters(
    (lambda tree: tree.update(status={}),),
    (lambda tree: tree["spec"]["failurePolicy"].update(maxRestarts=2**31),),
    (
      lambda tree: tree["spec"]["failurePolicy"]["rules"][0].update(
        name="pre-empted"
      ),
    ),
    (lambda tree: tree["metadata"].update(name="1st"),),
  )
  def test_the_schema_refuses(self, change):
    tree = self.manifest("--tpu=v5e:4x4")
    change(tree)
    with self.assertRaises(jsonschema.ValidationError):
      jsonschema.validate(tree, JOB_SET)

  @parameterized.parameters(
    ([], 120),
    (["--spot"], 25),
    (["--spot", "--grace-seconds=120"], 120),
    (["--grace-seconds=600"], 600),
  )
  def test_grace(self, flags, seconds):
    pod = self.pod("--tpu=v5e:4x4", *flags)
    self.assertEqual(pod["terminationGracePeriodSeconds"], seconds)

  def test_shared_memory_variables_and_volumes(self):
    pod = self.pod("--gpu=nvidia-l4", "--env=X=a $(b) $", "--volume=d:/data")
    memory, disk = pod["volumes"]
    self.assertEqual(memory["emptyDir"], {"medium": "Memory"})
    self.assertEqual(disk["persistentVolumeClaim"], {"claimName": "d"})
    container = pod["containers"][0]
    self.assertEqual(
      [m["mountPath"] for m in container["volumeMounts"]], ["/dev/shm", "/data"]
    )
    # Kubernetes would replace $(b) by a variable; $$ is $.
    self.assertEqual(container["env"][-1], {"name": "X", "value": "a $$(b) $$"})

  def test_a_command_reaches_the_pod_as_it_is(self):
    command = [*TRAIN, "--text=$(HOME) $x"]
    _, out, _ = launch(
      *("gke", *APPLY, "--tpu=v5e:4x4", "--dry-run"), command=command
    )
    self.assertIn('"--text=$$(HOME) $$x"', out)

  def test_a_workdir_on_a_volume(self):
    flags = ["--tpu=v5e:4x4", "--volume=disk:/data", "--dry-run"]
    for workdir, code in (("/data/run", 0), ("/database/run", 2)):
      command = [*TRAIN[:-1], f"--workdir={workdir}"]
      self.assertEqual(launch("gke", *APPLY, *flags, command=command)[0], code)

  def test_one_process_on_each_gpu(self):
    flags = ["--gpu=nvidia-h100-80gb", "--nodes=3", "--processes-per-node=8"]
    container = self.pod(*flags)["containers"][0]
    self.assertEqual(container["resources"]["limits"], {"nvidia.com/gpu": 8})
    words = container["command"]
    split = words.index("--")
    self.assertEqual(words[:3], ["python", "-m", "launch.local"])
    self.assertEqual(words[split + 1 :], TRAIN)
    # What the launcher in the last pod would start.
    inside = [x.replace("$(AOARM_MACHINE)", "2") for x in words[3:split]]
    _, out, _ = launch("local", *inside, "--dry-run")
    lines = out.splitlines()
    self.assertLen(lines, 8)
    for index, line in enumerate(lines):
      self.assertIn(
        "AOARM_COORDINATOR_ADDRESS=run-hosts-0-0.run:8476 "
        f"AOARM_PROCESS_COUNT=24 AOARM_PROCESS_ID={16 + index} "
        f"CUDA_VISIBLE_DEVICES={index} ",
        line,
      )

  def test_gpu_processes_find_each_other(self):
    tree = self.manifest("--gpu=nvidia-h100-80gb", "--nodes=3")
    pod = tree["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    env = {e.pop("name"): e for e in pod["spec"]["containers"][0]["env"]}
    self.assertEqual(
      env["AOARM_COORDINATOR_ADDRESS"]["value"], "run-hosts-0-0.run:8476"
    )
    self.assertEqual(env["AOARM_PROCESS_COUNT"]["value"], "3")
    self.assertIn("completion-index", str(env["AOARM_PROCESS_ID"]["valueFrom"]))

  def test_apply(self):
    self.client("kubectl", 'echo "$@" > called')
    path = f"{self.folder}/bin:{os.environ['PATH']}"
    self.assertEqual(launch("gke", *APPLY, "--tpu=v5e:4x4", path=path)[0], 0)
    called = (self.folder / "called").read_text()
    self.assertEqual(called, "apply --filename=runs/launch/run.json\n")
    applied = json.loads((self.folder / common.FOLDER / "run.json").read_text())
    self.assertEqual(applied, self.manifest("--tpu=v5e:4x4"))


# srun and the tasks of a step. The n-th task takes the n-th word of ENDS: its
# exit code, KILL for a task that srun kills, or ABRT for one that aborts.
SRUN = r"""
while [ "$1" != bash ]; do shift; done
shift 2; script=$1; shift; worst=0; n=0
for end in $ENDS; do
  case $end in
    KILL) code=137 ;;
    ABRT) bash -c "$script" task bash -c 'kill -ABRT $$' | sed "s/^/$n: /"
      code=${PIPESTATUS[0]} ;;
    *) bash -c "$script" task bash -c "exit $end" | sed "s/^/$n: /"
      code=${PIPESTATUS[0]} ;;
  esac
  n=$((n + 1)); [ $code -gt $worst ] && worst=$code
done
exit $worst
"""


class SlurmTest(LaunchTest):
  def lines(self, *flags):
    code, out, err = launch("slurm", *SUBMIT, *flags, "--dry-run")
    self.assertEqual((code, err), (0, ""))
    return out.splitlines()

  def test_options_are_quoted(self):
    lines = self.lines(
      *("--cpus-per-task=12", "--mem=200G", "--qos=high", "--exclusive"),
      *("--constraint=a&(b|c)", "--partition=gpu,all", "--account=it's"),
      *("--also=--comment=a #b", "--also=--no-kill"),
    )
    options = {x.removeprefix("#SBATCH ") for x in lines if x[:8] == "#SBATCH "}
    self.assertContainsSubset(
      {
        "--cpus-per-task=12",
        "--mem=200G",
        "--qos=high",
        "--exclusive",
        "--constraint='a&(b|c)'",
        "--partition=gpu,all",
        """--account='it'"'"'s'""",
        "--comment='a #b'",
        "--no-kill",
      },
      options,
    )
    # srun does not take this one from sbatch.
    self.assertIn(" --cpus-per-task=12 ", next(x for x in lines if "srun" in x))

  @parameterized.parameters(
    ([], 1, None),
    (["--gpus-per-node=4"], 4, None),
    (["--gpus-per-node=4", "--processes-per-node=4"], 4, None),
    (["--gpus-per-node=4", "--processes-per-node=1"], 1, "0,1,2,3"),
    (["--gpus-per-node=1"], 1, None),
  )
  def test_processes_of_a_node(self, flags, tasks, devices):
    lines = self.lines(*flags)
    self.assertIn(f"#SBATCH --ntasks-per-node={tasks}", lines)
    (export,) = [x for x in lines if x.startswith("export ")]
    # JAX would take one GPU for the one process on a node.
    self.assertEqual(
      export.partition("JAX_LOCAL_DEVICE_IDS=")[2] or None, devices
    )

  @parameterized.parameters(
    # How the tasks end, restarts before: exit code of the job, queued again.
    ("0", 0, 0, False),
    ("0 0", 0, 0, False),
    ("1", 0, 1, False),
    ("3", 0, 3, False),
    ("130", 0, 130, False),
    ("75 75", 0, 0, True),
    ("75", 3, 0, True),
    ("75", 4, 75, False),
    ("14 76", 0, 0, True),
    ("134", 0, 0, True),
    ("137", 4, 137, False),
    # The cause, and not the highest code.
    ("2 ABRT", 0, 2, False),
    ("139 1", 0, 1, False),
    ("76 137", 0, 0, True),
    ("1 KILL", 0, 1, False),
    ("KILL", 0, 0, True),
  )
  def test_what_is_queued_again(self, ends, restarts, job_code, is_again):
    self.client("sbatch", "cp $1 submitted")
    self.client("srun", 'echo "srun $@" $AOARM_DISTRIBUTED' + SRUN)
    self.client("scontrol", 'echo "$@" > scontrol')
    path = f"{self.folder}/bin:{os.environ['PATH']}"
    self.assertEqual(
      launch(
        "slurm",
        "submit",
        "--name=run",
        "--nodes=2",
        "--gpus-per-node=4",
        "--max-restarts=4",
        path=path,
      ),
      (0, "", ""),
    )
    with open("log", "a") as log:
      done = subprocess.run(
        ["bash", "submitted"],
        env={
          "PATH": path,
          "SLURM_RESTART_COUNT": str(restarts),
          "SLURM_JOB_ID": "7",
          "SLURM_JOB_NODELIST": "n[1-2]",
          "ENDS": ends,
        },
        stdout=log,
        stderr=log,
      )
    text = (self.folder / "log").read_text()
    self.assertEqual(done.returncode, job_code, text)
    self.assertTrue(text.startswith("start "), text)
    self.assertIn("--label --wait=120 bash -c", text)
    self.assertIn(f"{shlex.join(TRAIN)} 1", text)
    asked = self.folder / "scontrol"
    self.assertEqual(asked.exists(), is_again, text)
    if is_again:
      self.assertEqual(asked.read_text(), "requeue 7\n")

  def test_a_task_survives_the_notice(self):
    """Slurm signals all processes of a task. The shell waits for its end."""
    notice = "kill -TERM $PPID; sleep 0.1; exit 75"
    done = subprocess.run(
      ["bash", "-c", slurm._TASK, "task", "bash", "-c", notice],
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 75)
    self.assertEqual(done.stdout, "launch.slurm: exit code 75\n")

  def test_the_last_words_come_after_sigterm(self):
    """Slurm sends SIGTERM to all processes of the script."""
    self.client("sbatch", "cp $1 submitted")
    self.client(
      "srun",
      "trap 'sleep 0.2; echo last words; exit 75' TERM\n"
      "echo up\n"
      "for _ in {1..200}; do sleep 0.05; done",
    )
    path = f"{self.folder}/bin:{os.environ['PATH']}"
    self.assertEqual(launch("slurm", *SUBMIT, path=path), (0, "", ""))
    job = subprocess.Popen(
      ["bash", "submitted"],
      env={"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"},
      stderr=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      start_new_session=True,
      text=True,
    )
    self.assertEqual(job.stderr.readline(), "up\n")
    os.killpg(job.pid, signal.SIGTERM)
    self.assertIn("last words\n", job.communicate(timeout=10)[1])


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
        "--exclude=SC2016",  # What another shell reads stays in single quotes.
        *scripts,
        ROOT / ".ci" / "run",
      ],
      capture_output=True,
      text=True,
    )
    self.assertEqual((done.returncode, done.stdout), (0, ""))


class TpuPodTest(LaunchTest):
  def gcloud(self, *states):
    """A gcloud that notes its calls and describes one state after another."""
    (self.folder / "states").write_text("".join(f"{s}\n" for s in states))
    self.client(
      "gcloud",
      'echo "$@" >> calls\n'
      '[ "$4" = describe ] || exit 0\n'
      "state=$(head -n 1 states)\n"
      "sed -i 1d states\n"
      '[ "$state" = none ] && exit 1\n'
      'echo "$state"',
    )
    self.client("git", 'echo git "$@" >> calls')
    self.enterContext(absltest.mock.patch.object(tpu_pod, "_POLL_SECONDS", 0))
    return f"{self.folder}/bin:{os.environ['PATH']}"

  def calls(self):
    lines = (self.folder / "calls").read_text().splitlines()
    return [
      "git" if line.startswith("git") else line.split()[3] for line in lines
    ]

  def test_create_waits(self):
    path = self.gcloud("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    code, out, _ = launch(
      "tpu_pod", "create", *SLICE, "--spot", command=[], path=path
    )
    self.assertEqual(code, 0)
    self.assertEqual(out, "pod: WAITING_FOR_RESOURCES\npod: PROVISIONING\n")
    self.assertEqual(self.calls(), ["create"] + ["describe"] * 3)

  def test_create_that_fails(self):
    code, _, err = launch(
      "tpu_pod", "create", *SLICE, command=[], path=self.gcloud("FAILED")
    )
    self.assertEqual(code, 1)
    self.assertIn("pod: the slice is FAILED, not ACTIVE; why: gcloud comp", err)

  @parameterized.parameters(
    *("v4-8", "v4-64", "v4-128", "v4-384", "v4-8192", "v5litepod-1"),
    *("v5litepod-256", "v5p-16", "v5p-640", "v5p-12288", "v6e-4", "v6e-256"),
  )
  def test_sizes_that_exist(self, accelerator):
    flags = [*POD, f"--accelerator={accelerator}", "--dry-run"]
    code, out, err = launch("tpu_pod", "create", *flags, command=[])
    self.assertEqual((code, err), (0, ""))
    self.assertIn(f" --accelerator-type={accelerator} ", out)

  def test_create_passes_flags_on(self):
    flags = ["--also=--reserved", "--also=--network=mine"]
    _, out, _ = launch(
      "tpu_pod", "create", *SLICE, *flags, "--dry-run", command=[]
    )
    self.assertIn(" --reserved --network=mine\n", out)

  def test_a_client_that_fails(self):
    self.client("gcloud", "exit 3")
    code, _, err = launch(
      "tpu_pod", "stop", *POD, command=[], path=f"{self.folder}/bin"
    )
    self.assertEqual(code, 1)
    self.assertIn(
      "gcloud compute tpus tpu-vm ssh ... failed with exit cod", err
    )

  @parameterized.parameters(
    (
      ["SUSPENDED", "ACTIVE"],
      "describe delete create describe git scp ssh scp ssh",
    ),
    (["none", "ACTIVE"], "describe create describe git scp ssh scp ssh"),
    (["PROVISIONING", "ACTIVE"], "describe describe git scp ssh scp ssh"),
    (["ACTIVE"], "describe scp ssh"),
  )
  def test_resume_does_what_is_left(self, states, calls):
    path = self.gcloud(*states)
    code, _, err = launch("tpu_pod", "resume", *SLICE, path=path)
    self.assertEqual((code, err), (0, ""))
    self.assertEqual(" ".join(self.calls()), calls)

  def scripts(self, command, *flags):
    """Writes what run sends to a host into a host's home folder."""
    path = self.gcloud()
    launch("tpu_pod", "run", *POD, *flags, command=command, path=path)
    home = self.folder / "home"
    (home / "aoarm_jax").mkdir(parents=True)
    for script in (self.folder / common.FOLDER).iterdir():
      script.rename(home / script.name)
    return home

  def on_host(self, home, line):
    return subprocess.run(
      ["bash", "-c", line],
      cwd=home,
      env=os.environ | {"HOME": str(home)},
      capture_output=True,
      text=True,
    )

  def wait_for(self, home, text):
    deadline = time.monotonic() + 10
    log = home / "run.log"
    while not log.exists() or text not in log.read_text():
      self.assertLess(time.monotonic(), deadline, text)
      time.sleep(0.05)
    return log.read_text()

  def test_a_host_starts_the_command_again(self):
    toy = (
      "n=$(cat n); echo $((n + 1)) > n; echo n $n; "
      "[ $n = 3 ] && kill -ABRT $$; codes=(75 76 14 0 2); exit ${codes[n]}"
    )
    home = self.scripts(["bash", "-c", toy])
    (home / "aoarm_jax" / "n").write_text("0")
    self.assertEqual(self.on_host(home, "bash start.sh").returncode, 0)
    log = self.wait_for(home, "exit code 2")
    self.assertRegex(log, r"start 0\nn 0\n.*exit code 75\n.*start 1\nn 1\n")
    codes = re.findall(r"exit code (\d+)", log)
    self.assertEqual(codes, ["75", "76", "14", "134", "2"])

  def test_a_host_runs_one_command_and_stops_it(self):
    toy = "trap 'exit 75' TERM; echo up; while :; do sleep 0.05; done"
    home = self.scripts(["bash", "-c", toy])
    self.on_host(home, "bash start.sh")
    self.wait_for(home, "up")
    (home / "next.sh").write_text("")
    second = self.on_host(home, "bash start.sh")
    self.assertEqual(second.returncode, 1)
    self.assertIn("a command is running", second.stdout)
    self.on_host(home, tpu_pod._STOP)
    self.assertNotIn("start 1", self.wait_for(home, "exit code 75"))

  def test_a_command_that_does_not_stop_is_killed(self):
    toy = "trap '' TERM; echo up; while :; do sleep 0.05; done"
    home = self.scripts(["bash", "-c", toy])
    self.on_host(home, "bash start.sh")
    self.wait_for(home, "up")
    self.on_host(home, tpu_pod._STOP.replace("300", "0.2"))
    self.assertNotIn("start 1", self.wait_for(home, "exit code 137"))


# One long sleep would not see a signal that comes as it begins.
SAVES = """
def save(*_):
  print('saved', flush=True)
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
os.write(1, b'up\\n')
for _ in range(600): time.sleep(0.1)
"""


def is_alive(pid):
  state = pathlib.Path(f"/proc/{pid}/stat")
  return state.exists() and state.read_text().split()[2] != "Z"


class LocalTest(LaunchTest):
  def start(self, code, *flags):
    """launch.local of two processes that run this Python code."""
    process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "launch.local",
        "--processes=2",
        *flags,
        "--",
        sys.executable,
        "-c",
        "import os, signal, sys, time\n"
        "me = os.environ['AOARM_PROCESS_ID']\n" + code,
      ],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    # A test that fails leaves nothing behind that makes others fail.
    self.addCleanup(process.communicate)
    self.addCleanup(process.kill)
    return process

  def ups(self, process, count=2):
    """The pids of as many processes, when they have said that they are up."""
    lines = [process.stdout.readline() for _ in range(count)]
    for line in lines:
      self.assertIn("up", line)
    return [int(pid) for line in lines for pid in re.findall(r"up (\d+)", line)]

  def assert_gone(self, pids):
    self.assertNotEmpty(pids)
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if is_alive(pid)]:
      self.assertLess(time.monotonic(), deadline, alive)
      time.sleep(0.05)

  def finished(self, process, timeout=15):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err

  def test_every_process_knows_its_place(self):
    code, out, err = self.finished(
      self.start(
        "e = os.environ\n"
        "print(e['AOARM_DISTRIBUTED'], e['AOARM_COORDINATOR_ADDRESS'],"
        " e['AOARM_PROCESS_COUNT'], me, e['JAX_NUM_CPU_DEVICES'])\n"
        "print('to stderr', file=sys.stderr)",
        "--devices=3",
      )
    )
    self.assertEqual((code, err), (0, ""))
    lines = sorted(out.splitlines())
    port = re.search(r"127.0.0.1:(\d+)", out)[1]
    self.assertEqual(
      lines,
      [
        line
        for i in "01"
        for line in (f"[{i}] 1 127.0.0.1:{port} 2 {i} 3", f"[{i}] to stderr")
      ],
    )

  def test_gpus_are_given_one_each(self):
    out = launch("local", "--processes=2", "--platform=gpu", "--dry-run")[1]
    self.assertRegex(
      out,
      r"ID=0 .*CUDA_VISIBLE_DEVICES=0 python.*\n.*ID=1 .*"
      r"CUDA_VISIBLE_DEVICES=1 python.*\n$",
    )
    self.assertNotIn("JAX_PLATFORMS", out)

  def test_a_lost_process_ends_the_others(self):
    """Within a bounded time, and also those that a process has started."""
    process = self.start(
      "if me == '1':\n"
      "  os.kill(os.getpid(), signal.SIGKILL)\n"
      "child = os.fork()\n"
      "print(f'pid {os.getpid()}', flush=True)\n"
      "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
      "time.sleep(60)",
      "--grace-seconds=0.5",
      "--max-restarts=0",
    )
    code, out, err = self.finished(process, 10)
    self.assertEqual(code, 137)
    self.assertIn(
      "process 1 of 2 was lost: SIGKILL; process 0 did not end", err
    )
    self.assertIn("gave up after 0 restarts", err)
    pids = re.findall(r"pid (\d+)", out)
    self.assertLen(pids, 2)
    for pid in map(int, pids):
      self.assertFalse(is_alive(pid), pid)

  def test_a_stopped_process_is_ended_too(self):
    process = self.start(
      "if me == '0': os.kill(os.getpid(), signal.SIGSTOP)\n"
      "time.sleep(0.2)\n"
      "sys.exit(3)",
      "--grace-seconds=0.5",
    )
    code, _, err = self.finished(process, 10)
    self.assertEqual(code, 3)
    self.assertIn(
      "process 1 of 2 failed with exit code 3; process 0 did not end", err
    )
    self.assertNotIn("restart", err)

  @parameterized.parameters(
    ("sys.exit(75)", "the run was preempted and saved"),
    ("os.abort()", "was lost: SIGABRT"),
  )
  def test_started_again_until_it_is_done(self, end, message):
    process = self.start(
      "name = f'starts{me}'\n"
      "open(name, 'a').write('x')\n"
      f"if len(open(name).read()) < 3: {end}",
      "--grace-seconds=5",
    )
    code, _, err = self.finished(process)
    self.assertEqual(code, 0, err)
    self.assertEqual(err.count(message), 2)
    self.assertIn("restart 2 of 3: the run goes on from its last check", err)
    for name in ("starts0", "starts1"):
      self.assertEqual((self.folder / name).read_text(), "xxx")

  @parameterized.parameters(
    (signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)
  )
  def test_a_signal_reaches_all_and_ends_it(self, number, exit_code):
    process = self.start(SAVES)
    self.ups(process)
    process.send_signal(number)
    code, out, err = self.finished(process, 10)
    self.assertEqual(code, exit_code, err)
    self.assertEqual(sorted(out.splitlines()), ["[0] saved", "[1] saved"])
    self.assertNotIn("restart", err)

  def test_an_impatient_ctrl_c_still_saves(self):
    """A terminal and a parent that both pass one Ctrl-C on."""
    process = self.start(SAVES)
    self.ups(process)
    for _ in range(5):
      process.send_signal(signal.SIGINT)
      time.sleep(0.003)
    code, out, err = self.finished(process, 10)
    self.assertEqual(code, 130, err)
    self.assertEqual(sorted(out.splitlines()), ["[0] saved", "[1] saved"])
    self.assertNotIn("Traceback", err)

  def test_no_process_outlives_a_killed_launcher(self):
    """It can save, and is killed then, with all that it has started."""
    process = self.start(
      "os.fork()\n"
      "signal.signal(signal.SIGTERM, lambda *_: open('saved', 'w'))\n"
      "os.write(1, b'up %d\\n' % os.getpid())\n"
      "for _ in range(600): time.sleep(0.1)",
      "--grace-seconds=0.5",
    )
    pids = self.ups(process, 4)
    process.kill()
    process.wait()
    self.assert_gone(pids)
    self.assertTrue((self.folder / "saved").exists())

  def test_a_signal_before_a_process_can_handle_it(self):
    process = self.start("os.write(1, b'up\\n')\ntime.sleep(60)")
    self.ups(process)
    process.send_signal(signal.SIGTERM)
    code, _, err = self.finished(process, 10)
    self.assertEqual(code, 75, err)

  def test_a_signal_is_followed_by_a_stronger_one(self):
    process = self.start(
      "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
      "print(f'up {os.getpid()}', flush=True)\n"
      "time.sleep(60)",
      "--stop-seconds=0.5",
    )
    pids = self.ups(process)
    process.send_signal(signal.SIGTERM)
    code, _, err = self.finished(process, 10)
    self.assertEqual(code, 137)
    self.assertIn(
      "process 0, 1 of 2 did not end within 0.5 s after the signal: killed", err
    )
    self.assertNotIn("restart", err)
    self.assert_gone(pids)

  def test_a_reader_that_goes_stops_nothing(self):
    process = self.start(
      "print('up', flush=True)\n"
      "time.sleep(0.2)\n"
      "print('x' * 200_000, flush=True)\n"
      "open(f'done{me}', 'w')"
    )
    process.stdout.readline()
    process.stdout.close()
    self.assertEqual(process.wait(10), 0)
    self.assertTrue((self.folder / "done0").exists())
    self.assertTrue((self.folder / "done1").exists())

  @parameterized.parameters(
    ([0, -9], (1, -9)),
    ([1, -11], (0, 1)),
    ([-9, 2], (1, 2)),
    ([76, 14], (1, 14)),
    ([-6, 1], (1, 1)),
    ([-6, None], (0, -6)),
    ([None, 75], (1, 75)),
    ([1, -6, -9], (2, -9)),
  )
  def test_who_failed(self, codes, failure):
    self.assertEqual(local._first_failure(codes), failure)


if __name__ == "__main__":
  absltest.main()
