"""Runs a command on Kubernetes (GKE), as a JobSet with one pod on each host.

  python -m launch.gke apply --name=base --tpu=v5p:4x4x8 --spot \\
    --image=us-docker.pkg.dev/my-project/images/aoarm_jax:1 -- \\
    python -m aoarm_jax.main --config=configs/two_stream.py:base \\
    --workdir=gs://bucket/base

apply writes the manifest and applies it. If a pod exits with 75 or loses its
node, all pods are restarted, without a limit. If the command cannot succeed
(exit codes 1, 2, 126, 127, 130), the JobSet ends. After any other failure all
pods are restarted at most --max-restarts times. The image contains this
repository and its extra tpu or cuda (launch/Dockerfile). The cluster needs the
JobSet controller, 0.10 or newer, and a node pool of the machines asked for.

With --gpu one process has all GPUs of its node. --processes-per-node=8 starts
one process for each of 8 GPUs instead, by launch.local in the pod.

status, logs and delete take the name. kubectl's current cluster and namespace
are used.
"""

import argparse
import json
import sys
from typing import Any

from aoarm_jax.config import exit_codes
from launch import common, pods, published

# Keeps the pods of a slice in one slice if there are several of its kind.
_ONE_SLICE = {
  "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
}
_PORT = 8476


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
  what = apply.add_mutually_exclusive_group(required=True)
  what.add_argument("--tpu", help="slice, as in v5e:4x4, v5p:4x4x8, v6e:16x16")
  what.add_argument("--gpu", help="node label, as in nvidia-h100-80gb")
  apply.add_argument(
    "--nodes", type=int, help="with --gpu: machines (default: 1)"
  )
  apply.add_argument(
    "--gpus-per-node",
    type=int,
    help="with --gpu (default: 8, or fewer if no machine has 8)",
  )
  apply.add_argument(
    "--processes-per-node",
    type=int,
    help="with --gpu: 1, or as many as GPUs (default: 1)",
  )
  common.add_max_restarts(apply, 3, "failures other than preemption")
  pods.add_flags(apply)
  return parser


def job_set(flags: argparse.Namespace) -> dict[str, Any]:
  """Return the manifest, for API jobset.x-k8s.io/v1alpha2.

  Raises:
    LaunchError: a flag has a value that is not possible.
  """
  common.check_range(
    "--max-restarts", flags.max_restarts, 0, published.MOST_RESTARTS
  )
  mounts = [volume.path for volume in pods.volumes(flags)]
  common.check_command(flags.command, shared_workdir="gs://", mounts=mounts)
  nodes = _gpu_nodes(flags) if flags.tpu is None else _tpu_slice(flags)
  metadata: dict[str, Any] = {"name": flags.name}
  if flags.tpu and nodes.hosts > 1:
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


def _job(flags: argparse.Namespace, nodes: pods.Nodes) -> dict[str, Any]:
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
            "containerName": pods.CONTAINER,
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
            "containerName": pods.CONTAINER,
            "operator": "In",
            "values": _permanent(),
          },
        },
      ]
    },
    "template": {"spec": pods.spec(flags, nodes)},
  }


def _permanent() -> list[int]:
  """Return the exit codes after which the command is not started again."""
  ends = [row for row in exit_codes.TABLE if not row.again]
  named = [int(code) for row in ends for code in row.codes]
  return sorted([exit_codes.FAILED, *named])


def _tpu_slice(flags: argparse.Namespace) -> pods.Nodes:
  """Return the hosts of a slice, written as in v5p:4x4x8.

  GKE tells the pods of a slice about each other, and JAX reads that.
  """
  text = flags.tpu
  for name in ("nodes", "gpus_per_node", "processes_per_node"):
    if getattr(flags, name) is not None:
      flag = "--" + name.replace("_", "-")
      raise common.LaunchError(
        f"{flag}={getattr(flags, name)}: only with --gpu; the topology gives "
        "the hosts of a slice"
      )
  generation, _, topology = text.partition(":")
  if generation not in published.TPUS:
    raise common.LaunchError(
      f"--tpu={text}: {generation!r} is not one of {', '.join(published.TPUS)}"
    )
  tpu = published.TPUS[generation]
  if topology not in tpu.topologies:
    raise common.LaunchError(
      f"--tpu={text}: no node pool has this topology; {_topologies(tpu)}"
    )
  hosts = tpu.hosts(topology)
  labels = {
    "cloud.google.com/gke-tpu-accelerator": tpu.label,
    "cloud.google.com/gke-tpu-topology": topology,
  }
  per_host = published.chips(topology) // hosts
  return pods.Nodes(hosts, labels, {"google.com/tpu": per_host}, [])


def _topologies(tpu: published.Tpu) -> str:
  """Return which topologies there are, in a few words."""
  few = tpu.topologies[:8]
  if len(tpu.topologies) == len(few):
    return f"there are {', '.join(few)}"
  return (
    f"there are {', '.join(few[:5])} and others of multiples of 4, in rising "
    f"order, up to {tpu.topologies[-1]}"
  )


def _gpu_nodes(flags: argparse.Namespace) -> pods.Nodes:
  """Return the GPU machines; variables tell their processes of each other."""
  if flags.gpu not in published.GPUS:
    raise common.LaunchError(
      f"--gpu={flags.gpu}: no machine of GKE has this label; there are "
      f"{', '.join(published.GPUS)}"
    )
  most = published.GPUS[flags.gpu]
  machines = 1 if flags.nodes is None else flags.nodes
  gpus = min(8, most) if flags.gpus_per_node is None else flags.gpus_per_node
  processes = flags.processes_per_node
  processes = 1 if processes is None else processes
  common.check_at_least("--nodes", machines, 1)
  common.check_range("--gpus-per-node", gpus, 1, most)
  common.check_processes_per_node(processes, gpus)
  index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  # The JobSet controller gives pod 0 this host name, in a service that has the
  # name of the JobSet.
  address = f"{flags.name}-hosts-0-0.{flags.name}:{_PORT}"
  starter: list[str] = []
  variables = []
  number = "AOARM_PROCESS_ID"
  if processes == 1:
    variables = pods.variables(common.join_variables(address, machines))
  else:
    number = "AOARM_MACHINE"
    starter = [
      *("python", "-m", "launch.local", f"--processes={processes}"),
      *("--platform=gpu", "--max-restarts=0", f"--machines={machines}"),
      # Kubernetes replaces $(NAME) by the variable.
      *(f"--machine=$({number})", f"--address={address}", "--"),
    ]
  variables.append(
    {"name": number, "valueFrom": {"fieldRef": {"fieldPath": index}}}
  )
  return pods.Nodes(
    hosts=machines,
    labels={"cloud.google.com/gke-accelerator": flags.gpu},
    limits={"nvidia.com/gpu": gpus},
    variables=variables,
    starter=starter,
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
