"""A Ray cluster's job server: jobs are submitted, found, followed and stopped; what goes wrong is one sentence."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rayft.errors import ClusterError, TrainingError
from rayft.fields.faults import show
from rayft.launch import tokens
from rayft.recipe import Submit
from rayft.submission.servers import PATIENCE_S, TERMINAL, Job, Unreachable
from rayft.text import last_line

LOOK_S = 1.0
CONNECT_S, READ_S = 10.0, 60.0
SILENT_S = 30.0  # a job that prints nothing for so long is asked for: a head that has vanished does not hang up
PREFIX = "rayft-"
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_PORT = 8265
_TALKATIVE = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)

T = TypeVar("T")


def address_of(given: str | None, recipe: Submit | None = None) -> str:
    """The URL of the job server: `given` on the command line, that of the recipe, or the environment's.

    `recipe` is the section of a recipe that is to be sent; None where there is no recipe.
    """
    address = given or (recipe and recipe.address) or _of_environment()
    if not address:
        or_recipe = ", or set submit.address in the recipe" if recipe is not None else ""
        raise ClusterError(
            f"no cluster is named: give --address http://HEAD:{_PORT}{or_recipe}, or set RAY_API_SERVER_ADDRESS"
        )
    return _url(address)


def _of_environment() -> str | None:
    """RAY_ADDRESS may be a job server's URL; within a cluster Ray sets it to the cluster's own address."""
    of_server, of_either = (os.environ.get(name) for name in _ADDRESSES)
    if of_server or not of_either or of_either.startswith(("http://", "https://")):
        return of_server or of_either
    raise ClusterError(f"RAY_ADDRESS names the cluster itself; give --address http://HEAD:{_PORT}")


def _url(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    fits = f"a job server's address is http://HEAD:{_PORT}, or https://…"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # of a port that is no number, or brackets that don't close
        raise ClusterError(f"address {show(address)}: {str(error)[:100]}; {fits}") from None
    if parts.username or parts.password:
        raise ClusterError("address: it holds credentials; a token comes from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")
    if parts.query or parts.fragment:
        kept = url.partition("?")[0].partition("#")[0]
        raise ClusterError(f"address {kept}: what follows it, behind ? or #, is of no use to a job server; {fits}")
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url) or port == 0:
        raise ClusterError(f"address {show(address)}: {fits}")
    return url.rstrip("/") if port or parts.scheme == "https" else f"{url.rstrip('/:')}:{_PORT}"


def _options(url: str) -> str:
    """What leads `rayft jobs` to `url`: nothing where the environment does."""
    with suppress(ClusterError):  # it may name something else of Ray's
        if (named := _of_environment()) and _url(named) == url:
            return ""
    return f" --address {shlex.quote(url)}"


class JobServer:
    """The job server at `address` (a URL); ClusterError where it does not answer or wants another token."""

    def __init__(self, address: str) -> None:
        self.address, self.options = address, _options(address)
        try:
            self._client = self._asked(self._connected)
        except (RuntimeError, KeyError) as error:  # by what Ray's client says of an answer that it does not expect
            raise ClusterError(
                f"what answers at {address} is no job server that Ray's client can use: {_first_line(error)}"
            ) from None

    def _connected(self) -> Any:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        with _given_address_counts():
            return _client()(self.address, headers=tokens.headers())

    def _asked(self, question: Callable[[], T]) -> T:
        """What the server answers; ClusterError says why it doesn't."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return question()
        except AuthenticationError:
            raise ClusterError(tokens.refused(self.address)) from None
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise Unreachable(
                f"no job server answers at {self.address} ({type(error).__name__}); is the head running, and its port "
                f"{urlsplit(self.address).port or _PORT} reachable from here?"
            ) from None

    def _answered(self, question: Callable[[], T]) -> T:
        """As `_asked`, where nothing but a fault of the server's own keeps it from answering."""
        try:
            return self._asked(question)
        except RuntimeError as error:
            raise Unreachable(f"{self.address} can't answer now: {last_line(str(error))}") from None

    def jobs(self, prefix: str = PREFIX) -> list[Job]:
        """Jobs that were submitted with an id that begins with `prefix`, the newest first."""
        found = [job for job in self._answered(self._client.list_jobs) if (job.submission_id or "").startswith(prefix)]
        return [_plain(job) for job in sorted(found, key=lambda job: -(job.start_time or 0))]

    def job(self, submission_id: str) -> Job | None:
        """What is known of a job, None where there is none."""
        return next((job for job in self.jobs(submission_id) if job.id == submission_id), None)

    def submit(self, submission_id: str, **job: Any) -> bool:
        """Submits a job; False where one with that id is there, which is left as it is."""
        try:
            self._asked(lambda: self._client.submit_job(submission_id=submission_id, **job))
        except (RuntimeError, ValueError) as error:
            if self.job(submission_id) is not None:
                return False
            raise ClusterError(f"{self.address} did not take the job: {_first_line(error)}") from None
        return True

    def last_try(self, submission_id: str) -> None:
        """Ray tries a job once."""

    def stop(self, submission_id: str) -> None:
        """Ends a job's processes; Ray gives them three seconds."""
        self._answered(lambda: self._client.stop_job(submission_id))

    def waits(self, submission_id: str) -> None:
        """Ray says all that it knows in the job's message."""

    def logs(self, submission_id: str) -> str:
        """What a job has printed; ClusterError where the machine that has it is gone."""
        try:
            found: str = self._asked(lambda: self._client.get_job_logs(submission_id))
        except RuntimeError:  # the head asks the machine that runs the job's command, and that does not answer
            job = self.job(submission_id)
            why = last_line(job.message) if job else "the cluster no longer knows it"
            raise _OutputGone(
                f"the output of {submission_id} lay on a machine that is gone" + (f": {why}" if why else "")
            ) from None
        return found

    def follow(self, submission_id: str, write: Callable[[str], None]) -> Job:
        """Passes on what the job prints until it has ended, also over dropped connections; the job as it ended."""
        shown, heard = 0, time.monotonic()

        def take(text: str, received: int) -> int:
            """The server begins anew at each connection: what has been shown is passed over."""
            nonlocal shown
            new = text[max(0, shown - received) :]
            if new:
                write(new)
            shown = max(shown, received + len(text))
            return received + len(text)

        while True:
            try:
                job = self.job(submission_id)
                if job is None:
                    raise TrainingError(f"the cluster at {self.address} no longer knows the job {submission_id}")
                heard = time.monotonic()
                if job.status in TERMINAL:
                    try:
                        take(self.logs(submission_id), 0)
                    except _OutputGone as error:  # how the job has ended is known all the same
                        write(f"{error}\n")
                    return job
                if job.status == "RUNNING":
                    asyncio.run(self._tail(submission_id, take))
            except Unreachable as error:
                if time.monotonic() - heard > PATIENCE_S:
                    raise TrainingError(
                        f"{self.address} has not answered for {PATIENCE_S:g} s; the job may go on: "
                        f"`rayft jobs logs {submission_id} --follow{self.options}` follows it again"
                    ) from error
            time.sleep(LOOK_S)

    async def _tail(self, submission_id: str, take: Callable[[str, int], int]) -> None:
        """Passes on what comes, until the connection is gone or nothing has come for SILENT_S.

        Whether the job goes on, and whether the server is there, shows when it is asked again.
        """
        import aiohttp

        received, messages = 0, self._client.tail_job_logs(submission_id)
        try:
            while True:
                received = take(await asyncio.wait_for(anext(messages), SILENT_S), received)
        except (StopAsyncIteration, RuntimeError, OSError, aiohttp.ClientError):  # a TimeoutError is an OSError
            return


class _OutputGone(ClusterError):
    """The job is known, and the machine that has its output does not answer."""


def _client() -> Any:
    """Ray's client, which would wait for ever for a server that is silent."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, *, data: bytes | None = None, **more: Any) -> Any:
            """What is sent as one piece has to be gone within CONNECT_S; a package goes in pieces, READ_S for each."""
            first = CONNECT_S if data is None else READ_S
            body: Any = None if data is None else io.BytesIO(data)
            return super()._do_request(method, endpoint, data=body, timeout=(first, READ_S), **more)

    return Client


def _plain(job: Any) -> Job:
    """A job as Ray's client tells of it; its times are in milliseconds."""
    known = job.metadata or {}
    started, ended = ((at or 0) / 1000 or None for at in (job.start_time, job.end_time))
    return Job(
        id=job.submission_id,
        status=job.status.value,
        recipe=known.get("recipe"),
        recipe_hash=known.get("recipe_hash"),
        run=known.get("run"),
        grace_s=float(known.get("grace_s") or 0),
        started=started,
        ended=ended,
        exit_code=job.driver_exit_code,
        message=job.message,
    )


@contextmanager
def _given_address_counts() -> Iterator[None]:
    """Ray prefers the environment's address to the one that it is given."""
    before = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
