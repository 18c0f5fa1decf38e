"""Ray side: runs a step on a Ray node and finds it again, whoever has died meanwhile.

    RayDispatch (worker) -- lines of JSON --> driver (child process, the only Ray client)
        driver:  lease(key) -> pool            which StepActor, warm or new; all actors of a gang or none
                 start(request), poll(cursor)  -> StepActor -> steps._host (a thread of the actor's process)
        logs are pulled by offset into the attempt's folder beside the worker; the result follows the last byte
        a node that does not share the plan's folder gets a copy by content hash; promised artifacts come back

A gang is one attempt on several nodes. Rank 0 speaks for it: its outputs, artifacts and logs are the step's. The logs
of the others lie in `rank-<n>/` of the attempt's folder. The first that fails ends all.

A step's image is pinned at its first use in the run (`pins`) and checked on a node (`checks`, `images`), whose raylet
then starts the actor's worker in it (`container.worker`). A node that runs in the image itself takes the step directly.

A worker, a driver, the pool or the cluster may die at any line: the next one finds the attempt by its key, in the
attempt's folder (`dispatched.json`), in its actor, or in the folder the actor left on its node.
"""

from cluster.call import RayCall
from cluster.shape import ResourceShape

__all__ = ["RayCall", "ResourceShape"]
