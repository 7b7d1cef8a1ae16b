#!/usr/bin/env bash
# Score on a rented machine with several GPUs; shards and store lie in an object store.
#
#   deploy/eight-gpus.sh --config run.toml
#
# The arguments are those of `dynams score`. It installs the checkout that it lies in into .venv of the folder that it is
# called from. Without --cluster it starts one worker for each GPU. When the machine is taken away, run the same line on
# the next one: it goes on with the parts that are missing.
set -euo pipefail

test -d .venv || python3 -m venv .venv
.venv/bin/pip install --quiet "$(dirname "$0")/..[s3,jpeg]"
nvidia-smi --list-gpus
.venv/bin/dynams score --device cuda "$@"
