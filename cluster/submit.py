"""A command as a Ray job: it runs on the cluster's head, and goes on where this machine goes away."""

import asyncio
import secrets
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.connect import ConnectError, runtime_env, show_token, token_refused


def client(dashboard: str) -> JobSubmissionClient:
    """dashboard: such as http://127.0.0.1:8265. Raises ConnectError where no cluster answers, or asks for a token."""
    try:
        try:
            return JobSubmissionClient(dashboard)
        except AuthenticationError:
            if not show_token():
                raise
            return JobSubmissionClient(dashboard)
    except AuthenticationError as error:
        raise token_refused(f"--dashboard {dashboard}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectError(
            f"no Ray dashboard answers at --dashboard {dashboard}: {error}; reach the head's with "
            "ssh -L 8265:127.0.0.1:8265 HEAD, or kubectl port-forward service/NAME-head-svc 8265"
        ) from error


def submit(jobs: JobSubmissionClient, command: Sequence[str], folder: Path, name: str) -> str:
    """Starts `python3 -m search.cli COMMAND` beside the files of `folder`, with this machine's code; the job's id."""
    env = runtime_env() | {"working_dir": str(folder)}
    # The first on the PATH that the head's Ray was started with; Ray's images, Conda and virtual environments have it,
    # and a system without `python` may, too.
    entrypoint = shlex.join(("python3", "-m", "search.cli", *command))
    job: str = jobs.submit_job(
        entrypoint=entrypoint, runtime_env=env, submission_id=f"{name}-{secrets.token_hex(3)}", metadata={"run": name}
    )
    return job


def state(jobs: JobSubmissionClient, job: str) -> dict[str, Any]:
    """Of a job: job, status (PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED), message, command."""
    try:
        info = jobs.get_job_info(job)
    except RuntimeError as error:
        raise ConnectError(f"no job {job} on this cluster: {error}") from error
    return {"job": job, "status": str(info.status), "message": info.message, "command": info.entrypoint}


def follow(jobs: JobSubmissionClient, job: str, write: Callable[[str], Any]) -> bool:
    """Hands on the job's log as it is written, to its end; whether the job succeeded.

    Raises ConnectionError where the dashboard answers no longer, which ends no job.
    """

    async def tail() -> None:
        async for text in jobs.tail_job_logs(job):
            write(text)

    try:
        asyncio.run(tail())
        status = jobs.get_job_status(job)
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        raise ConnectionError(f"the dashboard answers no longer: {error}") from error
    if not status.is_terminal():
        raise ConnectionError("the dashboard ended the log")
    return bool(status == JobStatus.SUCCEEDED)
