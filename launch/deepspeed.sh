#!/usr/bin/env bash
# Starts a training script on all hosts of a hostfile with DeepSpeed's launcher. Run it once, on any
# host that reaches them by ssh without a password; this folder, Python and SCRIPT lie at the same
# path on all of them:
#
#   launch/deepspeed.sh --hostfile FILE [OPTIONS] SCRIPT ARGS...
#   launch/deepspeed.sh --hostfile FILE [OPTIONS] -m MODULE ARGS...
#
#   --hostfile FILE     a line per host, "node1 slots=8"; # begins a comment
#   --launcher NAME     pdsh, or openssh: the same by plain ssh, where there is no pdsh
#   --export NAME       give this variable to the workers, too; as often as you like. No secrets:
#                       the hosts' process lists show it. Those that begin with NCCL_, GLOO_,
#                       TORCH_, CUDA_, OMP_, DS_, PYTHON go by themselves
#   --engine NAME       deepspeed (as without this option) or megatron: what the preflight imports
#   --no-preflight      start without looking at the hosts first
#   --dry-run           print what would run
#
# NUM_NODES=2 takes the first two hosts only, GPUS_PER_NODE=4 four processes on each instead of its
# slots. Defaults: MASTER_ADDR=the first host, MASTER_PORT=29500, PYTHON=python.
set -euo pipefail

fail() {
    printf '%s\n' "$1" >&2
    exit 2
}
refuse() {
    fail "deepspeed.sh: $1"
}

hostfile='' launcher=pdsh engine=deepspeed preflight=1 dry_run='' exports=()
while (($#)); do
    case $1 in
    --hostfile) hostfile=${2-} && shift ;;
    --launcher) launcher=${2-} && shift ;;
    --export) exports+=("${2-}") && shift ;;
    --engine) engine=${2-} && shift ;;
    --no-preflight) preflight='' ;;
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" && exit ;;
    -m) break ;;
    -*) refuse "OPTIONS take those of --help, got $1" ;;
    *) break ;;
    esac
    shift || refuse "the last option takes a value, got none"
