#!/bin/sh
# Everything that is to be known of a GPU, in at most eight minutes: the CUDA tests, then the time and memory of
# steps, what comes before and after training, a bank of adapters, and other libraries if they are installed. It
# needs CUDA, torch and timm, and no installation of medpeft. It prints one table, and writes gpu.json.
#
#     benchmarks/gpu.sh
#     benchmarks/gpu.sh --device cpu --tiny    # tries the command out, where there is no GPU
set -e
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
