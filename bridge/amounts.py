"""Amounts of `resources`: which numbers Ray can give. Pure: the plan's check and the workflow both ask."""

import math

from bridge.plan import Resources


def wanted_instead(name: str, amount: object) -> str:
    """What is wanted in the place of `amount`; empty when it can be had. `name` is the field of `resources`."""
    try:
        number = float(str(amount))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        return "a number of at least 0"
    if name == "nodes" and (number != int(number) or number < 1):
        return "a whole number of at least 1"
    if name == "gpus" and number > 1 and number != int(number):
        return "a part of one, or a whole number"
    return ""


def gang_of_an_actor(resources: Resources) -> str:
    """What is wrong when a gang names an actor: its nodes are given back when the step ends; else an empty text."""
    nodes = resources.nodes or 1
    is_gang = not wanted_instead("nodes", nodes) and float(nodes) > 1
    return "a step on several nodes cannot name an `actor`" if is_gang and resources.actor is not None else ""


def is_name(text: str) -> bool:
    """True for a name that people can read: printable, not empty, at most 100 characters."""
    return text.isprintable() and len(text.strip()) > 0 and len(text) <= 100
