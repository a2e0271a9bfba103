"""A local Ray with safe defaults, or the one at an address."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import ray

# Read where Train's controller runs. Reports would otherwise wait for its poll every 2 s.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # A worker that answers no longer, or that the others wait for at a report, has hung.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "300",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",
}


@dataclass(frozen=True)
class Connection:
    """A Ray that this process is connected to; dashboard is host:port, or empty where there is none."""

    dashboard: str
    local: bool


class ConnectError(Exception):
    """No Ray at the address; the message says what to do."""


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[Connection]:
    """Connects for the length of a with block; a local Ray is stopped at its end.

    address: None or "local" starts a Ray on this machine, reachable from nowhere else; "auto" or HOST:PORT joins one
    that runs. Raises ConnectError.
    """
    local = address in (None, "local")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if local:
        os.environ |= ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        context = ray.init(address="local", include_dashboard=True, dashboard_host="127.0.0.1", **quiet)
    else:
        _check_answers(str(address))
        try:
            context = ray.init(address=address, runtime_env={"env_vars": ENVIRONMENT}, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConnectError(
                f"no Ray cluster answers at --address {address}: {error}; start one with `ray start --head`, "
                "or leave --address out to use this machine"
            ) from error
    try:
        yield Connection(dashboard=context.dashboard_url or "", local=local)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises ConnectError at once where nothing listens: Ray itself tries for more than a minute."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():  # auto, or a Ray client's address
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ConnectError(
            f"nothing answers at --address {address} ({error}); start a cluster with `ray start --head`, "
            "or leave --address out to use this machine"
        ) from error
