#!/bin/bash
# torchrun on machines without a scheduler: the same command on every one, with its own number.
#
#     NODE_RANK=0 bash docs/launch/torchrun_static.sh 2 8 first-host mae vit_b16 runs/mae_b16 data.shards=/data/shards
#     NODE_RANK=1 bash docs/launch/torchrun_static.sh 2 8 first-host mae vit_b16 runs/mae_b16 data.shards=/data/shards
set -euo pipefail

nodes=${1:?machines}; ranks=${2:?ranks per machine}; first=${3:?host of machine 0}
stage=${4:?stage}; preset=${5:?preset}; run=${6:?run folder}; shift 6

exec torchrun --nnodes "$nodes" --node-rank "${NODE_RANK:?number of this machine, from 0}" --nproc-per-node "$ranks" \
    --master-addr "$first" --master-port "${MASTER_PORT:-29500}" --max-restarts 0 \
    -- maws/train.py --stage "$stage" --preset "$preset" --run "$run" --resume auto "$@"
