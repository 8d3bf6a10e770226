"""`python -m gpuops.cli` is `gpuops`, for where the script is not on PATH."""

from gpuops.cli import main

main()
