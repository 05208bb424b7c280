#!/bin/bash
# The deepspeed launcher on several machines over ssh without passwords; the hostfile has a line for each.
#
#     bash docs/launch/deepspeed.sh docs/launch/hostfile mae vit_b16 runs/mae_b16 data.shards=/data/shards
#
# Variables for the ranks of other machines go into ~/.deepspeed_env as NAME=VALUE; it hands NCCL_* and PYTHON* on itself.
# Its own exit code is 1 for a run that was asked to stop and saved: see `tail -n 1 RUN/events.jsonl`.
set -euo pipefail

hosts=${1:?hostfile}; stage=${2:?stage}; preset=${3:?preset}; run=${4:?run folder}; shift 4

exec deepspeed --hostfile "$hosts" --master_port "${MASTER_PORT:-29500}" \
    maws/train.py --stage "$stage" --preset "$preset" --run "$run" --resume auto "$@"
