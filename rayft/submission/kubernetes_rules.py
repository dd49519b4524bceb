"""What a recipe may not ask of Kubernetes: each rule says where, what, the value given and what fits.

The limits are those of Kubernetes' API, of KubeRay 1.7 (`ray-operator/controllers/ray/utils/validation.go`) and of
Kueue's webhook for RayJobs. What they would refuse after the job was sent, or what would leave its pods waiting for
ever, is refused here, all of it at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from rayft.errors import Fault
from rayft.fields.faults import show
from rayft.filesystems import is_local
from rayft.paths import places
from rayft.recipe import Recipe, Submit

Faults = Iterator[Fault]

CONFIG_MAP_BYTES = 1_000_000  # a ConfigMap holds 1 MiB, with its metadata
_LEAST = {"memory": "1Gi", "shm": "128Mi"}  # below that Ray does not start: mostly a number without its unit
_MOST_CPUS = 1024
_INT32 = 2**31 - 1

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123, as namespaces are named
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_WORD = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")  # the name in a label's key, and its value
_REGISTRY = r"(?:(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)(?::\d+)?|[A-Za-z0-9-]+:\d+)"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"  # of a repository; only the registry may have upper case
_IMAGE = re.compile(
    rf"(?:{_REGISTRY}/)?{_PART}(?:/{_PART})*(?::[\w][\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?", re.ASCII
)
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|[kMGTPE]|[KMGTPE]i)?")
_UNITS = {"m": Decimal("0.001")} | {
    suffix + i: Decimal(base) ** power
    for i, base, suffixes in (("", 1000, "kMGTPE"), ("i", 1024, "KMGTPE"))
    for power, suffix in enumerate(suffixes, 1)
}

_MACHINES = re.compile(
    r"(node|beta)\.kubernetes\.io/instance-type|nvidia\.com/.+|cloud\.google\.com/gke-(accelerator|gpu).*"
    r"|karpenter\.k8s\.aws/instance-.+"
)

_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")  # an empty one stands for all
_OPERATORS = ("Equal", "Exists")


def faults(recipe: Recipe, uploading: bool = False) -> list[Fault]:
    """All that keeps `recipe` from running as a RayJob, with `uploading` before its local inputs are uploaded.

    Besides the recipe only the local file system is asked: whether `model.path` is a folder here or an id of the Hub.
    """
    asked = recipe.submit or Submit()
    rules = [rule for rule in RULES if not (uploading and rule is paths_reach_pods)]
    return [fault for rule in rules for fault in rule(recipe, asked)]


def amount(quantity: str) -> Decimal | None:
    """What a Kubernetes quantity stands for: "500m" is 0.5, "2Gi" is 2147483648; None where it is none ("2gi")."""
    found = _QUANTITY.fullmatch(quantity)
    return Decimal(found[1]) * _UNITS.get(found[2], Decimal(1)) if found else None


def names_machine(label: str) -> bool:
    """Whether a node's label says which machine, or which GPUs, the node has."""
    return _MACHINES.fullmatch(label) is not None


# --- paths


def paths_reach_pods(recipe: Recipe, asked: Submit) -> Faults:
    # Pods share no folder, whatever `cluster.shared_storage` says of other clusters, and lose theirs when they end.
    if is_local(recipe.storage):
        yield Fault("storage", "a local path, and pods share none", show(recipe.storage), "s3://bucket/prefix fits")
    for one in places(recipe):
        if one.field == "storage" or not (_local_model(one.path) if one.model else is_local(one.path)):
            continue
        fits = "an URL such as s3://bucket/folder fits"
        if one.model:
            fits = "an URL, a Hub id or pkg:<package>/<folder> fits"
        if not recipe.cluster.shared_storage:
            more = "; cluster.shared_storage: true says that the image has it"
            yield Fault(one.field, "a local path, which pods may not have", show(one.path), fits + more)
        elif not os.path.isabs(one.path.removeprefix("file://")):
            yield Fault(one.field, "a relative path, and pods start in a folder of their own", show(one.path), fits)


def _local_model(path: str) -> bool:
    if path.startswith("pkg:") or not is_local(path):
        return False
    return path.startswith((".", "/", "~", "file://")) or os.path.isdir(path)


