"""Files of a Debian or Ubuntu package without root: `apt-get download`, then `dpkg-deb -x` into a folder of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

DOWNLOAD_WITHIN_S = 120
UPDATE_WITHIN_S = 120
PATIENCE = ("-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=10", "-o", "Acquire::https::Timeout=10")


class PackageFailed(Exception):
    """The package cannot be downloaded or unpacked."""


def unpack_package(package: str, scratch: Path) -> Path | None:
    """Unpack the package into a folder under `scratch`; returns that folder, None on a machine without apt.

    It tries the machine's package lists first; where those are missing or too old, lists of our own.

    Raises PackageFailed where the package is unknown or cannot be fetched.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    files = scratch / "apt"
    files.mkdir()
    archive = fetch_package(package, files, [])
    if archive is None:
        own_lists = ["-o", f"Dir::State::lists={files / 'lists'}", "-o", f"Dir::Cache={files / 'cache'}"]
        for folder in ("lists/partial", "cache/archives/partial"):
            (files / folder).mkdir(parents=True)
        run_command(
            ["apt-get", *PATIENCE, *own_lists, "update"], files, UPDATE_WITHIN_S
        )  # one dead source does not matter
        archive = fetch_package(package, files, own_lists)
    if archive is None:
        raise PackageFailed(f"apt-get download {package} fails")
    unpacked = scratch / "unpacked"
    if run_command(["dpkg-deb", "-x", str(archive), str(unpacked)], files, DOWNLOAD_WITHIN_S) != 0:
        raise PackageFailed(f"dpkg-deb cannot unpack {archive.name}")
    return unpacked


def fetch_package(package: str, folder: Path, options: list[str]) -> Path | None:
    """Download the package's archive into `folder`; returns its path, None where apt fails."""
    run_command(["apt-get", *PATIENCE, *options, "download", package], folder, DOWNLOAD_WITHIN_S)
    return next(iter(sorted(folder.glob(f"{package}_*.deb"))), None)


def run_command(command: list[str], folder: Path, within_s: float) -> int:
    """Run a command in `folder` and drop its output; returns the exit code, -1 after `within_s` seconds."""
    if os.geteuid() == 0 and command[0] == "apt-get":
        command = [*command[:1], "-o", "APT::Sandbox::User=root", *command[1:]]  # _apt cannot write into our folder
    try:
        return subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=within_s, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return -1
