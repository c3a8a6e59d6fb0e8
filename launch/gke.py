"""Runs a command on Kubernetes (GKE), as a JobSet of one pod a host.

  python -m launch.gke apply --name=base --tpu=v5p:4x4x8 --spot \\
    --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/aoarm_jax:TAG -- \\
    python -m aoarm_jax.main --config=configs/two_stream.py:base \\
    --workdir=gs://bucket/base

apply writes the manifest and applies it. A pod that exits with 75, or whose
node is taken away, restarts all pods without end; any other failure restarts
them --max-restarts times. The image holds this repository and its extra tpu
or cuda (launch/Dockerfile); the cluster has the JobSet controller, 0.6 or
newer, and a node pool of the machines asked for.

status, logs and delete go by the name. kubectl's current cluster and namespace
are used.
"""

import argparse
import json
import math
import sys
from typing import Any

from launch import common

_CONTAINER = "train"
# Keeps the pods of a slice in one slice, where there are several of its kind.
_ONE_SLICE = {
  "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
}
_PORT = 8476
# Generation: value of the node label, axes, chips a host of a slice of several
# hosts, most chips of a slice of one host, most chips.
_TPUS = {
  "v4": ("tpu-v4-podslice", 3, 4, 4, 4096),
  "v5e": ("tpu-v5-lite-podslice", 2, 4, 8, 256),
  "v5p": ("tpu-v5p-slice", 3, 4, 4, 6144),
  "v6e": ("tpu-v6e-slice", 2, 4, 8, 256),
}


def make_parser() -> argparse.ArgumentParser:
  parser = common.parser("launch.gke", __doc__)
  verbs = parser.add_subparsers(dest="verb", required=True)
  apply = verbs.add_parser("apply", help="write the manifest and apply it")
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
  apply.add_argument("--spot", action="store_true", help="on spot machines")
  apply.add_argument(
    "--max-restarts",
    type=int,
    default=3,
    help="after failures other than preemption (default: 3)",
  )
  apply.add_argument(
    "--grace-seconds",
    type=int,
    default=120,
    help="from SIGTERM to the kill, enough for a save (default: 120)",
  )
  apply.add_argument("--service-account", default="", help="of the pods")
  status = verbs.add_parser("status", help="the JobSet and its pods")
  logs = verbs.add_parser("logs", help="follow the output of all pods")
  delete = verbs.add_parser("delete", help="end and remove the JobSet")
  for verb in (apply, status, logs, delete):
    verb.add_argument("--name", required=True, help="of the JobSet")
    common.add_dry_run(verb)
  return parser


def job_set(flags: argparse.Namespace) -> dict[str, Any]:
  """The manifest, as of API jobset.x-k8s.io/v1alpha2.

  Raises:
    LaunchError: a flag that cannot be.
  """
  common.check_at_least("--max-restarts", flags.max_restarts, 0)
  common.check_at_least("--grace-seconds", flags.grace_seconds, 1)
  common.check_command(flags.command, shared_workdir="gs://")
  hosts, selector, devices, variables = (
    _gpu_nodes(flags) if flags.tpu is None else _tpu_slice(flags.tpu)
  )
  if flags.spot:
    selector = selector | {"cloud.google.com/gke-spot": "true"}
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": flags.name}
    | ({"annotations": _ONE_SLICE} if flags.tpu else {}),
    "spec": {
      "failurePolicy": {
        "maxRestarts": flags.max_restarts,
        "rules": [
          {
            "name": "preempted",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
          }
        ],
      },
      "replicatedJobs": [
        {
          "name": "hosts",
          "replicas": 1,
          "template": {
            "spec": _job(flags, hosts, selector, devices, variables)
          },
        }
      ],
    },
  }


def _job(flags, hosts, selector, devices, variables):
  pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": flags.grace_seconds,
    "nodeSelector": selector,
    "containers": [
      {
        "name": _CONTAINER,
        "image": flags.image,
        "command": list(flags.command),
        "env": [
          {"name": "AOARM_DISTRIBUTED", "value": "1"},
          {"name": "PYTHONUNBUFFERED", "value": "1"},
          *variables,
        ],
        "resources": {"limits": devices},
      }
    ],
  }
  if flags.spot:
    pod["tolerations"] = [
      {
        "key": "cloud.google.com/gke-spot",
        "operator": "Equal",
        "value": "true",
        "effect": "NoSchedule",
      }
    ]
  if flags.service_account:
    pod["serviceAccountName"] = flags.service_account
  return {
    "parallelism": hosts,
    "completions": hosts,
    "completionMode": "Indexed",
    # One lost process ends the run: the JobSet restarts all.
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
      ]
    },
    "template": {"spec": pod},
  }