def recipe_fits_config_map(recipe: Recipe, asked: Submit) -> Faults:
    size = len(recipe.to_yaml().encode())
    if size > CONFIG_MAP_BYTES:
        fits = f"at most {CONFIG_MAP_BYTES} bytes fit into a ConfigMap; a folder or a pattern is shorter than a list"
        yield Fault("the recipe", "too long", f"{size} bytes", fits)


# --- names and numbers


def names_are_valid(recipe: Recipe, asked: Submit) -> Faults:
    kubernetes = asked.kubernetes
    if asked.image is not None and not _IMAGE.fullmatch(asked.image):
        fits = "registry/name:tag or registry/name@sha256:… fits, the name in lower case"
        yield Fault("submit.image", "not the name of an image", show(asked.image), fits)
    named = [
        ("namespace", kubernetes.namespace, _LABEL, 63),
        ("queue", kubernetes.queue, _SUBDOMAIN, 63),  # it is a label's value, too
        ("credentials_secret", kubernetes.credentials_secret, _SUBDOMAIN, 253),
        ("token_secret", kubernetes.token_secret, _SUBDOMAIN, 253),
        ("service_account", kubernetes.service_account, _SUBDOMAIN, 253),
        *(("image_pull_secrets", name, _SUBDOMAIN, 253) for name in kubernetes.image_pull_secrets),
    ]
    for field, value, pattern, longest in named:
        if value is not None and not (pattern.fullmatch(value) and len(value) <= longest):
            inner = "and -" if pattern is _LABEL else "- and ."
            fits = f"at most {longest} lower-case letters, digits {inner} fit, a letter or digit at both ends"
            yield Fault(f"submit.kubernetes.{field}", "not a name in Kubernetes", show(value), fits)


def numbers_are_in_range(recipe: Recipe, asked: Submit) -> Faults:
    for field in ("retries", "deadline_s", "ttl_s", "trials_at_once"):
        value = getattr(asked.kubernetes, field)
        if value is not None and value > _INT32:
            fits = f"a whole number of at most {_INT32} fits"
            yield Fault(f"submit.kubernetes.{field}", "too large for Kubernetes", show(value), fits)


# --- room in a pod


def quantities_are_sound(recipe: Recipe, asked: Submit) -> Faults:
    for field in ("cpu", "memory", "shm"):
        value = getattr(asked.kubernetes, field)
        number, where = amount(value), f"submit.kubernetes.{field}"
        if number is None:
            yield Fault(
                where, "not a quantity", show(value), "units are m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi and Ei"
            )
        elif field == "cpu" and number > _MOST_CPUS:
            yield Fault(where, "more than any machine has", show(value), "a number of CPUs such as 4 or 3500m fits")
        elif field != "cpu" and number < _sound(_LEAST[field]):
            yield Fault(where, "too small", show(value), f"at least {_LEAST[field]} fits; without a unit it is bytes")


def _sound(quantity: str) -> Decimal:
    return amount(quantity) or Decimal(0)


def readers_find_a_cpu(recipe: Recipe, asked: Submit) -> Faults:
    cpu, each = amount(asked.kubernetes.cpu), recipe.cluster.cpus_per_worker
    if cpu is not None and int(cpu) <= each:
        fits = f"at least {each + 1} fits: cluster.cpus_per_worker, and one to read the data"
        yield Fault("submit.kubernetes.cpu", "too few for a worker", show(asked.kubernetes.cpu), fits)


def elastic_pods_hold_one_worker(recipe: Recipe, asked: Submit) -> Faults:
    """Else a run that begins with the least pods has room for all workers in them, and never asks for another."""
    cluster, cpu = recipe.cluster, int(_sound(asked.kubernetes.cpu))
    if cluster.min_workers == cluster.max_workers or cluster.gpus_per_worker:
        return
    if cpu // cluster.cpus_per_worker > 1:
        what = f"a pod of {asked.kubernetes.cpu} CPUs holds several workers, and an elastic run would not grow"
        most = max(cpu, 3)
        fits = f"more than half of submit.kubernetes.cpu, and not all of it, fits: {most - 1} of {most}"
        yield Fault("cluster.cpus_per_worker", what, show(cluster.cpus_per_worker), fits)


def shared_memory_fits_memory(recipe: Recipe, asked: Submit) -> Faults:
    kubernetes = asked.kubernetes
    memory, shm = amount(kubernetes.memory), amount(kubernetes.shm)
    if memory is not None and shm is not None and shm >= memory:
        fits = f"less than submit.kubernetes.memory ({kubernetes.memory}) fits, since it is a part of it"
        yield Fault("submit.kubernetes.shm", "leaves no memory to the processes", show(kubernetes.shm), fits)


