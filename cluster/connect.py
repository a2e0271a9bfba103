"""A local Ray with safe defaults, or the one at an address, which is sent this code."""

import contextlib
import importlib.metadata
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import grpc
import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from cluster import nodes

# Read where Train's controller runs. Reports would otherwise wait for its poll every 2 s.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    # A worker that answers no longer, or that the others wait for at a report, has hung.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "300",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",
    # For what a stopped trial of a reused process still stores. Where it takes longer, Tune fails the trial after it.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
}
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # by which Ray tells a job's driver what the job was given
PACKAGES = ("search", "evaluation", "trainer", "cluster")


@dataclass(frozen=True)
class Connection:
    """A Ray that this process is connected to; dashboard is host:port, or empty where there is none."""

    dashboard: str
    local: bool
    compared: set[str] = field(default_factory=set)  # ids of nodes with this process's versions

    def check_versions(self) -> None:
        """Raises ConnectError where a node, of those that came since this was last asked, has other versions.

        At first also where one that is there cannot say; later, one that comes and goes ends no search.
        """
        here, found = nodes.versions(), [node for node in nodes.living() if node.id not in self.compared]
        first, wrong = not self.compared, []
        for node, there in zip(found, nodes.on_each(found, nodes.versions), strict=True):
            if isinstance(there, nodes.NodeGoneError):
                continue
            if isinstance(there, Exception):
                wrong += [f"{node.name} cannot run this code ({there})"] * first
            elif different := nodes.differences(here, there):
                wrong.append(f"{node.name} has {different}")
            else:
                self.compared.add(node.id)
        if wrong:
            raise ConnectError(
                f"every node must have the versions of this machine, but {'; '.join(wrong)}; "
                "install the same everywhere, then look with: ddpm-search cluster doctor"
            )


class ConnectError(Exception):
    """No Ray at the address, or one that cannot be used; the message says what to do."""


def runtime_env() -> dict[str, Any]:
    """What nodes are sent: these packages and their version, some 100 kB; and the environment of Ray Train."""
    root = Path(__file__).parents[1]
    sent = [root / package for package in PACKAGES]
    # Checkpoints note the version. In a clone, the folder's own egg-info is found before what is installed.
    for own in importlib.metadata.distributions(name="ddpm-search"):
        sent.append(Path(str(own.locate_file(f"ddpm_search-{own.version}.dist-info"))))
    return {
        "py_modules": [str(folder) for folder in sent if folder.is_dir()],
        "excludes": ["__pycache__"],
        "env_vars": ENVIRONMENT,
    }


def driver_env() -> dict[str, Any]:
    """What the driver adds: all of `runtime_env`; in a Ray job, which has its code, what its environment lacks.

    `cluster submit` gave its job all of it; KubeRay and `ray job submit` give none. Ray refuses what is given twice.
    """
    if JOB not in os.environ:
        return runtime_env()
    given = (json.loads(os.environ[JOB]).get("runtime_env") or {}).get("env_vars") or {}
    return {"env_vars": {name: value for name, value in ENVIRONMENT.items() if name not in given}}


@contextlib.contextmanager
def connected(address: str | None = None, check_versions: bool = True) -> Iterator[Connection]:
    """Connects for the length of a with block; a local Ray is stopped at its end.

    address: None or "local" starts a Ray on this machine; "auto" or HOST:PORT joins one that runs.
    Raises ConnectError where there is none, where its nodes have other versions than this process, and where a local
    one does not start.
    """
    local = address in (None, "local")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if local:
        os.environ |= ENVIRONMENT | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        _keep_token_private()
        try:
            with _on_loopback():
                context = ray.init(address="local", include_dashboard=True, dashboard_host="127.0.0.1", **quiet)
        except Exception as error:  # Ray has no error of its own for a machine that is too busy to start it in time
            ray.shutdown()
            raise ConnectError(
                f"Ray did not start on this machine: {error}; see the newest logs below {gettempdir()}/ray, and try "
                "again when it has less to do and more memory and disk"
            ) from error
    else:
        context = _join(str(address), quiet)
    try:
        connection = Connection(dashboard=context.dashboard_url or "", local=local)
        if check_versions and not local:
            connection.check_versions()
        yield connection
    finally:
        ray.shutdown()


def _keep_token_private() -> None:
    """Ray would write its token for every user of the machine to read."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    token.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        token.touch(0o600, exist_ok=False)
        token.write_text(secrets.token_hex(32))
    with contextlib.suppress(PermissionError):  # another user's, shared knowingly
        token.chmod(0o600)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started in this block listens on 127.0.0.1 alone, as Ray does by itself on macOS.

    Elsewhere it listens on every address. Read when Ray starts; the variable of the same use, at its import.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _join(address: str, quiet: dict[str, Any]) -> Any:
    _check_answers(address)
    try:
        return ray.init(address=address, runtime_env=driver_env(), **quiet)
    except ray.exceptions.AuthenticationError as error:
        raise token_refused(f"--address {address}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        if "ersion mismatch" in str(error):
            raise ConnectError(f"--address {address}: {error}; install the cluster's versions here") from error
        raise ConnectError(
            f"no Ray cluster answers at --address {address}: {error}; start one with `ray start --head`, or leave "
            "--address out to use this machine; where there is one, copy its head's ~/.ray/auth_token here"
        ) from error


def _check_answers(address: str) -> None:
    """Shows the token where one is asked for. Raises ConnectError where another is, or where nothing listens.

    At once: Ray itself tries for more than a minute, and does not say that it was a token.
    """
    if "://" in address:
        raise ConnectError(
            f"--address {address} is a Ray client's, through which Ray Tune cannot be driven; run this on a node "
            "of the cluster with --address auto, or send it there: ddpm-search cluster submit"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ConnectError(
            f"nothing answers at --address {address} ({error}); start a cluster with `ray start --head`, "
            "or leave --address out to use this machine"
        ) from error
    if not _is_let_in(address) and not (show_token() and _is_let_in(address)):
        raise token_refused(f"--address {address}")


def _is_let_in(address: str) -> bool:
    """By Ray's own first question to a cluster."""
    with init_grpc_channel(address) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=10)
        except ray.exceptions.AuthenticationError:  # RAY_AUTH_MODE=token, and no token
            return False
        except grpc.RpcError as error:
            # Ray's C++ servers have put it into the details of another code. Of anything else Ray itself speaks.
            return "authenticat" not in f"{error.code()} {error.details()}".lower()
    return True


def show_token() -> bool:
    """From here on as with RAY_AUTH_MODE=token; False where that is set, or to another value, or there is no token.

    To be called where one is asked for: a cluster without tokens cannot call back a driver that wants one.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)  # it would tell of every cluster that it asks
    return "RAY_AUTH_MODE" not in os.environ and maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def token_refused(where: str) -> ConnectError:
    return ConnectError(
        f"the cluster at {where} asks for another token than this machine has; copy the head's ~/.ray/auth_token here, "
        "or set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
    )
