"""The pods of a JobSet: container, environment, volumes, time to save."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch import common, published

CONTAINER = "train"
_SPOT = "cloud.google.com/gke-spot"
_GRACE_SECONDS = 120
# An image with its registry, tag and digest.
_IMAGE = re.compile(
  r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?(:\d+)?(/[a-z0-9]+([-._]+[a-z0-9]+)*)*"
  r"(:\w[-.\w]{0,127})?(@sha256:[0-9a-f]{64})?"
)
# Names of service accounts and of volume claims.
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DNS = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class Nodes(NamedTuple):
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


class Volume(NamedTuple):
  """A volume claim in a pod.

  Attributes:
    claim: name of the PersistentVolumeClaim.
    path: where the pod sees it.
  """

  claim: str
  path: str


def add_flags(to: argparse.ArgumentParser) -> None:
  """Add the flags about pods.

  Args:
    to: parser of the verb that makes the JobSet.
  """
  to.add_argument("--image", required=True, help="container image")
  to.add_argument("--spot", action="store_true", help="use spot machines")
  to.add_argument(
    "--grace-seconds",
    type=int,
    help="from SIGTERM to the kill, enough for a save (default: "
    f"{_GRACE_SECONDS}, with --spot {published.SPOT_GRACE_SECONDS})",
  )
  to.add_argument(
    "--env",
    action="append",
    default=[],
    metavar="NAME=VALUE",
    help="environment variable of all processes; may be repeated",
  )
  to.add_argument(
    "--volume",
    action="append",
    default=[],
    metavar="CLAIM:PATH",
    help="mount a PersistentVolumeClaim that all pods may write to; may be "
    "repeated",
  )
  to.add_argument(
    "--service-account", default="", help="service account of the pods"
  )


def spec(flags: argparse.Namespace, nodes: Nodes) -> dict[str, Any]:
  """Return the spec of a pod.

  Args:
    flags: flags of `add_flags`, and the command.
    nodes: the machines.

  Raises:
    LaunchError: a flag has a value that is not possible.
  """
  _check_names(flags)
  grace_seconds = _grace_seconds(flags)
  own = variables(
    common.ENVIRONMENT | {common.NOTICE_VARIABLE: str(grace_seconds)}
  )
  own += nodes.variables
  given = _environment(flags, {x["name"] for x in own})
  # The 64 MiB that a container has by default are too few for NCCL.
  claims = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
  mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
  for index, volume in enumerate(volumes(flags)):
    name, claim = f"volume-{index}", {"claimName": volume.claim}
    claims.append({"name": name, "persistentVolumeClaim": claim})
    mounts.append({"name": name, "mountPath": volume.path})
  pod = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": grace_seconds,
    # Process 1 is then an init of Kubernetes, and the program gets the default
    # actions of signals.
    "shareProcessNamespace": True,
    "nodeSelector": nodes.labels | ({_SPOT: "true"} if flags.spot else {}),
    "volumes": claims,
    "containers": [
      {
        "name": CONTAINER,
        "image": flags.image,
        "command": [*nodes.starter, *map(_literal, flags.command)],
        "env": [*own, *variables(given)],
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


def volumes(flags: argparse.Namespace) -> list[Volume]:
  """Return the volumes of --volume.

  Raises:
    LaunchError: the claim or the path is not possible.
  """
  mounted: list[Volume] = []
  for text in flags.volume:
    claim, _, path = text.partition(":")
    if not _DNS.fullmatch(claim) or not re.fullmatch(r"(/[^/:\s]+)+", path):
      raise common.LaunchError(
        f"--volume={text}: write CLAIM:PATH, as in --volume=shared-disk:/data"
      )
    if path in ("/dev/shm", *[x.path for x in mounted]):
      raise common.LaunchError(f"--volume={text}: {path} is mounted already")
    mounted.append(Volume(claim, path))
  return mounted


def _literal(text: str) -> str:
  """Return a text as Kubernetes takes it without replacing $(NAME) in it."""
  return text.replace("$", "$$")


def variables(environment: dict[str, str]) -> list[dict[str, Any]]:
  """Return environment variables as a manifest lists them.

  Args:
    environment: values by name.
  """
  return [{"name": k, "value": _literal(v)} for k, v in environment.items()]
