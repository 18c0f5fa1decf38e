"""A command on another machine, over the ssh connection that Ray's launcher uses too."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONNECT_TIMEOUT_S = 10
_SSH_FAILED = 255


class RemoteError(Exception):
    """The machine was not reached, or the command failed there."""


@dataclass(frozen=True)
class Login:
    """How to get into the machines of one cluster: the `auth` of its file."""

    user: str
    key: str = ""
    proxy_command: str = ""

    @classmethod
    def of(cls, auth: dict[str, Any]) -> "Login":
        """From `auth: {ssh_user, ssh_private_key, ssh_proxy_command}`."""
        key = auth.get("ssh_private_key")
        return cls(
            auth.get("ssh_user", "ubuntu"),
            str(Path(key).expanduser()) if key else "",
            auth.get("ssh_proxy_command") or "",
        )

    def run(self, address: str, script: str, timeout_s: float = 60.0) -> str:
        """What a bash script prints on the machine. Raises `RemoteError`."""
        try:
            done = subprocess.run(
                self._argv(address), input=script, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except FileNotFoundError as error:
            raise RemoteError("there is no program `ssh` on this machine") from error
        except subprocess.TimeoutExpired as error:
            raise RemoteError(f"no answer within {timeout_s:g} s") from error
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            what = "no login" if done.returncode == _SSH_FAILED else f"exit code {done.returncode}"
            raise RemoteError(f"{what}: {lines[-1].strip() if lines else 'nothing was said'}")
        return done.stdout

    def _argv(self, address: str) -> list[str]:
        # As Ray's launcher: machines come and go, and their host keys with them.
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(CONNECT_TIMEOUT_S),
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            **({"ProxyCommand": self.proxy_command} if self.proxy_command else {}),
        }
        argv = ["ssh", *(["-i", self.key] if self.key else [])]
        for name, value in options.items():
            argv += ["-o", f"{name}={value}"]
        return [*argv, f"{self.user}@{address}", "bash", "-s"]
