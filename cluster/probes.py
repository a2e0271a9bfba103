"""What the doctor asks of one node, and is run there: its devices, timed; who listens on which address."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

# In a process of its own, which sees every GPU whatever Ray hides, and leaves no memory behind on one.
MEASURE = """
import json, time, torch
gpus = range(torch.cuda.device_count())
def rate(device, size, repeats):
    a = torch.randn(size, size, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    for count in (2, repeats):
        if device != "cpu": torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(count): b = a @ a
        if device != "cpu": torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return 2e-12 * size**3 * repeats / seconds
def memory(i): return [n / 2**30 for n in torch.cuda.mem_get_info(i)]
def gpu(i): return {"name": torch.cuda.get_device_name(i), "memory": memory(i), "rate": rate(f"cuda:{i}", 8192, 20)}
found = [gpu(i) for i in gpus]
devices = found or [{"name": "CPU", "rate": rate("cpu", 512, 5)}]
print(json.dumps({"cuda": torch.version.cuda, "devices": devices}))
"""


def devices() -> dict[str, Any]:
    """{cuda, driver, devices: [{name, rate in TFLOP/s, memory: [free, all] in GiB of a GPU}]}. Raises RuntimeError."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = ""
    return {**json.loads(done.stdout), "driver": driver}


def security() -> dict[str, Any]:
    """Is the token asked for, who may read it, and which addresses do Ray's processes listen on."""
    listening: dict[str, set[str]] = {}
    for process in psutil.process_iter(["name", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "ray::" in command or "/ray/" in command:
            try:
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        ip = connection.laddr.ip.removeprefix("::ffff:")
                        listening.setdefault(ip, set()).add(process.info["name"].strip().removeprefix("ray::"))
            except psutil.Error:  # ended meanwhile, or another user's
                continue
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return {
        "token": os.environ.get("RAY_AUTH_MODE") == "token",
        "mode": stat.S_IMODE(token.stat().st_mode) if token.is_file() else None,
        "listening": {ip: sorted(names) for ip, names in listening.items()},
    }
