#!/bin/sh
# Starts one machine's processes of a run on several machines. Call it on each of them with the same words:
#
#   MACHINES=2 MACHINE=0 FIRST=192.168.0.1 sh examples/machines/launch.sh train --config_file run.toml
#   MACHINES=2 MACHINE=1 FIRST=192.168.0.1 sh examples/machines/launch.sh train --config_file run.toml
#
# MACHINES: how many there are. MACHINE: which this is, counted from 0. FIRST: the address of number 0, at which all
# others can reach its port PORT (29500). PROCESSES: how many to start here (one for each GPU).
# Under SLURM srun calls it on each machine, and nothing has to be said: see train.slurm beside it.
set -eu

machines=${MACHINES:-${SLURM_NNODES:?say how many machines there are: MACHINES=2}}
machine=${MACHINE:-${SLURM_NODEID:?say which machine this is, counted from 0: MACHINE=0}}
first=${FIRST:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:?say the address of machine 0: FIRST=...}" | head -n 1)}

exec torchrun --nnodes "$machines" --node_rank "$machine" --nproc_per_node "${PROCESSES:-gpu}" \
    --master_addr "$first" --master_port "${PORT:-29500}" -m sfumato "$@"
