"""Runs a function with the Lambda client for Python, unmodified, in clones of one snapshot.

The client brings the whole SnapStart protocol: hooks before the snapshot, restore/next, hooks after the restore. Its own
restore/next is a second request to the agent, through another HTTP client, after the thaw. Here the client's first
invocation/next stands for it: the snapshot is taken while the native client waits in there, and what it brings is kept
until the hooks have run. The handler is called only if all of them succeeded. A version with SnapStart and hooks of its own
goes the client's way, for these hooks have a time limit of their own, and only so the agent sees where they end.
"""

import os
import sys
import time

from awslambdaric import bootstrap
from awslambdaric.lambda_config import LambdaConfigProvider
from awslambdaric.lambda_runtime_client import LambdaRuntimeClient
from snapshot_restore_py import get_after_restore, register_after_restore


SNAP_START = bootstrap.INIT_TYPE_SNAP_START


def reseed():
    """Gives new state to the random generators that live in this process, where they are loaded."""
    modules = sys.modules
    if hasattr(modules.get("random"), "_inst"):
        modules["random"]._inst.seed()
    if hasattr(modules.get("numpy.random"), "seed"):
        modules["numpy.random"].seed()
    if "_ssl" in modules:  # OpenSSL's generators for threads are reseeded from the one that this reaches
        modules["_ssl"].RAND_add(os.urandom(32), 32.0)
    if hasattr(modules.get("uuid"), "_generate_time_safe"):
        uuid = modules["uuid"]
        # The C library's node and clock sequence are the snapshot's; Python's own are drawn here and at each call.
        uuid._generate_time_safe = None
        uuid._node = int.from_bytes(os.urandom(6), "big") | 1 << 40
        uuid._last_timestamp = None


class Client(LambdaRuntimeClient):
    first = None
    is_unique = False
    hooks_ns = None  # what the hooks took, the function's own included: the bench's function tells it

    def restore_next(self):
        self.rehearse()
        if os.environ.get(bootstrap.AWS_LAMBDA_INITIALIZATION_TYPE) == SNAP_START and len(get_after_restore()) > 1:
            return super().restore_next()
        self.first = super().wait_next_invocation()
        self.thawed_ns = time.monotonic_ns()

    def wait_next_invocation(self):
        if self.first:
            Client.hooks_ns = time.monotonic_ns() - self.thawed_ns
        request, self.first = self.first or super().wait_next_invocation(), None
        if not self.is_unique:  # the function switched the client's hooks off
            self.after_restore()
        return request

    def after_restore(self):
        reseed()
        self.is_unique = True

    def rehearse(self):
        """Goes an invocation's way before the snapshot, so that its code is in memory and its connection is open.

        No function runs, and the agent drops the answer. A client that the function has changed may find it unfit."""
        reseed()
        try:
            bootstrap.handle_event_request(
                self, lambda event, context: event, "rehearsal", b"{}", "application/json", None, None, "", "0", None, None
            )
        except Exception:
            pass


def order_paths():
    """The order of Lambda: the function's folder, its layers, the runtime."""
    runtime = os.path.dirname(os.path.abspath(__file__))
    if sys.path.count(runtime) > 1:  # once more than PYTHONPATH says: the script's own
        del sys.path[0]
    at = sys.path.index(runtime)
    packages = "/opt/python/lib/python{}.{}/site-packages".format(*sys.version_info)
    sys.path[at:at] = [packages, "/opt/python"]
    sys.path.insert(0, os.environ["LAMBDA_TASK_ROOT"])


def main():
    order_paths()
    # Whatever the function is told it is, it is frozen: the client's test for that holds, unless the function changes the variable.
    bootstrap.INIT_TYPE_SNAP_START = os.environ.get(bootstrap.AWS_LAMBDA_INITIALIZATION_TYPE)
    # A wrapper may have put a handler of its own into the variable.
    config = LambdaConfigProvider([sys.argv[0], os.environ["_HANDLER"]])
    client = Client(config.api_address, config.use_thread_polling)
    register_after_restore(client.after_restore)  # first, so that the function's own hooks find it done
    bootstrap.run(config.handler, client)


if __name__ == "__main__":
    main()
