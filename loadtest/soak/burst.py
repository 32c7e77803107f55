"""A hundred invocations at once, each in a VM of its own: of functions with a network and of the same without one, in turn. What does the network cost?

    thaw lab --memory MIB --writable DIR -- python3 loadtest/soak/burst.py --thaw target/release/thaw --home DIR/home   (as root)

or without `thaw lab --` on a machine whose own KVM is good. The function tells when it began and stays until all have, so that no VM serves two.
Standard library alone.
"""

import argparse
import json
import pathlib
import signal
import statistics
import threading
import time

from soak import NETWORK, Gateway

CODE = """
import time

def handler(event, context):
    began = time.time()
    time.sleep(max(0, event["until"] - began))
    return began
"""
KINDS = ("alone", "networked")
# A function runs 64 times at once at most.
OF_ONE_FUNCTION = 50


def burst(gateway, kind, count, stay):
    """How long after it was asked each invocation began, seconds."""
    asked = time.time()
    event, began, failed = json.dumps({"until": asked + stay}), [], []

    def invoke(number):
        name = f"{kind}-{number // OF_ONE_FUNCTION}"
        status, body, headers = gateway.ask("POST", f"/2015-03-31/functions/{name}/invocations", event, timeout=60 + stay * 4)
        if status == 200 and "x-amz-function-error" not in headers:
            began.append(json.loads(body) - asked)
        else:
            failed.append((status, body[:300]))

    threads = [threading.Thread(target=invoke, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, (len(failed), failed[:3])
    if max(began) > stay:
        print(f"  the last began after {max(began):.1f} s: some may have had a VM that another was done with; ask for a longer --stay", flush=True)
    return sorted(began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thaw", required=True, help="the program")
    parser.add_argument("--home", required=True, type=pathlib.Path, help="a state folder of the burst's own")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--stay", type=float, default=60, help="seconds that an invocation stays, from when it was asked")
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    gateway = Gateway(options)
    # As many at once as are asked, whatever the machine's processors; what they waited for is the same for both.
    gateway.start("--cpus", str(options.count), "--memory", str(options.count * 150 + 4_000))
    medians = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for number in range(-(-options.count // OF_ONE_FUNCTION)):
            network = NETWORK if kind == "networked" else None
            gateway.create(f"{kind}-{number}", CODE, timeout=round(options.stay * 3), network=network)
        burst(gateway, kind, 1, 1)
    for number in range(options.rounds):
        for kind in KINDS[:: 1 if number % 2 else -1]:
            began = burst(gateway, kind, options.count, options.stay)
            medians[kind].append(statistics.median(began))
            print(f"{kind}: first {began[0]:.2f} s, half {medians[kind][-1]:.2f} s, last {began[-1]:.2f} s", flush=True)
            time.sleep(45)  # the keep-alive of what was made for it
    alone, networked = (statistics.median(medians[kind]) for kind in KINDS)
    print(f"networked / alone, medians of {options.rounds} medians: {networked / alone:.2f}")
    gateway.process.send_signal(signal.SIGTERM)
    return gateway.process.wait(timeout=120)


if __name__ == "__main__":
    raise SystemExit(main())
