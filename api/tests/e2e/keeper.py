"""Keeps the gateway of test_kills_vm.py where its monitors run, as root: in the lab, or on this machine. Standard library only.

Commands come by lines: "start POINT", "stop", "kill", "dead", "look", "end PROGRAM", each answered with one line of JSON that begins with "keeper: "."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

PROGRAMS = ("thaw-vmm", "thaw-egress")
trigger = pathlib.Path(tempfile.mkdtemp()) / "trigger"  # not on the lab's share, whose changes would come late
command, process = [*sys.argv[1:], "--trigger", str(trigger)], None


def text(path):
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def pids_of(*programs):
    """Of an ended process that nobody has waited for, nothing is left."""
    pids = [pid for pid in os.listdir("/proc") if pid.isdigit() and "State:\tZ" not in text(f"/proc/{pid}/status")]
    return sorted(int(pid) for pid in pids if pathlib.PurePath(text(f"/proc/{pid}/cmdline").split("\0")[0]).name in programs)


def look():
    """All that a gateway makes outside its home."""
    pids, networks = [pid for pid in os.listdir("/proc") if pid.isdigit()], set()
    for pid in pids:
        try:
            networks.add(os.readlink(f"/proc/{pid}/ns/net"))
        except OSError:
            pass
    cells = [folder for tree in pathlib.Path("/sys/fs/cgroup").glob("**/thaw-*") for folder in [tree, *tree.glob("vm-*")]]
    return {
        "processes": pids_of(*PROGRAMS),
        "networks": len(networks),
        "links": sorted(os.listdir("/sys/class/net")),
        "named networks": sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else [],
        "mounts": sorted(line.split()[1] for line in text("/proc/self/mounts").splitlines()),
        "trees": sorted(str(folder) for folder in cells if folder.name.startswith("thaw-")),
        "empty cells": sorted(str(folder) for folder in cells if folder.name.startswith("vm-") and not text(folder / "cgroup.procs")),
        "cells": sum(folder.name.startswith("vm-") for folder in cells),
    }


for line in sys.stdin:
    what, _, point = line.strip().partition(" ")
    answer = None
    if what == "start":
        trigger.write_text(point)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    elif what == "arm":
        trigger.write_text(point)
    elif what == "stop":
        process.send_signal(signal.SIGTERM)
        answer = process.wait()
    elif what == "kill":
        process.kill()
        answer = process.wait()
    elif what == "dead":
        answer = process.poll() if process else None
    elif what == "end":  # all processes of that program
        for pid in pids_of(point):
            os.kill(pid, signal.SIGKILL)
    elif what == "look":
        answer = look()
    print("keeper: " + json.dumps(answer), flush=True)
if process and process.poll() is None:
    process.kill()
