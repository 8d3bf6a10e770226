"""What this machine, or a store, can do, and every silent slow or blind path it would take."""

from gpuops.doctor.archive import store as store
from gpuops.doctor.finding import Finding as Finding
from gpuops.doctor.host import machine as machine
