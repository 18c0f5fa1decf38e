"""What the pool gives to an attempt: the actors that will run it, and where they are."""

from typing import Literal

from steps import Frozen


class Place(Frozen):
    """One actor and its node."""

    actor: str
    """Name of the actor."""
    node_id: str
    folder: str
    """Where the actor keeps its attempts, on that node."""
    address: str = ""
    """Address of the node for the other nodes."""


class Lease(Frozen):
    """Answer to one `lease` call."""

    state: Literal["leased", "waiting", "pinned", "infeasible", "unfit", "failed"]
    """`pinned`: ask again with the image in `text`; `unfit`: no actor can be placed in the image."""
    places: tuple[Place, ...] = ()
    """One, or one for each member of a gang in the order of their ranks; empty unless leased."""
    fresh: bool = False
    """True when the actors were made for this key."""
    text: str = ""
    """What it waits for, or why there will be no lease."""

    @property
    def actor(self) -> str:
        """Name of the first actor; empty unless leased."""
        return self.places[0].actor if self.places else ""
