"""A Ray cluster of real `ray start` processes on this machine, with a home, a token and a folder of its own."""

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


class RayNodes:
    """Nodes of a cluster; used in a with block, at whose end all of their processes are killed."""

    def __init__(self, home: Path, temporary: Path, head_cpus: int = 0, options: tuple[str, ...] = ()):
        home.mkdir(exist_ok=True)
        token = home / ".ray" / "auth_token"
        token.parent.mkdir(exist_ok=True)
        if not token.exists():
            token.write_text(secrets.token_hex(32))
            token.chmod(0o600)
        self.environment = {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_TMPDIR": str(temporary),  # Ray's sockets want a short path
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
            "COLUMNS": "200",
        }
        self.port, self.dashboard_port, self.metrics_port = free_port(), free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{self.dashboard_port}"
        self.started: list[psutil.Popen] = []
        self.head = self._start(
            (
                "--head",
                f"--port={self.port}",
                f"--dashboard-port={self.dashboard_port}",
                f"--metrics-export-port={self.metrics_port}",
            ),
            head_cpus,
            (),
            {},
            options,
        )

    def add(
        self,
        cpus: int,
        prefix: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        options: tuple[str, ...] = (),
    ) -> psutil.Popen:
        """One more node; prefix: a command that runs it, such as unshare."""
        return self._start((f"--address={self.address}",), cpus, prefix, environment or {}, options)

    def _start(
        self,
        how: tuple[str, ...],
        cpus: int,
        prefix: tuple[str, ...],
        environment: dict[str, str],
        options: tuple[str, ...],
    ) -> psutil.Popen:
        rest = ("--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0", "--block")
        rest += options
        rest += ("--object-store-memory=80000000", "--dashboard-agent-listen-port=0", f"--num-cpus={cpus}")
        node = psutil.Popen(
            (*prefix, RAY, "start", *how, *rest),
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(node)
        said = ""
        for line in node.stdout:
            said += line
            if "Ray runtime started" in line:
                return node
        raise AssertionError(f"the node did not start:\n{said}")

    def kill(self, node: psutil.Popen) -> None:
        """As where the power is cut: every process of a node at once."""
        for process in (*node.children(recursive=True), node):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        node.wait()

    def __enter__(self) -> "RayNodes":
        return self

    def __exit__(self, *error: object) -> None:
        for node in reversed(self.started):
            if node.is_running():
                self.kill(node)

    def run(self, *command: str, timeout: float = 240, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        """The command line, as a user of this cluster has it."""
        return subprocess.run(
            (sys.executable, "-m", "search.cli", *command),
            env=self.environment | ({"HOME": str(home)} if home else {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
