"""A real exporter over the scripted driver on the real clock, until stdin ends: a child of test_exporter.

python energy_exporter.py GRPC_URL TRACE_FILE REPOSITORY
"""

import sys
import threading

from gpuops_serving.client import Client
from gpuops_serving.exporter import Exporter, repository_probe
from gpuops_serving.metrics import ServerMeter
from gpuops_serving.trace import TraceReader

url, trace, repository = sys.argv[1:]
with Client(url, timeout_s=5) as client:
    exporter = Exporter(
        ServerMeter(client, trace=TraceReader(trace), longest_s=0.5),
        probe=repository_probe(lambda: Client(url, timeout_s=5), repository),
        namespace="test",
        probe_every_s=0.3,
    )
    sys.stdout.write(f"{exporter.serve(0)}\n")
    sys.stdout.flush()
    threading.Thread(target=lambda: (sys.stdin.read(), exporter.stop()), daemon=True).start()
    exporter.run(0.2)
