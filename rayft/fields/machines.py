"""The sections of a recipe that say where it runs: checkpoints, DeepSpeed, workers, failures, submission."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rayft.fields.sections import Flag, Natural, Number, Positive, Section, Text


class Checkpoints(Section):
    """Which checkpoints of a run stay."""

    keep: Positive = 2
    """How many of the newest are kept, besides the best."""


def _stage(value: Any) -> Any:
    return "a boolean" if isinstance(value, bool) else value  # or Python takes `true` for 1


class DeepSpeed(Section):
    """How weights, gradients and optimizer state are shared out among the workers."""

    zero_stage: Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(_stage)] = "auto"
    """What each worker holds only a part of: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights.

    auto: the least sharding that leaves half of a worker's memory to activations.
    """
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lies in the host's memory: nothing, the optimizer's state (from stage 1 on), or weights too (at stage 3).

    The optimizer's step is then computed there, by `cluster.cpus_per_worker` threads.
    """
    extra: dict[str, Any] = Field(default={})
    """Keys of DeepSpeed's own configuration; those that a field of the recipe sets are refused."""


class Workers(Section):
    """An elastic number of workers."""

    min: Positive
    """With fewer the run does not start, nor go on after a failure."""
    max: Positive
    """So many take part where there is room for them, also later."""


class Cluster(Section):
    """How many workers train together, and what each of them has."""

    workers: Positive | Workers = 2
    """Processes that share each global batch: a number of them, or `min` and `max`."""
    gpus_per_worker: Natural = 0
    """1: each worker trains on a GPU of its own; 0: on processors."""
    cpus_per_worker: Positive = 1
    """Processors that Ray keeps for a worker, and the threads that it computes with."""
    shared_storage: Flag = False
    """True: local paths are the same on every machine; of pods, that their image has them."""

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, Workers) else self.workers

    @property
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, Workers) else self.workers


class Failure(Section):
    """What a run does when machines or storage fail, or it has to leave."""

    max_retries: Natural = 3
    """How often it is tried again after what may pass (a lost worker, storage) with no newer checkpoint in between."""
    timeout_s: Positive = 600
    """Seconds after which a worker that stands still is given up, and for which a run waits for room to begin."""
    grace_s: Natural = 30
    """Seconds for a checkpoint when a run is asked to stop or its machine is to leave; then workers are killed."""


# --- submission


def _quantity(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_Amount = Annotated[str, Field(strict=True, pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?|Ki)?$", examples=["4", "16Gi"])]
Quantity = Annotated[_Amount, BeforeValidator(_quantity, json_schema_input_type=_Amount | Number)]


class Kubernetes(Section):
    """What a RayJob of KubeRay is made with: a run's own cluster, of a head and a pod for each worker."""

    namespace: Text = "default"
    """The namespace of the RayJob and its pods."""
    queue: Text | None = None
    """The queue of Kueue (a LocalQueue) that the run waits in; null: none. It takes a fixed number of workers."""
    credentials_secret: Text | None = None
    """The Secret whose keys become environment variables of the head and the workers; null: none."""
    token_secret: Text | None = None
    """The Secret that holds Ray's token, in its key `auth_token`; null: KubeRay makes one."""
    service_account: Text | None = None
    """The account of every pod, such as one that has a cloud's role; null: the namespace's own."""
    image_pull_secrets: tuple[Text, ...] = ()
    """Secrets that a private registry gives the image for."""
    node_selector: dict[str, Annotated[str, Field(strict=True)]] = Field(default={})
    """Labels that a pod's node must have; with GPUs those that name a kind of machine are for the workers' alone."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints that every pod tolerates, as Kubernetes writes them: key, operator, value, effect, tolerationSeconds."""
    cpu: Quantity = "4"
    """Processors of a worker's pod, one more than `cluster.cpus_per_worker` at least; asked for, and not its limit."""
    memory: Quantity = "16Gi"
    """Memory of a worker's pod, which is also its limit; the head gets as much, at most 16Gi unless it is a sweep's."""
    shm: Quantity = "8Gi"
    """How much of `memory` may be /dev/shm, where Ray's objects lie and workers of one pod exchange gradients."""
    trials_at_once: Positive = 1
    """Trials of a sweep that have pods to run side by side: the pods of workers are multiplied by it."""
    mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    """What submits the run: a pod of its own (K8sJobMode), the operator (HTTPMode), or a container beside the head.

    `rayft jobs logs` shows the output of the first alone, and says where that of the others is. SidecarMode can't run
    in namespaces at the pod security level `restricted`, which the operator's container misses.
    """
    retries: Natural = 2
    """How often KubeRay makes a new cluster for a run that failed, which goes on from its last checkpoint."""
    deadline_s: Positive | None = None
    """Seconds after which KubeRay ends the RayJob, counted anew for each of its clusters; one that is late gets no
    retry. Null: never."""
    ttl_s: Natural | None = None
    """Seconds for which a cluster stays after its run; null: 0 in K8sJobMode, whose logs stay without it, else 300."""


class Submit(Section):
    """Where `rayft submit` sends the recipe, and as what."""

    address: Text | None = None
    """The URL of a Ray cluster's job server; `--address` counts before it. Null: RAY_API_SERVER_ADDRESS has it."""
    image: Text | None = None
    """The image of the pods; null: rayft:<version>. On a Ray cluster: the image that has rayft; null: rayft is sent."""
    entrypoint_cpus: Annotated[Number, Field(ge=0)] = 0.0
    """Processors that Ray keeps for the command on the cluster, beside those of the workers."""
    kubernetes: Kubernetes = Kubernetes()
    """For `rayft submit --kubernetes` alone."""
