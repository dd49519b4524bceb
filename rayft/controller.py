"""Ray Train's controller in the process that calls `fit`, where Ray Train gives it one of its own.

Another process would import for three seconds of a processor what this one has imported, beside the workers that do so
too, and hold 250 MB. Should this process die, its workers die with it, as the controller would.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.train import Result
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus

from rayft import session


class _Workers(WorkerGroup):
    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As Ray Train's, but without an actor to ask for checkpoints that were reported: here none are."""
        shared = {
            "train_run_context": self._train_run_context,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "synchronization_actor": sync_actor,
            "controller_actor": None,
        }
        told = []
        for at, worker in enumerate(workers):
            own = {name: values[at] for name, values in train_context_args.items()}
            context = {"distributed_context": worker.distributed_context, **shared, **own}
            told.append(worker.actor.init_train_context.remote(**context))
        ray.get(told)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Workers

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        """Where a worker has failed, a moment later: that one saw another end is often known before who it was."""
        status = await super()._poll_workers()
        return await super()._poll_workers() if status.errors else status


class _Still(FixedScalingPolicy):
    """For a Ray without an autoscaler: wishes for machines pass through an actor that would be one more process."""

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


def run(*, scaling_policy: ScalingPolicy, **arguments: Any) -> Result:
    """What Ray Train's trainer would have a controller actor do with `arguments`; returns when the workers have ended.

    For a thread without an event loop. An error of the workers is in the result.
    """
    policy = _Still(scaling_policy.scaling_config) if session.is_own() else scaling_policy
    controller = _Controller(scaling_policy=policy, **arguments)
    asyncio.run(controller.run())
    return controller.get_result()
