"""Machines of our own as a provider of Ray's cluster launcher: `provider: {type: external, module: ...OnPremises}`.

    ray up -> bootstrap_config: the node type of every machine -> the head, over ssh -> its autoscaler -> the others

Ray's own provider for machines (`type: local`) refuses `available_node_types`, hands every machine the same labels and
image, and is unknown to its own autoscaler on the head. This one keeps what is good in it, the file with the state of
the machines, and adds the types: `node_config: {ips: [...]}` says which machines a type consists of. Every machine
named is part of the cluster; there is nothing to scale.
"""

import copy
import os
from pathlib import Path
from typing import Any

import click
from ray.autoscaler._private.local.node_provider import LocalNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.token_file import TokenError, check_token, mounted_token

_OWN_ID = "RAY_CLOUD_INSTANCE_ID"
"""Set by Ray's launcher where it starts Ray: the address of that machine."""


class OnPremises(LocalNodeProvider):  # type: ignore[misc]  # Ray has no types
    """Fixed machines, each of one node type, known by their addresses."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        head = provider_config["head_ip"]
        if os.environ.get(_OWN_ID) == head and not self.is_running(head):
            self._record(head, {**self._tags(NODE_KIND_HEAD, "head"), TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE})

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        """Take `count` machines of the type in `tags` into use, or as many as there are left."""
        if tags[TAG_RAY_NODE_KIND] == NODE_KIND_HEAD:
            _refuse_bad_token(self.provider_config["token_file"])
        types = self.provider_config["types"]
        free = [ip for ip, kind in types.items() if kind == tags[TAG_RAY_USER_NODE_TYPE] and not self.is_running(ip)]
        for ip in free[:count]:
            self._record(ip, tags)

    def get_command_runner(self, log_prefix: str, node_id: str, auth_config: dict[str, Any], *others: Any) -> Any:
        """Runs commands on a machine, with the key where this process's home is: ssh takes `~` for the user's own."""
        if key := auth_config.get("ssh_private_key"):
            auth_config = {**auth_config, "ssh_private_key": str(Path(key).expanduser())}
        return super().get_command_runner(log_prefix, node_id, auth_config, *others)

    def _tags(self, kind: str, name: str) -> dict[str, str]:
        head_type = self.provider_config["types"][self.provider_config["head_ip"]]
        return {
            TAG_RAY_NODE_KIND: kind,
            TAG_RAY_NODE_NAME: f"ray-{self.cluster_name}-{name}",
            TAG_RAY_USER_NODE_TYPE: head_type,
        }

    def _record(self, ip: str, tags: dict[str, str]) -> None:
        self.state.put(ip, {"tags": dict(tags), "state": "running"})

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The configuration with its machines sorted out. Raises `click.ClickException` when they do not fit."""
        config = copy.deepcopy(cluster_config)
        types = machines(config)
        head_type = config["head_node_type"]
        config["provider"] |= {
            "head_ip": next(ip for ip, kind in types.items() if kind == head_type),
            "worker_ips": [ip for ip, kind in types.items() if kind != head_type],
            "types": types,
            "token_file": str(mounted_token(config) or ""),
        }
        for name, node_type in config["available_node_types"].items():
            number = 0 if name == head_type else list(types.values()).count(name)
            node_type["min_workers"] = node_type["max_workers"] = number
        config["max_workers"] = len(types) - 1
        return config


def machines(config: dict[str, Any]) -> dict[str, str]:
    """Address of every machine -> its node type. Raises `click.ClickException` for a configuration that cannot work."""
    types: dict[str, str] = {}
    for name, node_type in config.get("available_node_types", {}).items():
        for ip in node_type.get("node_config", {}).get("ips", []):
            if ip in types:
                raise click.ClickException(
                    f"machine `{ip}` is of type `{types[ip]}` and of type `{name}`\n\n"
                    "hint: name every machine once, below `available_node_types`"
                )
            types[ip] = name
    head_type = config.get("head_node_type")
    if list(types.values()).count(str(head_type)) != 1:
        raise click.ClickException(
            f"the head's type `{head_type}` has {list(types.values()).count(str(head_type))} machines, wanted one\n\n"
            f"hint: set `available_node_types: {{{head_type}: {{node_config: {{ips: [ADDRESS]}}}}}}`"
        )
    return types


def _refuse_bad_token(path: str) -> None:
    try:
        check_token(Path(path) if path else None)
    except TokenError as error:
        raise click.ClickException(str(error)) from error
