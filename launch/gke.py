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
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from aoarm_jax.config import exit_codes
from launch import common, published

_CONTAINER = "train"
# Keeps the pods of a slice in one slice if there are several of its kind.
_ONE_SLICE = {
  "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
}
_SPOT = "cloud.google.com/gke-spot"
_PORT = 8476
_GRACE_SECONDS = 120
# An image with its registry, tag and digest.
_IMAGE = re.compile(
  r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?(:\d+)?(/[a-z0-9]+([-._]+[a-z0-9]+)*)*"
  r"(:\w[-.\w]{0,127})?(@sha256:[0-9a-f]{64})?"
)
# Names of service accounts and of volume claims.
_DNS = re.compile(r"(?=.{1,253}$)[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class _Nodes(NamedTuple):
  """The machines of a JobSet, as the manifest describes them.

  Attributes:
    hosts: number of machines, one pod on each.
    labels: node labels that select them.
    limits: devices of a pod.
    variables: environment of a pod, as a list for Kubernetes.
    starter: words before the command, which start it as several processes.
  """

  hosts: int
  labels: dict[str, str]
  limits: dict[str, int]
  variables: list[dict[str, Any]]
  starter: Sequence[str] = ()


class _Volume(NamedTuple):
  """A volume claim in a pod.

  Attributes:
    claim: name of the PersistentVolumeClaim.
    path: where the pod sees it.
  """

  claim: str
  path: str


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
  apply.add_argument("--spot", action="store_true", help="use spot machines")
  common.add_max_restarts(apply, 3, "failures other than preemption")
  apply.add_argument(
    "--grace-seconds",
    type=int,
    help="from SIGTERM to the kill, enough for a save (default: "
    f"{_GRACE_SECONDS}, with --spot {published.SPOT_GRACE_SECONDS})",
  )
  apply.add_argument(
    "--env",
    action="append",
    default=[],
    metavar="NAME=VALUE",
    help="environment variable of all processes; may be repeated",
  )
  apply.add_argument(
    "--volume",
    action="append",
    default=[],
    metavar="CLAIM:PATH",
    help="mount a PersistentVolumeClaim that all pods may write to; may be "
    "repeated",
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
  common.check_range(
    "--max-restarts", flags.max_restarts, 0, published.MOST_RESTARTS
  )
  _check_names(flags)
  volumes = _volumes(flags)
  common.check_command(
    flags.command, shared_workdir="gs://", mounts=[x.path for x in volumes]
  )
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
  grace_seconds = _grace_seconds(flags)
  own = _variables(
    common.ENVIRONMENT | {common.NOTICE_VARIABLE: str(grace_seconds)}
  )
  own += nodes.variables
  given = _environment(flags, {x["name"] for x in own})
  # The 64 MiB that a container has by default are too few for NCCL.
  volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
  mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
  for index, volume in enumerate(_volumes(flags)):
    name, claim = f"volume-{index}", {"claimName": volume.claim}
    volumes.append({"name": name, "persistentVolumeClaim": claim})
    mounts.append({"name": name, "mountPath": volume.path})
  pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": grace_seconds,
    # Process 1 is then an init of Kubernetes, and the program gets the default
    # actions of signals.
    "shareProcessNamespace": True,
    "nodeSelector": nodes.labels | ({_SPOT: "true"} if flags.spot else {}),
    "volumes": volumes,
    "containers": [
      {
        "name": _CONTAINER,
        "image": flags.image,
        "command": [*nodes.starter, *map(_literal, flags.command)],
        "env": [*own, *_variables(given)],
        "resources": {"limits": nodes.limits},
        "volumeMounts": mounts,
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


def _grace_seconds(flags: argparse.Namespace) -> int:
  """Return the seconds from SIGTERM to the kill."""
  if flags.grace_seconds is None:
    return published.SPOT_GRACE_SECONDS if flags.spot else _GRACE_SECONDS
  seconds: int = flags.grace_seconds
  if flags.spot:
    most = published.MOST_SPOT_GRACE_SECONDS
    common.check_range("--grace-seconds", seconds, 1, most)
  common.check_at_least("--grace-seconds", seconds, 1)
  return seconds


def _check_names(flags: argparse.Namespace) -> None:
  """Raise LaunchError if Kubernetes would refuse the name of an object."""
  if not _IMAGE.fullmatch(flags.image):
    raise common.LaunchError(
      f"--image={flags.image}: write registry/name:tag, in lower case, as in "
      "us-docker.pkg.dev/my-project/images/aoarm_jax:1"
    )
  if flags.service_account and not _DNS.fullmatch(flags.service_account):
    raise common.LaunchError(
      f"--service-account={flags.service_account}: write the name of a "
      "ServiceAccount of the namespace: lower-case letters, digits, . and -"
    )


def _environment(flags: argparse.Namespace, taken: set[str]) -> dict[str, str]:
  """Return the variables of --env.

  Raises:
    LaunchError: a variable has no name, or has a meaning here.
  """
  given: dict[str, str] = {}
  for text in flags.env:
    name, equals, value = text.partition("=")
    if not equals or not _VARIABLE.fullmatch(name):
      raise common.LaunchError(
        f"--env={text}: write NAME=VALUE, as in --env=NCCL_DEBUG=INFO"
      )
    if name in {*taken, *given}:
      raise common.LaunchError(f"--env={text}: {name} has a value already")
    given[name] = value
  return given


def _volumes(flags: argparse.Namespace) -> list[_Volume]:
  """Return the volumes of --volume.

  Raises:
    LaunchError: the claim or the path is not possible.
  """
  volumes: list[_Volume] = []
  for text in flags.volume:
    claim, _, path = text.partition(":")
    if not _DNS.fullmatch(claim) or not re.fullmatch(r"(/[^/:\s]+)+", path):
      raise common.LaunchError(
        f"--volume={text}: write CLAIM:PATH, as in --volume=shared-disk:/data"
      )
    if path in ("/dev/shm", *[x.path for x in volumes]):
      raise common.LaunchError(f"--volume={text}: {path} is mounted already")
    volumes.append(_Volume(claim, path))
  return volumes


def _literal(text: str) -> str:
  """Return a text as Kubernetes takes it without replacing $(NAME) in it."""
  return text.replace("$", "$$")


def _variables(environment: dict[str, str]) -> list[dict[str, Any]]:
  """Return environment variables as a manifest lists them."""
  return [{"name": k, "value": _literal(v)} for k, v in environment.items()]


def _tpu_slice(flags: argparse.Namespace) -> _Nodes:
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
  return _Nodes(hosts, labels, {"google.com/tpu": per_host}, [])


def _topologies(tpu: published.Tpu) -> str:
  """Return which topologies there are, in a few words."""
  few = tpu.topologies[:8]
  if len(tpu.topologies) == len(few):
    return f"there are {', '.join(few)}"
  return (
    f"there are {', '.join(few[:5])} and others of multiples of 4, in rising "
    f"order, up to {tpu.topologies[-1]}"
  )


def _gpu_nodes(flags: argparse.Namespace) -> _Nodes:
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
    variables = _variables(common.join_variables(address, machines))
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
  return _Nodes(
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
