"""Following a job: its output as it comes, what Ctrl-C does to it, and the exit code that it ends with."""

from __future__ import annotations

import sys
from typing import Any

from rayft.answer import FAILED, INTERRUPTED, Answer
from rayft.submission.servers import Server
from rayft.text import last_line


def follow(server: Server, job: str, answer: Answer, *, ask: bool) -> dict[str, Any]:
    """Shows what `job` prints until it ends: {"status", "exit_code", "message"}.

    At Ctrl-C a terminal is asked whether to stop the job, where `ask` says so; otherwise the job goes on alone.
    """

    def write(text: str) -> None:
        stream = sys.stderr if answer.stream else sys.stdout
        stream.write(text)
        stream.flush()

    while True:
        try:
            ended = server.follow(job, write)
            break
        except KeyboardInterrupt:
            if not (ask and sys.stdin.isatty() and _stop()):
                answer.say(f"the job goes on; `rayft jobs logs {job} --follow{server.options}` shows it again")
                return {"status": "running", "exit_code": INTERRUPTED, "message": "detached"}
            _stopped(server, job, answer)
    code = {"SUCCEEDED": 0, "STOPPED": INTERRUPTED}.get(ended.status, ended.exit_code or FAILED)
    if code:
        how = "been stopped" if code == INTERRUPTED else "failed"
        why = f": {cause}" if (cause := last_line(ended.message)) and code != INTERRUPTED else ""
        answer.say(f"the job {job} has {how}: exit code {code}{why}")
    return {"status": ended.status.lower(), "exit_code": code, "message": ended.message}


def _stop() -> bool:
    import typer

    try:
        return typer.confirm("stop the job, after a checkpoint? (no: it goes on without you)", default=False, err=True)
    except typer.Abort:
        print(file=sys.stderr)
        return False


def _stopped(server: Server, job: str, answer: Answer) -> None:
    from rayft.errors import RunRefused
    from rayft.submission import jobs

    try:
        jobs.stop(server, job, lambda event: answer.say(event.get("name") or event["text"]))
    except RunRefused:  # it has ended meanwhile, and how it has is told next
        return
