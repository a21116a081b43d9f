"""Drives a daemon through PyPI's qemu.qmp: every query, an error, and the events of a scrub. Prints what came, as JSON."""

import asyncio
import json
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(path: str) -> None:
    qmp = QMPClient("test")
    await qmp.connect(path)
    commands = [c["name"] for c in await qmp.execute("query-commands")]
    queries = [name for name in commands if name.startswith("query-")]
    answers = {name: await qmp.execute(name) for name in queries}
    try:
        await qmp.execute("block_resize", {"device": "nobody", "size": 512})
        error = None
    except ExecuteError as refused:
        error = [refused.error_class, str(refused)]
    events = []
    with qmp.listener() as listener:
        await qmp.execute("pi-scrub", {"device": "vm1", "speed": 0})
        async for event in listener:
            events.append(dict(event))
            if event["data"].get("status") == "null":
                break
    await qmp.disconnect()
    print(json.dumps({"answers": answers, "error": error, "events": events}))


asyncio.run(asyncio.wait_for(main(sys.argv[1]), 60))
