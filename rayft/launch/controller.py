"""Ray Train's controller in the process that calls `fit`, where Ray Train gives it one of its own.

Another process would import for three seconds of a processor what this one has imported, beside the workers that do so
too, and hold 250 MB. Should this process die, its workers die with it, as the controller would. Nor is there an actor
through which workers would wait for each other when they report to Ray Train: these never do, and it would import for
another second.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

import ray
from ray.train import Result
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus

from rayft.launch import session


class _Nobody:
    """In place of the actor through which reporting workers wait for each other."""

    def options(self, **_: Any) -> _Nobody:
        return self

    def remote(self, **_: Any) -> _Nobody:
        return self


class _Workers(WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        """As it was when processes were started for it ahead."""
        return custom_runtime_env

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        """As Ray Train's, but without the actors that have to do with reports of checkpoints: here there are none."""
        shared = {
            "train_run_context": self._train_run_context,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "synchronization_actor": None,
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
    group = importlib.import_module("ray.train.v2._internal.execution.worker_group.worker_group")
    state = importlib.import_module("ray.train.v2._internal.execution.worker_group.state")
    with (
        session.replaced(group, SynchronizationActor=_Nobody()),
        session.replaced(state, _shutdown_sync_actor=lambda nobody: None),
    ):
        controller = _Controller(scaling_policy=policy, **arguments)
        asyncio.run(controller.run())
    return controller.get_result()
