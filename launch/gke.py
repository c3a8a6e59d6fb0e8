"""Runs a command on Kubernetes (GKE), as a JobSet with one pod on each host.

  python -m launch.gke apply --name=base --tpu=v5p:4x4x8 --spot \\
    --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/aoarm_jax:TAG -- \\
    python -m aoarm_jax.main --config=configs/two_stream.py:base \\
    --workdir=gs://bucket/base

apply writes the manifest and applies it. If a pod exits with 75 or loses its
node, all pods are restarted, without a limit. If the command cannot succeed
(exit codes 1, 2, 126, 127, 130), the JobSet ends. After any other failure all
pods are restarted at most --max-restarts times. The image contains this
repository and its extra tpu or cuda (launch/Dockerfile). The cluster needs the
JobSet controller, 0.10 or newer, and a node pool of the machines asked for.

status, logs and delete take the name. kubectl's current cluster and namespace
are used.
"""

import argparse
import json
import math
import sys
from typing import Any, NamedTuple

from aoarm_jax.config import exit_codes
from launch import common

_CONTAINER = "train"
# Keeps the pods of a slice in one slice if there are several of its kind.
_ONE_SLICE = {
  "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
}
_SPOT = "cloud.google.com/gke-spot"
_PORT = 8476


class _Tpu(NamedTuple):
  """A generation of TPUs on GKE.

  Attributes:
    label: value of the node label.
    axes: axes of a topology.
    chips_per_host: chips on a host, in a slice of several hosts.
    most_on_one_host: most chips of a slice that has one host.
    most: most chips of a slice.
  """

  label: str
  axes: int
  chips_per_host: int
  most_on_one_host: int
  most: int


_TPUS = {
  "v4": _Tpu("tpu-v4-podslice", 3, 4, 4, 4096),
  "v5e": _Tpu("tpu-v5-lite-podslice", 2, 4, 8, 256),
  "v5p": _Tpu("tpu-v5p-slice", 3, 4, 4, 6144),
  "v6e": _Tpu("tpu-v6e-slice", 2, 4, 8, 256),
}


class _Nodes(NamedTuple):
  """The machines of a JobSet, as the manifest describes them.

  Attributes:
    hosts: number of machines, one pod on each.
    labels: node labels that select them.
    limits: devices of a pod.
    variables: environment of a pod, as a list for Kubernetes.
  """

  hosts: int
  labels: dict[str, str]
  limits: dict[str, int]
  variables: list[dict[str, Any]]


def make_parser() -> argparse.ArgumentParser:
  """Return the parser of this launcher."""
  parser = common.parser("launch.gke", __doc__)
  verbs = common.add_verbs(
    parser,
    {
      "apply": "write the manifest and apply it",
      "status": "show the JobSet and its pods",
      "logs": "follow the output of all pods",
      "delete": "end and remove the JobSet",
    },
    named="JobSet",
  )
  apply = verbs["apply"]
  apply.add_argument("--image", required=True, help="container image")
  what = apply.add_mutually_exclusive_group(required=True)
  what.add_argument("--tpu", help="slice, as in v5e:4x4, v5p:4x4x8, v6e:16x16")
  what.add_argument("--gpu", help="node label, as in nvidia-h100-80gb")
  apply.add_argument(
    "--nodes", type=int, default=1, help="with --gpu: machines (default: 1)"
  )
  apply.add_argument(
    "--gpus-per-node", type=int, default=8, help="with --gpu (default: 8)"
  )
  apply.add_argument("--spot", action="store_true", help="use spot machines")
  common.add_max_restarts(apply, 3, "failures other than preemption")
  apply.add_argument(
    "--grace-seconds",
    type=int,
    default=120,
    help="from SIGTERM to the kill, enough for a save (default: 120)",
  )
  apply.add_argument(
    "--service-account", default="", help="service account of the pods"
  )
  return parser


def job_set(flags: argparse.Namespace) -> dict[str, Any]:
  """Return the manifest, for API jobset.x-k8s.io/v1alpha2.

  Raises:
    LaunchError: a flag has a value that is not possible.
  """
  common.check_at_least("--max-restarts", flags.max_restarts, 0)
  common.check_at_least("--grace-seconds", flags.grace_seconds, 1)
  common.check_command(flags.command, shared_workdir="gs://")
  nodes = _gpu_nodes(flags) if flags.tpu is None else _tpu_slice(flags.tpu)
  metadata: dict[str, Any] = {"name": flags.name}
  if flags.tpu:
    metadata["annotations"] = _ONE_SLICE
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "failurePolicy": {
        "maxRestarts": flags.max_restarts,
        # The first rule that fits counts. Any other failure is a restart that
        # counts.
        "rules": [
          {
            "name": "failed",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            # The index of the last rule of podFailurePolicy.
            "onJobFailureMessagePatterns": ["FailJob rule at index 2$"],
          },
          {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
          },
        ],
      },
      "replicatedJobs": [
        {
          "name": "hosts",
          "replicas": 1,
          "template": {"spec": _job(flags, nodes)},
        }
      ],
    },
  }


def _job(flags: argparse.Namespace, nodes: _Nodes) -> dict[str, Any]:
  """Return the spec of the Job that has a pod on each host."""
  return {
    "parallelism": nodes.hosts,
    "completions": nodes.hosts,
    "completionMode": "Indexed",
    # If one process is lost the Job fails, and the JobSet restarts all of them.
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {
          "action": "FailJob",
          "onExitCodes": {
            "containerName": _CONTAINER,
            "operator": "In",
            "values": [common.PREEMPTED],
          },
        },
        {
          "action": "FailJob",
          "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {
          "action": "FailJob",
          "onExitCodes": {
            "containerName": _CONTAINER,
            "operator": "In",
            "values": _permanent(),
          },
        },
      ]
    },
    "template": {"spec": _pod(flags, nodes)},
  }


