#!/usr/bin/env bash
# Starts a training script on this host with torchrun. The same line on every host, but for
# NODE_RANK:
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node1 GPUS_PER_NODE=8 \
#       launch/torchrun.sh [OPTIONS] SCRIPT ARGS...
#
# In the place of SCRIPT there may be -m MODULE.
#
#   --elastic MIN:MAX   meet at MASTER_ADDR (c10d) with MIN to MAX hosts; after a failure all
#                       workers start again, at most MAX_RESTARTS times (3), and the script resumes
#                       from its last checkpoint; under 1:3 NODE_RANK need not be set
#   --engine NAME       deepspeed or megatron: the preflight imports it, too
#   --no-preflight      start without looking at the hosts first
#   --dry-run           print what would run
#
# Defaults: NUM_NODES=1, NODE_RANK=SLURM's or 0, MASTER_ADDR=localhost, MASTER_PORT=29500,
# GPUS_PER_NODE=all of them, or one process where there is none, PYTHON=python.
set -euo pipefail

fail() {
    printf 'torchrun.sh: %s\n' "$1" >&2
    exit 2
}

elastic='' engine='' preflight=1 dry_run=''
while (($#)); do
    case $1 in
    --elastic) elastic=${2-} && shift ;;
    --engine) engine=${2-} && shift ;;
    --no-preflight) preflight='' ;;
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit ;;
    -m) break ;;
    -*) fail "OPTIONS take those of --help, got $1" ;;
    *) break ;;
    esac
    shift || fail "the last option takes a value, got none"
done
(($#)) || fail "SCRIPT takes a file or -m MODULE, got nothing"
[[ $1 == -m || -f $1 ]] || fail "SCRIPT takes a file or -m MODULE, got $1, which is no file"
[[ $1 != -m || -n ${2-} ]] || fail "-m takes a module, got nothing"
[[ $engine =~ ^(deepspeed|megatron)?$ ]] || fail "--engine takes deepspeed or megatron, got $engine"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
python=${PYTHON:-python}
export NUM_NODES=${NUM_NODES:-1}
export MASTER_PORT=${MASTER_PORT:-29500}
export GPUS_PER_NODE=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
for name in NUM_NODES GPUS_PER_NODE; do
    [[ ${!name} =~ ^[1-9][0-9]{0,5}$ ]] || fail "$name takes a whole number from 1 on, got ${!name}"
done
[[ $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ && $MASTER_PORT -lt 65536 ]] ||
    fail "MASTER_PORT takes a port from 1 to 65535, got $MASTER_PORT"

least=$NUM_NODES most=$NUM_NODES
if [[ -n $elastic ]]; then
    [[ $elastic =~ ^[1-9][0-9]{0,5}:[1-9][0-9]{0,5}$ && ${elastic%:*} -le ${elastic#*:} ]] ||
        fail "--elastic takes MIN:MAX hosts, as 2:4, got $elastic"
    least=${elastic%:*} most=${elastic#*:}
    NUM_NODES=$most
fi
rank=${NODE_RANK-${SLURM_NODEID-}}
if ((most > 1)); then
    [[ -n ${MASTER_ADDR-} ]] ||
        fail "MASTER_ADDR takes the first host's name or address, got nothing"
    [[ -n $rank ]] || ((least < most)) ||
        fail "NODE_RANK takes 0 to $((most - 1)), another on every host, got nothing"
else
    rank=${rank:-0}
fi
export MASTER_ADDR=${MASTER_ADDR:-localhost}
if [[ -n $rank ]]; then
    [[ $rank =~ ^(0|[1-9][0-9]{0,5})$ && $rank -lt $most ]] ||
        fail "NODE_RANK takes 0 to $((most - 1)), got $rank"
    export NODE_RANK=$rank
fi

run=("$python" -m torch.distributed.run "--nproc-per-node=$GPUS_PER_NODE")
if [[ -n $elastic ]]; then
    run+=("--nnodes=$elastic" --rdzv-backend=c10d "--rdzv-endpoint=$MASTER_ADDR:$MASTER_PORT")
    run+=("--rdzv-id=${SLURM_JOB_ID:-weyl_megatron}" "--max-restarts=${MAX_RESTARTS:-3}")
    # Who holds the meeting place is known where ranks are; else torch compares MASTER_ADDR with the
    # host's names.
    [[ -z $rank ]] || run+=("--rdzv-conf=is_host=$((rank == 0))")
    # Otherwise the workers' store outlives a restart, and new workers read the addresses of dead
    # ones from it (pytorch/pytorch#135712).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
else
    run+=("--nnodes=$NUM_NODES" "--node-rank=$rank")
    run+=("--master-addr=$MASTER_ADDR" "--master-port=$MASTER_PORT")
fi
run+=("$@")

# Where hosts may come later, they cannot all be met before: each looks at itself only.
check=("$python" "$(dirname "$0")/preflight.py")
[[ -z $engine ]] || check+=(--engine "$engine")
((least == most)) || check+=(--local)

if [[ -n $dry_run ]]; then
    for name in NUM_NODES NODE_RANK MASTER_ADDR MASTER_PORT GPUS_PER_NODE \
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE; do
        [[ -z ${!name-} ]] || printf 'export %s=%q\n' "$name" "${!name}"
    done
    [[ -z $preflight ]] || { printf '%q ' "${check[@]}" && echo; }
    printf '%q ' "${run[@]}" && echo
    exit
fi
[[ -z $preflight ]] || "${check[@]}"
exec "${run[@]}"
