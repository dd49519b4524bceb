"""The commands that send recipes to a cluster, and look after the jobs there; as in `cli.py`, what is heavy waits."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rayft.answer import Answer, answering
from rayft.options import Json, Overrides, RecipeFile

jobs = typer.Typer(no_args_is_help=True, help="Jobs on a cluster: list, status, logs, stop.")

Address = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="The cluster's job server, as http://HEAD:8265.", show_default=False),
]
Kubernetes = Annotated[bool, typer.Option("--kubernetes", help="The cluster that the kubeconfig names, with KubeRay.")]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", metavar="NAME", help="With --kubernetes; else the kubeconfig's.", show_default=False),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or its run's name or folder.")]


def _server(address: str | None, kubernetes: bool, namespace: str | None) -> Any:
    """The `servers.Server` whose jobs are asked for."""
    from rayft.errors import RunRefused

    if kubernetes:
        if address:
            raise RunRefused("--address is of a Ray cluster; Kubernetes' comes from the kubeconfig")
        from rayft.submission import kubernetes_api

        return kubernetes_api.Kubernetes(namespace)
    if namespace:
        raise RunRefused("--namespace is of Kubernetes: it needs --kubernetes")
    from rayft.submission.jobserver import JobServer, address_of

    return JobServer(address_of(address))


def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: Address = None,
    kubernetes: Kubernetes = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --kubernetes: print what it would be given, and contact nobody.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show its output until it ends.")] = False,
    upload: Annotated[bool, typer.Option("--upload", help="Copy small local inputs to the run's storage.")] = False,
    json: Json = False,
) -> None:
    """Run a recipe on a cluster, or attach to the job that runs it there."""
    with answering(json) as answer:
        from rayft.display import Display
        from rayft.errors import RunRefused
        from rayft.recipe import Recipe

        if dry_run and not kubernetes:
            raise RunRefused("--dry-run prints what Kubernetes would be given: it needs --kubernetes")
        loaded = Recipe.load(recipe, overrides or ())
        if dry_run:
            _print_manifests(loaded, recipe, answer, refused=follow or upload)
            return
        from rayft.submission.following import follow as see
        from rayft.text import submitted_lines

        server, send = _sender(loaded, recipe, address, kubernetes)
        with Display(answer.console, json) as show:
            sent = send(upload=upload, show=show)
        lines = submitted_lines(sent.plain(), server.options)
        if not follow:
            answer.give(sent.plain(), *lines)
            return
        answer.say(*lines)
        ended = see(server, sent.job, answer, ask=not json)
        answer.give(sent.plain() | ended)
    if ended["exit_code"]:
        raise typer.Exit(ended["exit_code"])


def _sender(loaded: Any, source: str, address: str | None, kubernetes: bool) -> tuple[Any, Any]:
    """Where a recipe goes, and what takes it there."""
    from functools import partial

    from rayft import submit as carrier
    from rayft.recipe import Submit

    asked = loaded.submit or Submit()
    if kubernetes:
        cluster = _server(address, True, asked.kubernetes.namespace)
        return cluster, partial(carrier.apply, loaded, cluster, source=source)
    from rayft.submission.jobserver import JobServer, address_of

    server = JobServer(address_of(address, asked))
    return server, partial(carrier.submit, loaded, server)


def _print_manifests(loaded: Any, source: str, answer: Answer, refused: bool) -> None:
    """YAML alone on stdout, or with --json the objects."""
    from rayft.errors import RunRefused
    from rayft.submission.kuberay import manifests, to_yaml

    if refused:
        raise RunRefused("--dry-run contacts neither cluster nor storage: it goes with neither --follow nor --upload")
    documents = manifests(loaded, source=source)
    answer.give(documents)
    if not answer.stream:
        sys.stdout.write(to_yaml(documents))


@jobs.command("list")
def jobs_list(
    address: Address = None, kubernetes: Kubernetes = False, namespace: Namespace = None, json: Json = False
) -> None:
    """List the cluster's jobs with the state of their runs, newest first."""
    with answering(json) as answer:
        from rayft.submission import jobs as cluster
        from rayft.text import jobs_lines

        server = _server(address, kubernetes, namespace)
        found = cluster.listed(server)
        answer.give(found, *(jobs_lines(found) if found else [f"no jobs of rayft at {server.address}"]))


@jobs.command("status")
def jobs_status(
    job: JobName,
    address: Address = None,
    kubernetes: Kubernetes = False,
    namespace: Namespace = None,
    json: Json = False,
) -> None:
    """Show one job and its run."""
    with answering(json) as answer:
        from rayft.submission import jobs as cluster
        from rayft.text import job_lines

        found = cluster.status(_server(address, kubernetes, namespace), job)
        answer.give(found, *job_lines(found))


@jobs.command("logs")
def jobs_logs(
    job: JobName,
    address: Address = None,
    kubernetes: Kubernetes = False,
    namespace: Namespace = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show more until the job ends.")] = False,
) -> None:
    """Print what a job has printed."""
    with answering(False) as answer:
        from rayft.submission import jobs as cluster
        from rayft.submission.following import follow as see

        server = _server(address, kubernetes, namespace)
        found = cluster.find(server, job).id
        if not follow:
            answer.say(server.logs(found).rstrip("\n"))
            return
        code = see(server, found, answer, ask=True)["exit_code"]
    if code:
        raise typer.Exit(code)


@jobs.command("stop")
def jobs_stop(
    job: JobName,
    address: Address = None,
    kubernetes: Kubernetes = False,
    namespace: Namespace = None,
    json: Json = False,
) -> None:
    """Stop a job after its run has written a checkpoint."""
    with answering(json) as answer:
        from rayft.display import Display
        from rayft.submission import jobs as cluster
        from rayft.text import job_lines

        server = _server(address, kubernetes, namespace)
        with Display(answer.console, json) as show:
            found = cluster.stop(server, job, show)
        answer.give(found, *job_lines(found))
