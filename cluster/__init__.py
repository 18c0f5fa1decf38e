"""Ray side: runs a step on a Ray node and finds it again, whoever has died meanwhile.

    RayDispatch (worker) -- lines of JSON --> driver (child process, the only Ray client)
        driver:  lease(key) -> pool            which StepActor, warm or new
                 start(request), poll(cursor)  -> StepActor -> steps._host (a thread of the actor's process)
        logs are pulled by offset into the attempt's folder beside the worker; the result follows the last byte

A worker, a driver, the pool or the cluster may die at any line: the next one finds the attempt by its key, in the
attempt's folder (`dispatched.json`), in its actor, or in the folder the actor left on its node.
"""

from cluster.call import RayCall
from cluster.shape import ResourceShape

__all__ = ["RayCall", "ResourceShape"]
