"""launch.gke: manifests that Kubernetes takes."""

import importlib.util
import json
import os

import jsonschema
from absl.testing import absltest, parameterized
from launchers import APPLY, TRAIN, LaunchTest, launch

from launch import common


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
    # The launcher in the last pod would start these processes.
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


if __name__ == "__main__":
  absltest.main()