done
(($#)) || refuse "SCRIPT takes a file or -m MODULE, got nothing"
[[ $1 == -m || -f $1 ]] || refuse "SCRIPT takes a file or -m MODULE, got $1, which is no file"
[[ $1 != -m || -n ${2-} ]] || refuse "-m takes a module, got nothing"
[[ $launcher =~ ^(pdsh|openssh)$ ]] || refuse "--launcher takes pdsh or openssh, got $launcher"
[[ $engine =~ ^(deepspeed|megatron)$ ]] ||
    refuse "--engine takes deepspeed or megatron, got $engine"
[[ -f $hostfile ]] || refuse "--hostfile takes a file, got ${hostfile:-nothing}"

# Stricter than DeepSpeed, which reads "slots=8x" as 8. No name begins with "-", which ssh would
# take for an option, or has anything in it that pdsh would expand.
name='[A-Za-z0-9_][A-Za-z0-9_.@-]*' blank='[[:space:]]'
takes="^$blank*($name)$blank+slots=([1-9][0-9]{0,4})$blank*$"
hosts=() slots=() number=0
while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ ${line%%#*} =~ [^[:space:]] ]] || continue
    [[ ${line%%#*} =~ $takes ]] || fail "$hostfile:$number takes \"host slots=N\", got \"$line\""
    host=${BASH_REMATCH[1]} slot=${BASH_REMATCH[2]}
    [[ " ${hosts[*]-} " != *" $host "* ]] ||
        fail "$hostfile:$number takes a host that no line above has, got \"$line\""
    hosts+=("$host") slots+=("${GPUS_PER_NODE:-$slot}")
done <"$hostfile"
((number && ${#hosts[@]})) ||
    fail "$hostfile takes a line \"host slots=N\" for every host, got none"

NUM_NODES=${NUM_NODES:-${#hosts[@]}} MASTER_PORT=${MASTER_PORT:-29500}
[[ $NUM_NODES =~ ^[1-9][0-9]{0,5}$ && $NUM_NODES -le ${#hosts[@]} ]] ||
    refuse "NUM_NODES takes 1 to the ${#hosts[@]} hosts of $hostfile, got $NUM_NODES"
hosts=("${hosts[@]:0:NUM_NODES}") slots=("${slots[@]:0:NUM_NODES}")
MASTER_ADDR=${MASTER_ADDR:-${hosts[0]#*@}}
[[ ${slots[0]} =~ ^[1-9][0-9]{0,4}$ ]] ||
    refuse "GPUS_PER_NODE takes a whole number from 1 on, got ${slots[0]}"
[[ $MASTER_ADDR =~ ^[A-Za-z0-9_.:-]+$ ]] ||
    refuse "MASTER_ADDR takes a name or an address, got $MASTER_ADDR"
[[ $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ && $MASTER_PORT -lt 65536 ]] ||
    refuse "MASTER_PORT takes a port from 1 to 65535, got $MASTER_PORT"
python=$(command -v "${PYTHON:-python}") || refuse "PYTHON takes a program, got ${PYTHON:-python}"
python=$(realpath --no-symlinks "$python")
check=$(realpath "$(dirname "$0")/preflight.py")
# DeepSpeed puts both into a line for the hosts' shells as they are.
characters='letters, digits and _@+=:,./-'
for path in "$PWD" "$python"; do
    [[ $path =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] ||
        refuse "the working directory and PYTHON take paths of $characters, got $path"
done

# The workers' command: `env` brings the variables, so that DeepSpeed need not know them, and the
# script gets no --local_rank, so that it is the same under every launcher.
for name in $(compgen -e); do
    case $name in
    PYTHONPATH | CUDA_VISIBLE_DEVICES) ;; # set below, and by DeepSpeed
    NCCL_* | GLOO_* | TORCH_* | CUDA_* | OMP_* | DS_* | PYTHON?*) exports+=("$name") ;;
    esac
done
worker=(env)
for name in ${exports[@]+"${exports[@]}"}; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ && -n ${!name+set} ]] ||
        refuse "--export takes the name of a variable that is set, got $name"
    worker+=("$name=${!name}")
done
worker+=("PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python")
launcher_options=("--master_addr=$MASTER_ADDR" "--master_port=$MASTER_PORT")
launcher_options+=(--no_python --no_local_rank)

# pdsh and the hosts' shells read the line again, in which DeepSpeed puts what has a blank between
# double quotes; so the rest goes there, too, and what is special between them is escaped.
quoted=()
for argument in "${worker[@]:1}" -u "$@"; do
    argument=${argument//%/%%} argument=${argument//\\/\\\\}
    argument=${argument//\$/\\\$} argument=${argument//\`/\\\`}
    [[ $argument == *' '* || $argument =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] ||
        argument=\"${argument//\"/\\\"}\"
    quoted+=("$argument")
done
run=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi)
run+=("--num_nodes=$NUM_NODES")
[[ -z ${GPUS_PER_NODE-} ]] || run+=("--num_gpus=$GPUS_PER_NODE")
run+=("${launcher_options[@]}" "${worker[0]}" "${quoted[@]}")

# A line for a host's shell: a command in this folder, with the variables of workers and launchers.
on_host() {
    printf 'cd %q && exec ' "$PWD"
    printf '%q ' "${worker[@]:0:${#worker[@]}-1}" "NUM_NODES=$NUM_NODES" "NODE_RANK=$1" \
        "GPUS_PER_NODE=${slots[$1]}" "MASTER_ADDR=$MASTER_ADDR" "MASTER_PORT=$MASTER_PORT" "${@:2}"
}

# Runs every host's line by ssh until all have ended or one has failed; or prints them. (`wait -n`
# of today's bash misses what ended before it.)
exec 3>&1
everywhere() {
    local i status
    while read -r status; do
        ((status == 0)) || return "$status"
    done < <(
        for i in "${!hosts[@]}"; do
            if [[ -n $dry_run ]]; then
                echo "ssh -o BatchMode=yes ${hosts[i]} ${lines[i]@Q}" >&3
            else
                {
                    status=0
                    ssh -o BatchMode=yes "${hosts[i]}" "${lines[i]}" </dev/null >&3 || status=$?
                    echo "$status"
                } &
            fi
        done
        wait
    )
}

lines=()
if [[ -n $preflight ]]; then
    same="the folder $PWD, $python and $check take the same place on every host, got another"
    for host in "${hosts[@]}"; do
        line="cd $PWD && test -x $python -a -f $(printf %q "$check")"
        lines+=("$line || { echo $(printf %q "preflight: $host: $same") >&2; exit 1; }")
    done
    everywhere
    for i in "${!hosts[@]}"; do
        lines[i]=$(on_host "$i" "$python" "$check" --engine "$engine" --timeout 120)
    done
    everywhere
fi

if [[ $launcher == pdsh ]]; then
    [[ -z $dry_run ]] || { printf '%q ' "${run[@]}" && echo && exit; }
    command -v pdsh >/dev/null || refuse "--launcher takes openssh where there is no pdsh, got pdsh"
    exec "${run[@]}"
fi

# What the runner would have pdsh start: a launcher on each host, which knows all hosts and slots.
world=''
for i in "${!hosts[@]}"; do
    world+=", \"${hosts[i]}\": [$(seq -s, 0 $((slots[i] - 1)))]"
done
world=$(printf '{%s}' "${world#, }" | base64 --wrap=0 | tr +/ -_)
for i in "${!hosts[@]}"; do
    lines[i]=$(on_host "$i" "$python" -u -m deepspeed.launcher.launch "--world_info=$world" \
        "--node_rank=$i" "${launcher_options[@]}" "${worker[@]}" -u "$@")
done
# What ssh started goes on when ssh ends. The brackets keep pkill from finding the shell that starts
# it.
stop() {
    local started="[-]-world_info=$world .*--master_port=$MASTER_PORT"
    for host in "${hosts[@]}"; do
        ssh -o BatchMode=yes "$host" "pkill -f -- '$started'" </dev/null &
    done
    wait
}
trap 'stop; exit 130' INT TERM
everywhere || {
    status=$?
    stop
    exit "$status"
}