def trials_are_of_a_sweep(recipe: Recipe, asked: Submit) -> Faults:
    given = asked.kubernetes.trials_at_once
    if given > 1 and recipe.tune is None:
        fits = "1 fits, or a recipe with `tune`; a run's pods are cluster.workers"
        yield Fault("submit.kubernetes.trials_at_once", "a run has no trials", show(given), fits)


# --- which nodes


def selector_is_valid(recipe: Recipe, asked: Submit) -> Faults:
    for label, value in asked.kubernetes.node_selector.items():
        where = f"submit.kubernetes.node_selector.{label}"
        if not _qualified(label):
            yield Fault(where, "not a label's key", show(label), _KEY_FITS)
        if value and not _WORD.fullmatch(value):  # a role of nodes is a label without a value
            yield Fault(where, "not a label's value", show(value), _WORD_FITS)


_WORD_FITS = "at most 63 letters, digits and - _ . fit, a letter or digit at both ends"
_KEY_FITS = f"a name, or a domain, a slash and a name fit; of a name {_WORD_FITS}"


def _qualified(key: str) -> bool:
    domain, slash, name = key.rpartition("/")
    return bool(_WORD.fullmatch(name)) and (not slash or (len(domain) <= 253 and bool(_SUBDOMAIN.fullmatch(domain))))


def tolerations_are_valid(recipe: Recipe, asked: Submit) -> Faults:
    for number, given in enumerate(asked.kubernetes.tolerations):
        for field, what, fits in _wrong_in(given):
            where = f"submit.kubernetes.tolerations.{number}" + (f".{field}" if field in given else "")
            yield Fault(where, what, show(given.get(field, given)), fits)


def _wrong_in(toleration: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(field, what, what fits) of all that is wrong in a toleration."""
    known = ("key", "operator", "value", "effect", "tolerationSeconds")
    for field in toleration:
        if field not in known:
            yield field, "unknown key", f"known here: {', '.join(known)}"
    key, operator = toleration.get("key", ""), toleration.get("operator", "Equal")
    value, effect = toleration.get("value", ""), toleration.get("effect")
    if operator not in _OPERATORS:
        yield "operator", "not a known choice", "`Equal` or `Exists` fits"
    if key != "" and not (isinstance(key, str) and _qualified(key)):
        yield "key", "not a taint's key", _KEY_FITS
    elif key == "" and operator != "Exists":
        yield "key", "no taint is named", "a `key` fits, or `operator: Exists` for every taint"
    if value != "" and operator == "Exists":
        yield "value", "impossible with `operator: Exists`", "`operator: Equal` fits, or no value"
    elif value != "" and not (isinstance(value, str) and _WORD.fullmatch(value)):
        yield "value", "not a taint's value", f"text fits: {_WORD_FITS}"
    if effect is not None and effect not in (*_EFFECTS, ""):
        yield "effect", "not a known choice", f"{', '.join(f'`{one}`' for one in _EFFECTS)} fit"
    seconds = toleration.get("tolerationSeconds")
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int)):
        yield "tolerationSeconds", "not a whole number", "a whole number of seconds fits"
    elif seconds is not None and effect != "NoExecute":
        yield "tolerationSeconds", "only of use with `effect: NoExecute`", "`effect: NoExecute` fits, or no seconds"


# --- the queue


def queue_admits_a_fixed_size(recipe: Recipe, asked: Submit) -> Faults:
    least, most = recipe.cluster.min_workers, recipe.cluster.max_workers
    if asked.kubernetes.queue is not None and least != most:
        what = "impossible with `submit.kubernetes.queue`: Kueue admits a job as a whole, and none that autoscales"
        yield Fault("cluster.workers", what, show({"min": least, "max": most}), f"one number such as {most} fits")


RULES: tuple[Callable[[Recipe, Submit], Faults], ...] = (
    paths_reach_pods,
    recipe_fits_config_map,
    names_are_valid,
    numbers_are_in_range,
    quantities_are_sound,
    readers_find_a_cpu,
    elastic_pods_hold_one_worker,
    shared_memory_fits_memory,
    trials_are_of_a_sweep,
    selector_is_valid,
    tolerations_are_valid,
    queue_admits_a_fixed_size,
)
