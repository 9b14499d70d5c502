"""Programs that some tests need and pip cannot bring: install them where that is wanted, else say how.

Run by `make test`. Installs by itself only as root on a Debian, and only with CI or TUBELET_APT=1 in the environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "ffmpeg": "ffmpeg",
    "chromium": "chromium",
}
"""Program -> Debian package."""


def missing() -> list[str]:
    """Packages whose program is not there."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None]


def main() -> int:
    """0 where everything is there or may be left out; 1 in CI, which leaves out nothing."""
    packages = missing()
    if not packages:
        return 0
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    in_ci = os.environ.get("CI") == "true"
    if (in_ci or os.environ.get("TUBELET_APT") == "1") and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=quiet, check=True)
        return subprocess.run(install, env=quiet, check=False).returncode
    print(f"Not installed: {', '.join(packages)}. The tests that need them are left out and named at the end.")
    print(f"To run them as well:  sudo {' '.join(install)}")
    return 1 if in_ci else 0


if __name__ == "__main__":
    sys.exit(main())
