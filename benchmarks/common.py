"""What every benchmark writes beside its figures: commit, machine, versions; and where a document shows them."""

import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def provenance(seed: int) -> dict[str, Any]:
    """Commit (with + where code was changed since), machine, versions and seed."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=RESULTS.parent.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no", "--", ":!docs") else ""
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "machine": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "ray", "diffusers")},
        "seed": seed,
    }


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
