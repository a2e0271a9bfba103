"""What every benchmark writes beside its figures: commit, machine, versions; and where a document shows them."""

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def provenance(seed: int) -> dict[str, Any]:
    """Commit (with + where code was changed since; None without git), machine, versions and seed."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", *arguments), cwd=RESULTS.parent.parent, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno", "--", ":!docs")
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "commit": commit and commit + "+" * bool(changed),
        "machine": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {n: installed(n) for n in ("torch", "ray", "diffusers")},
        "seed": seed,
    }


def installed(package: str) -> str | None:
    """Its version; a machine that trains or samples alone has no Ray."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory_mib() -> float:
    """Of this process alone: what getrusage tells of a fresh one is no less than its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def write(name: str, result: dict[str, Any]) -> None:
    """docs/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}")


def filled(document: str, name: str, text: str) -> str:
    """The document with `text` between the marks of `name`."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    changed, count = re.subn(pattern, lambda found: found[1] + text + "\n" + found[2], document, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"the document must have one place for {name}, but has {count}")
    return changed