def _tpu_slice(text):
  """(hosts, node labels, devices a host, variables) of one slice.

  GKE tells the pods of a slice about each other, and JAX reads that.
  """
  generation, _, topology = text.partition(":")
  if generation not in _TPUS:
    raise common.LaunchError(
      f"--tpu={text}: {generation!r} is not one of {', '.join(_TPUS)}"
    )
  label, axes, chips_a_host, one_host, most = _TPUS[generation]
  sizes = topology.split("x")
  powers = {str(2**n) for n in range(8)} | {"12", "20", "24", "28"}
  chips = math.prod(int(s) for s in sizes) if set(sizes) <= powers else 0
  if len(sizes) != axes or not 0 < chips <= most:
    example = "4x4x8" if axes == 3 else "4x8"
    raise common.LaunchError(
      f"--tpu={text}: a {generation} slice has {axes} axes and at most {most} "
      f"chips, as in {generation}:{example}"
    )
  if chips > one_host and chips % chips_a_host:
    raise common.LaunchError(
      f"--tpu={text}: {chips} chips are no whole number of hosts of "
      f"{chips_a_host}"
    )
  hosts = 1 if chips <= one_host else chips // chips_a_host
  labels = {
    "cloud.google.com/gke-tpu-accelerator": label,
    "cloud.google.com/gke-tpu-topology": topology,
  }
  return hosts, labels, {"google.com/tpu": chips // hosts}, []


def _gpu_nodes(flags):
  """As _tpu_slice; the processes learn of each other by their variables."""
  if not flags.gpu:
    raise common.LaunchError("--gpu=: write a label, as in nvidia-h100-80gb")
  common.check_at_least("--nodes", flags.nodes, 1)
  common.check_at_least("--gpus-per-node", flags.gpus_per_node, 1)
  index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  # The JobSet controller names pods so, and gives them a service of its name.
  first = f"{flags.name}-hosts-0-0.{flags.name}"
  variables = [
    {"name": "AOARM_COORDINATOR_ADDRESS", "value": f"{first}:{_PORT}"},
    {"name": "AOARM_PROCESS_COUNT", "value": str(flags.nodes)},
    {
      "name": "AOARM_PROCESS_ID",
      "valueFrom": {"fieldRef": {"fieldPath": index}},
    },
  ]
  labels = {"cloud.google.com/gke-accelerator": flags.gpu}
  return flags.nodes, labels, {"nvidia.com/gpu": flags.gpus_per_node}, variables


def to_yaml(tree: Any, indent: int = 0) -> str:
  """YAML of dicts, lists, strings and whole numbers; strings as in JSON."""
  pad = "  " * indent
  lines = []
  for key, value in tree.items():
    if isinstance(value, dict):
      lines += [f"{pad}{key}:", to_yaml(value, indent + 1)]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
      lines.append(f"{pad}{key}:")
      for item in value:
        block = to_yaml(item, indent + 1)
        lines.append(f"{pad}- {block.removeprefix(pad + '  ')}")
    else:
      lines.append(f"{pad}{key}: {json.dumps(value)}")
  return "\n".join(lines)


def start(flags: argparse.Namespace) -> int:
  common.check_name(flags.name)
  shell = common.Shell(flags.dry_run)
  selector = f"jobset.sigs.k8s.io/jobset-name={flags.name}"
  if flags.verb == "apply":
    path = f"{common.FOLDER}/{flags.name}.yaml"
    content = to_yaml(job_set(flags)) + "\n"
    shell.require("kubectl")
    shell.write(path, content)
    shell.run("kubectl", "apply", f"--filename={path}")
    return 0
  common.check_no_command(flags.command, flags.verb)
  if flags.verb == "status":
    shell.run("kubectl", "get", f"jobset/{flags.name}")
    shell.run("kubectl", "get", "pods", f"--selector={selector}")
  elif flags.verb == "logs":
    shell.run(
      "kubectl", "logs", "--follow", f"--selector={selector}", "--prefix",
      "--tail=-1", "--max-log-requests=1000",
    )  # fmt: skip
  else:
    shell.run("kubectl", "delete", f"jobset/{flags.name}")
  return 0


if __name__ == "__main__":
  sys.exit(common.main(make_parser, start))
