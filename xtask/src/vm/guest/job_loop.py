"""job_loop.py KIND: keeps a job of that kind at work on the LUN `r` at full speed, one after another, until /tmp/stop is there; then prints as JSON how many
bytes it moved, in how many runs, and for how long there was one."""
import json, os, socket, sys, time

KIND, NAME = sys.argv[1], "r"
s = socket.socket(socket.AF_UNIX)
s.settimeout(120)
s.connect("/run/tcmu-dif/qmp.sock")
lines = s.makefile("r")
assert "QMP" in json.loads(lines.readline())


def ask(execute, **arguments):
    arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
    s.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode())
    while "event" in (answer := json.loads(lines.readline())):
        pass
    # A job that is told to end may have ended already.
    assert "return" in answer or execute == "job-cancel", (execute, arguments, answer)
    return answer.get("return")


def image():
    return next(d for d in ask("query-block") if d["device"] == NAME)["inserted"]["image"]


def remove(path):
    for file in (path, path + ".pi"):
        if os.path.exists(file):
            os.remove(file)


def begin(target):
    if KIND.startswith("mirror"):
        mode = "write-blocking" if KIND.startswith("mirror-write-blocking") else "background"
        ask("drive-mirror", device=NAME, target=target, format="qcow2", sync="full", copy_mode=mode, auto_dismiss=False)
    elif KIND == "backup":
        ask("drive-backup", device=NAME, target=target, format="qcow2", sync="full", auto_dismiss=False)
    elif KIND == "commit":
        ask("block-commit", device=NAME, auto_dismiss=False)
    elif KIND == "stream":
        ask("blockdev-snapshot-sync", device=NAME, snapshot_file=target)
        ask("block-stream", device=NAME, auto_dismiss=False)


ask("qmp_capabilities")
moved, runs, busy, began = 0, 0, 0.0, time.monotonic()
over = lambda: os.path.exists("/tmp/stop")
while not over():
    target = f"/scratch/{KIND}-{os.getpid()}-{runs}.qcow2"
    beneath = image()["filename"]
    begin(target)
    started = time.monotonic()
    if not runs:
        open("/tmp/begun", "w").close()
    while True:
        job = ask("query-block-jobs")[0]
        if job["status"] == "concluded":
            break
        # One that is ready has nothing to do but what guests write; that is a row of its own.
        if over() or (job["ready"] and not KIND.endswith("ready")):
            # A stream has to come to its end.
            if KIND != "stream":
                ask("job-cancel", id=NAME)
        time.sleep(0.05)
    busy += time.monotonic() - started
    moved += job["offset"]
    assert "error" not in job, job
    ask("job-dismiss", id=NAME)
    remove(beneath if KIND == "stream" else target)
    runs += 1
print(json.dumps({"moved": moved, "runs": runs, "busy": busy, "seconds": time.monotonic() - began}))