def _permanent() -> list[int]:
  """Return the exit codes after which the command is not started again."""
  ends = [row for row in exit_codes.TABLE if not row.again]
  named = [int(code) for row in ends for code in row.codes]
  return sorted([exit_codes.FAILED, *named])


def _pod(flags: argparse.Namespace, nodes: _Nodes) -> dict[str, Any]:
  """Return the spec of a pod."""
  pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": flags.grace_seconds,
    # Process 1 is then an init of Kubernetes, and the program gets the default
    # actions of signals.
    "shareProcessNamespace": True,
    "nodeSelector": nodes.labels | ({_SPOT: "true"} if flags.spot else {}),
    "containers": [
      {
        "name": _CONTAINER,
        "image": flags.image,
        "command": list(flags.command),
        "env": [*_variables(common.ENVIRONMENT), *nodes.variables],
        "resources": {"limits": nodes.limits},
      }
    ],
  }
  if flags.spot:
    pod["tolerations"] = [
      {
        "key": _SPOT,
        "operator": "Equal",
        "value": "true",
        "effect": "NoSchedule",
      }
    ]
  if flags.service_account:
    pod["serviceAccountName"] = flags.service_account
  return pod


def _variables(environment: dict[str, str]) -> list[dict[str, Any]]:
  """Return environment variables as a manifest lists them."""
  return [{"name": k, "value": v} for k, v in environment.items()]


def _tpu_slice(text: str) -> _Nodes:
  """Return the hosts of a slice, written as in v5p:4x4x8.

  GKE tells the pods of a slice about each other, and JAX reads that.
  """
  generation, _, topology = text.partition(":")
  if generation not in _TPUS:
    raise common.LaunchError(
      f"--tpu={text}: {generation!r} is not one of {', '.join(_TPUS)}"
    )
  tpu = _TPUS[generation]
  sizes = topology.split("x")
  allowed_sizes = {str(2**n) for n in range(8)} | {"12", "20", "24", "28"}
  chips = 0
  if set(sizes) <= allowed_sizes:
    chips = math.prod(int(size) for size in sizes)
  if len(sizes) != tpu.axes or not 0 < chips <= tpu.most:
    example = "4x4x8" if tpu.axes == 3 else "4x8"
    raise common.LaunchError(
      f"--tpu={text}: a {generation} slice has {tpu.axes} axes and at most "
      f"{tpu.most} chips, as in {generation}:{example}"
    )
  has_one_host = chips <= tpu.most_on_one_host
  if not has_one_host and chips % tpu.chips_per_host:
    raise common.LaunchError(
      f"--tpu={text}: {chips} chips are no whole number of hosts of "
      f"{tpu.chips_per_host}"
    )
  hosts = 1 if has_one_host else chips // tpu.chips_per_host
  labels = {
    "cloud.google.com/gke-tpu-accelerator": tpu.label,
    "cloud.google.com/gke-tpu-topology": topology,
  }
  return _Nodes(hosts, labels, {"google.com/tpu": chips // hosts}, [])


def _gpu_nodes(flags: argparse.Namespace) -> _Nodes:
  """Return the GPU machines; variables tell their processes of each other."""
  if not flags.gpu:
    raise common.LaunchError("--gpu=: write a label, as in nvidia-h100-80gb")
  common.check_at_least("--nodes", flags.nodes, 1)
  common.check_at_least("--gpus-per-node", flags.gpus_per_node, 1)
  index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  # The JobSet controller gives pod 0 this host name, in a service that has the
  # name of the JobSet.
  address = f"{flags.name}-hosts-0-0.{flags.name}:{_PORT}"
  variables = [
    *_variables(common.join_variables(address, flags.nodes)),
    {
      "name": "AOARM_PROCESS_ID",
      "valueFrom": {"fieldRef": {"fieldPath": index}},
    },
  ]
  return _Nodes(
    hosts=flags.nodes,
    labels={"cloud.google.com/gke-accelerator": flags.gpu},
    limits={"nvidia.com/gpu": flags.gpus_per_node},
    variables=variables,
  )


def start(flags: argparse.Namespace) -> int:
  """Carry out the verb; return the exit code."""
  common.check_name(flags.name)
  shell = common.Shell(flags.dry_run)
  selector = f"--selector=jobset.sigs.k8s.io/jobset-name={flags.name}"
  if flags.verb == "apply":
    path = common.path_of(flags.name, "json")
    content = json.dumps(job_set(flags), indent=2) + "\n"
    shell.submit(path, content, "kubectl", "apply", f"--filename={path}")
    return 0
  common.check_no_command(flags.command, flags.verb)
  if flags.verb == "status":
    shell.run("kubectl", "get", f"jobset/{flags.name}")
    shell.run("kubectl", "get", "pods", selector)
  elif flags.verb == "logs":
    options = ["--prefix", "--tail=-1", "--max-log-requests=1000"]
    shell.run("kubectl", "logs", "--follow", selector, *options)
  else:
    shell.run("kubectl", "delete", f"jobset/{flags.name}")
  return 0


if __name__ == "__main__":
  sys.exit(common.main(make_parser, start))
