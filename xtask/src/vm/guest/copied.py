"""copied.py NAME PART: waits until PART (0 to 1) of the LUN NAME has been copied in the handover that is under way here, or that is past its copy, or over.
Prints which it was.
"""
import json, os, socket, sys, time

NAME, PART = sys.argv[1], float(sys.argv[2])
s = socket.socket(socket.AF_UNIX)
s.settimeout(60)
s.connect("/run/tcmu-dif/qmp.sock")
lines = s.makefile("r")


def ask(execute, **arguments):
    s.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode())
    while True:
        answer = json.loads(lines.readline())
        if "event" not in answer:
            return answer.get("return", answer)


lines.readline()
ask("qmp_capabilities")
seen = False
while not os.path.exists("/tmp/handover.rc"):
    found = ask("query-migrate", device=NAME)
    # One before it has another status.
    disk = found.get("disk") if found.get("status") == "active" else None
    if disk and disk["transferred"] >= PART * disk["total"] > 0:
        print("copied", disk["transferred"], "of", disk["total"])
        break
    if seen and not disk:
        print("past its copy:", found.get("status"))
        break
    seen = seen or bool(disk)
    time.sleep(0.02)
else:
    print("over")
